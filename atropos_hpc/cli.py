"""`atropos-hpc`: what one does to a run besides starting it.

Each command is a function below that returns the exit code: 0 done, 1 it could not be, 2 what was asked for makes no sense. What a command
needs is imported in it: `status` has to be there at once, on any login node.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from atropos_hpc import resources
from atropos_hpc.runtime.run_dir import RunDir, Unreadable

LOOK_S = 2.0  # between two looks of a live status


def status(options: argparse.Namespace) -> int:
    """Who takes part, how far it is, how it does, and what it waits for."""
    import msgspec

    from atropos_hpc.launch.slurm.commands import known_states
    from atropos_hpc.observe.status import read_status

    found = read_status(options.directory, known_states)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
        return 0
    from rich.console import Console

    from atropos_hpc.observe import status_view

    terminal = Console()
    if options.once or not terminal.is_terminal:
        terminal.width = terminal.width if terminal.is_terminal else 160
        terminal.print(status_view.draw(found))
        return 0
    from rich.live import Live

    with Live(status_view.draw(found), console=terminal, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(LOOK_S)
            found = read_status(options.directory, known_states)
            live.update(status_view.draw(found), refresh=True)


def report(options: argparse.Namespace) -> int:
    """The points of a sweep as a table, and everything there is to see as one page."""
    import msgspec

    from atropos_hpc.launch.slurm.commands import known_states
    from atropos_hpc.observe import report as observe

    points = observe.require_points(options.directory)
    jobs = known_states(point.job for point in points)
    rows = [observe.point_status(point, jobs) for point in points]
    best = observe.best(rows)
    if options.json:
        marked = [msgspec.structs.replace(row, best=row is best) for row in rows]
        print(msgspec.json.format(msgspec.json.encode(marked), indent=1).decode())
        return 0
    print(observe.table(rows))
    try:
        from atropos_hpc.observe import html_report
    except ImportError as error:
        print(
            f"no page was drawn ({error}): `pip install 'atropos-hpc[login]'` has what it needs",
            file=sys.stderr,
        )
        return 0
    try:
        written = html_report.write(
            options.directory, rows, options.out or options.directory / "report"
        )
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        print(
            f"no page was drawn: cannot write {error.filename}: {error.strerror}; --out names another directory",
            file=sys.stderr,
        )
        return 1
    print(f"\n{written}, with its plots beside it as PNG files")
    return 0


def logs(options: argparse.Namespace) -> int:
    """What the members of a run have logged."""
    from atropos_hpc.observe import logs as observe

    return observe.show(
        _run(options.run), options.member, options.follow, options.lines, options.attempt
    )


def samples(options: argparse.Namespace) -> int:
    """What the policy said, from version to version."""
    from atropos_hpc.observe import samples as observe

    found = observe.read(_run(options.run), options.version, options.last)
    if options.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    elif found:
        observe.show(found)
    else:
        print(
            f"{options.run} has no samples{' of that version' if options.version is not None else ''} yet",
            file=sys.stderr,
        )
    return 0 if found else 1


def stop(options: argparse.Namespace) -> int:
    """Leave the request to stop. The supervisor and the learner do the rest, wherever they run."""
    from atropos_hpc.contracts.members import StopRequest, SupervisorState
    from atropos_hpc.runtime.membership import RosterReader, post_request

    run = _run(options.run)
    if not RosterReader(run.roster).members(SupervisorState):
        print(f"nothing runs in {run.path}", file=sys.stderr)
        return 1
    post_request(run, StopRequest(by="atropos-hpc stop"))
    print(
        f"asked: the learner saves a checkpoint, and the run in {run.path} ends; `atropos-hpc resume {run.path}` goes on from there"
    )
    return 0


def resume(options: argparse.Namespace) -> int:
    """Go on where the last durable step left it, with the config it has."""
    from atropos_hpc.launch import resume as launch

    return launch.resume(_run(options.run), options.overrides)


def export(options: argparse.Namespace) -> int:
    """See learner/export.py."""
    run = _run(options.run)
    try:
        from atropos_hpc.learner.checkpoint_files import BadCheckpoint
        from atropos_hpc.learner.export import export as write
    except ImportError as error:
        print(
            f"{error}: export needs the trainer's environment (roles.trainer.python)",
            file=sys.stderr,
        )
        return 2
    try:
        done = write(run, options.out, options.step)
    except (OSError, ValueError, BadCheckpoint) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: the weights after step {done}")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Report everything that `atropos_hpc.train` would refuse with these overrides."""
    from atropos_hpc.launch import hydra_api, preflight, sizing
    from atropos_hpc.validate import refuse

    try:
        config = hydra_api.compose(options.overrides, options.config_dir)
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error), VALIDATED)
    run_dir = Path(config.run_dir).absolute()
    found = preflight.check(
        config,
        run_dir,
        RunDir(run_dir).info(),
        on_slurm=config.launch.allocation != "local",
        imports=True,
    )
    if (estimate := sizing.describe(config)) is not None:
        print(f"memory, estimated: {estimate}")
    if found:
        return refuse(found, VALIDATED)
    print("nothing wrong was found")
    return 0


