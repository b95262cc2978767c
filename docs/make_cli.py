"""Write docs/cli.md from the declarations of the commands.

python docs/make_cli.py          writes the page
python docs/make_cli.py --check  exits with 1 if it would change
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the declarations of this clone, whatever is installed

from atropos_hpc import cli  # noqa: E402
from atropos_hpc.cli_arguments import EXIT_CODES  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
INTRO = """\
# Command reference

Generated from [atropos_hpc/cli.py](../atropos_hpc/cli.py) by `docs/make_cli.py`.

RUN is the directory of a run, SWEEP that of a sweep, OVERRIDE a change of
[the config](config.md) such as `algorithm.kl_coef=0.01`. Only `export` imports torch, and no
command imports vLLM: all others work on a login node.

`python -m atropos_hpc.train` is the same as `atropos-hpc train`, and
`python -m atropos_hpc.train -m hydra/launcher=submitit_slurm` as `atropos-hpc submit`.
"""
JSON = """\
## JSON output

With `--json`, a command prints one JSON document on stdout and nothing else there; messages go to
stderr, and the exit code is the same as without. The documents are the structs of
[status.py](../atropos_hpc/contracts/status.py) (`status`, `report`),
[answers.py](../atropos_hpc/contracts/answers.py) (`validate`, `doctor`, `export`) and
[metrics.py](../atropos_hpc/contracts/metrics.py) (`samples`: a list of `Rollout`). `templates`
prints the paths that it has written.
"""
COMPLETION = """\
## Shell completion

    eval "$(.venv/bin/atropos-hpc completion bash)"

completes commands, options, directories, and the logs of a run, in this shell. For every new one,
put the line into `~/.bashrc`. For zsh or fish, name that shell instead of bash.
"""


def cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("\n", " ")


def rows(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a row for each option."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            record = parameter.get_help_record(context)
            assert record is not None
            yield f"| `{cell(record[0])}` | {cell(record[1])} |"


def section(name: str, command: click.Command) -> Iterator[str]:
    """Yield the lines of one command."""
    context = click.Context(command, info_name=f"atropos-hpc {name}")
    usage = " ".join([f"atropos-hpc {name}", *command.collect_usage_pieces(context)])
    yield from (f"## {name}", "", f"`{usage}`", "", inspect.cleandoc(command.help or ""), "")
    if options := list(rows(command, context)):
        yield from ("| option | meaning |", "|---|---|", *options, "")


def page() -> str:
    """Render docs/cli.md."""
    lines = [INTRO]
    for name, command in cli.app.commands.items():
        lines += section(name, command)
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]
    return "\n".join([*lines, "", JSON, COMPLETION])


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        if PAGE.read_text() != page():
            print(f"docs/cli.md is out of date: run {__file__}", file=sys.stderr)
            return 1
    else:
        PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
