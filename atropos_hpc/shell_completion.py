"""The completion script of bash and zsh for the command `atropos-hpc`."""

SCRIPT = """\
# in ~/.bashrc: eval "$(atropos-hpc completion)"
# in ~/.zshrc, before it: autoload -U bashcompinit && bashcompinit
_atropos_hpc() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [ "${{COMP_WORDS[1]}}" = logs ] && [ "$COMP_CWORD" -eq 3 ]; then
        local logs=("${{COMP_WORDS[2]}}"/logs/latest/*.log)
        logs=("${{logs[@]##*/}}")
        COMPREPLY=($(compgen -W "${{logs[*]%.log}}" -- "$word"))
    else COMPREPLY=($(compgen -d -- "$word")); fi
}}
complete -o filenames -F _atropos_hpc atropos-hpc
"""