VALIDATED = "This config would be refused."


def doctor(options: argparse.Namespace) -> int:
    """What works here, what is missing, and how to get it."""
    from atropos_hpc.launch import doctor as launch

    return launch.examine(options.overrides, options.config_dir)


def templates(options: argparse.Namespace) -> int:
    """Copy the sbatch templates to a directory; refuse to overwrite anything."""
    sources = sorted(resources.data("slurm").glob("*.sbatch"))
    taken = [source.name for source in sources if (options.out / source.name).exists()]
    if taken:
        print(
            f"{options.out} already has {', '.join(taken)}; nothing was written: "
            "move them, or name another directory",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for source in sources:
        text = source.read_text()
        if not resources.is_clone():  # the submit directory has no .venv of a clone
            text = text.replace(".venv/bin/python", sys.executable)
        (options.out / source.name).write_text(text)
        print(options.out / source.name)
    return 0


def completion(_options: argparse.Namespace) -> int:
    """What bash has to read for completion; zsh understands it after `bashcompinit`."""
    names = " ".join(command.__name__ for command, _, _ in COMMANDS)
    print(COMPLETION.format(commands=names), end="")
    return 0


COMPLETION = """\
# eval "$(atropos-hpc completion)", in ~/.bashrc; in ~/.zshrc after `autoload -U bashcompinit && bashcompinit`
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


def _directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="RUN|SWEEP", help="a run's directory, or a sweep's"
    )


def _status(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="print it and end; also what happens where there is no terminal",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _report(parser: argparse.ArgumentParser) -> None:
    _directory(parser)
    parser.add_argument("--json", action="store_true", help="the table as JSON, and no page")
    parser.add_argument(
        "--out", type=Path, help="where the page goes; else to report/ in the directory"
    )


def _one_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")


def _logs(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument(
        "member",
        nargs="?",
        default="",
        metavar="MEMBER",
        help="such as trainer-0 or server; else all",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on as they grow")
    parser.add_argument("-n", "--lines", type=int, default=20, help="of each, from the end (20)")
    parser.add_argument("--attempt", type=int, help="of which attempt; else the newest")


def _samples(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument("--version", type=int, help="of this policy version only")
    parser.add_argument("-n", "--last", type=int, default=5, help="the newest so many (5)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _resume(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what may change: trainer.steps=300 launch.minutes=120",
    )


def _export(parser: argparse.ArgumentParser) -> None:
    _one_run(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument("--step", type=int, help="of which step; else the newest")


def _templates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="DIR", help="the directory to write them to")


def _nothing(_parser: argparse.ArgumentParser) -> None:
    pass


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for python -m atropos_hpc.train"
    )
    parser.add_argument("--config-dir", type=Path, help="a directory of further config files")


# the function of a command, what it is for, and what adds its arguments
Command = tuple[Callable[[argparse.Namespace], int], str, Callable[[argparse.ArgumentParser], None]]
COMMANDS: tuple[Command, ...] = (
    (status, "how a run goes, live, or each point of a sweep", _status),
    (report, "a sweep's points as a table, and a page with every figure", _report),
    (logs, "what the members of a run have logged", _logs),
    (samples, "prompts, completions and scores, by policy version", _samples),
    (stop, "save a checkpoint, then end the run", _one_run),
    (resume, "go on from the last durable step, here or as a new job", _resume),
    (export, "a checkpoint's weights as a Hugging Face directory", _export),
    (validate, "everything that would be refused, without starting anything", _overrides),
    (
        doctor,
        "this machine, the cluster and both environments: what works, what is missing",
        _overrides,
    ),
    (templates, "copy the sbatch templates, to be edited to your site", _templates),
    (completion, "a script for the shell's completion", _nothing),
)


class _Refused(Exception):
    """What the command was given is not what it needs."""


def _run(path: Path) -> RunDir:
    """The run in that directory. Raises _Refused."""
    from atropos_hpc.observe.report import is_run

    if not is_run(path):
        raise _Refused(
            f"{path} is not a run's directory: "
            + ("it holds no run.json" if path.exists() else "it does not exist")
        )
    return RunDir(path.resolve())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="atropos-hpc", description="GRPO training on rewards from Atropos environments."
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, about, add_arguments in COMMANDS:
        added = commands.add_parser(
            command.__name__, help=about, description=about[0].upper() + about[1:] + "."
        )
        added.set_defaults(function=command)
        add_arguments(added)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. What it refuses is said in one line."""
    from atropos_hpc.observe.report import NotARunError

    options = parser().parse_args(arguments)
    try:
        return int(options.function(options))
    except (NotARunError, _Refused) as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
