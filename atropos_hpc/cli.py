"""The command `atropos-hpc`: everything one does with a run besides starting it.

Each command is a function that returns the exit code: 0 done, 1 failed, 2 refused. A command
imports what it needs itself, so that `status` starts fast on any login node.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_hpc import resources
from atropos_hpc.runtime.run_dir import RunDir, Unreadable

if TYPE_CHECKING:
    from atropos_hpc.contracts.status import PointStatus

REFRESH_S = 2.0  # of the live status


def status(options: argparse.Namespace) -> int:
    """Show the processes of a run, its progress and metrics, and what each process waits for."""
    import msgspec

    from atropos_hpc.observe.status import read_status
    from atropos_hpc.runtime.slurm import known_states

    found = read_status(options.directory, known_states)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
        return 0
    from atropos_hpc.observe import status_view
    from atropos_hpc.observe.terminal import terminal as make_terminal

    terminal = make_terminal()
    if options.once or not terminal.is_terminal:
        terminal.width = terminal.width if terminal.is_terminal else 160
        terminal.print(status_view.draw(found))
        return 0
    from rich.live import Live

    with Live(status_view.draw(found), console=terminal, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(REFRESH_S)
            found = read_status(options.directory, known_states)
            live.update(status_view.draw(found), refresh=True)


def report(options: argparse.Namespace) -> int:
    """Print the points of a sweep as a table, and write the HTML report."""
    import msgspec

    from atropos_hpc.observe import report as observe
    from atropos_hpc.runtime.slurm import known_states

    points = observe.require_points(options.directory)
    jobs = known_states(point.job for point in points)
    rows = [observe.point_status(point, jobs) for point in points]
    best = observe.best(rows)
    if options.json:
        marked = [msgspec.structs.replace(row, best=row is best) for row in rows]
        print(msgspec.json.format(msgspec.json.encode(marked), indent=1).decode())
        return 0
    print(observe.table(rows))
    return _html_report(options, rows)


def _html_report(options: argparse.Namespace, rows: "list[PointStatus]") -> int:
    try:
        from atropos_hpc.observe import html_report
    except ImportError as error:
        install = "pip install 'atropos-hpc[login]'"
        print(f"no report page: {error}; install what is missing with {install}", file=sys.stderr)
        return 0
    out = options.out or options.directory / "report"
    try:
        written = html_report.write(options.directory, rows, out)
    except BrokenPipeError:  # as with `| head`
        sys.stderr.close()
        return 0
    except OSError as error:
        reason = f"cannot write {error.filename}: {error.strerror}"
        print(f"no report page: {reason}; --out names another directory", file=sys.stderr)
        return 1
    print(f"\n{written}, with its plots as PNG files in the same directory")
    return 0


def logs(options: argparse.Namespace) -> int:
    """Show the logs of a run's members, or of the points of a sweep."""
    from atropos_hpc.observe import logs as observe
    from atropos_hpc.observe import report

    points = report.require_points(options.directory)
    if not report.is_point(options.directory, points):
        return observe.show_points(points, options.lines)
    wanted = observe.LogOptions(options.member, options.follow, options.lines, options.attempt)
    return observe.show_point(points[0], wanted)


def samples(options: argparse.Namespace) -> int:
    """Show trained sequences with their scores."""
    from atropos_hpc.observe import samples as observe

    names = observe.Selection.__dataclass_fields__
    selection = observe.Selection(**{name: getattr(options, name) for name in names})
    try:
        found = observe.read(_run(options.run), selection)
    except observe.BadFilter as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    elif found:
        observe.show(found)
    else:
        filtered = any((options.score, options.environment, options.text, options.step is not None))
        what = "no rollouts that match" if filtered else "no rollouts yet"
        print(f"{options.run} has {what}", file=sys.stderr)
    return 0 if found else 1


def stop(options: argparse.Namespace) -> int:
    """Save a checkpoint and end the run, or every run of a sweep; cancel what is queued."""
    from atropos_hpc.launch import stop as launch

    return launch.stop(options.directory)


def resume(options: argparse.Namespace) -> int:
    """Continue a run, or every run of a sweep, from its last durable step."""
    from atropos_hpc.launch import resume as launch

    return launch.resume(options.directory, options.overrides)


def export(options: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face directory."""
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
    """Report what works here, what is missing and how to get it."""
    from atropos_hpc.launch import doctor as launch

    return launch.examine(options.overrides, options.config_dir)


def templates(options: argparse.Namespace) -> int:
    """Copy the sbatch templates to a directory, without overwriting anything."""
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
        # the copy does not lie in a clone
        text = re.sub(r"# Slurm runs a copy.*?\nfi\n", "", source.read_text(), flags=re.S)
        text = text.replace('"$home/.venv/bin/python"', shlex.quote(sys.executable))
        (options.out / source.name).write_text(text)
        print(options.out / source.name)
    return 0


def completion(_options: argparse.Namespace) -> int:
    """Print the completion script of bash, which zsh reads after `bashcompinit`."""
    from atropos_hpc.shell_completion import SCRIPT

    print(SCRIPT.format(commands=" ".join(command.name for command in COMMANDS)), end="")
    return 0


@dataclass(frozen=True)
class Command:
    """A command, its help text, and its arguments as (names, options of add_argument)."""

    run: Callable[[argparse.Namespace], int]
    help: str
    arguments: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()

    @property
    def name(self) -> str:
        return self.run.__name__


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


DIRECTORY = _argument("directory", type=Path, metavar="RUN|SWEEP", help="directory of either")
RUN = _argument("run", type=Path, metavar="RUN", help="the run's directory")
JSON = _argument("--json", action="store_true", help="print JSON")
OVERRIDES = (
    _argument("overrides", nargs="*", metavar="OVERRIDE", help="as of python -m atropos_hpc.train"),
    _argument("--config-dir", type=Path, help="directory of further config files"),
)
COMMANDS = (
    Command(
        status,
        "live status of a run, or of the points of a sweep",
        (
            DIRECTORY,
            _argument("--once", action="store_true", help="print it once, as without a terminal"),
            JSON,
        ),
    ),
    Command(
        report,
        "the points of a sweep as a table, and a page with every plot",
        (
            DIRECTORY,
            _argument(
                "--json", action="store_true", help="print the table as JSON, without a page"
            ),
            _argument("--out", type=Path, help="directory of the page; default: report/ in RUN"),
        ),
    ),
    Command(
        logs,
        "the logs of a run's members, or of a sweep's points",
        (
            DIRECTORY,
            _argument(
                "member", nargs="?", default="", help="such as trainer-0 or server; default: all"
            ),
            _argument("-f", "--follow", action="store_true", help="continue as the logs grow"),
            _argument("-n", "--lines", type=int, default=20, help="last lines of each log (20)"),
            _argument("--attempt", type=int, help="number of the attempt; default: the newest"),
        ),
    ),
    Command(
        samples,
        "trained prompts and completions with their scores",
        (
            RUN,
            _argument("--step", type=int, help="only of this optimizer step"),
            _argument("--score", help="only of this score; also a condition, such as '>0.5'"),
            _argument("--environment", help="only of this environment"),
            _argument("--text", help="only where this regular expression matches"),
            _argument(
                "--sort",
                choices=("step", "score", "length"),
                default="step",
                help="the largest first (default: step, the newest)",
            ),
            _argument("--reverse", action="store_true", help="the smallest first"),
            _argument("-n", "--last", type=int, default=5, help="number to show (5)"),
            JSON,
        ),
    ),
    Command(stop, "save a checkpoint, then end the run; cancel what is queued", (DIRECTORY,)),
    Command(
        resume,
        "continue a run from its last durable step, here or as a new job",
        (
            DIRECTORY,
            _argument(
                "overrides", nargs="*", metavar="KEY=VALUE", help="such as trainer.steps=300"
            ),
        ),
    ),
    Command(
        export,
        "a checkpoint's weights as a Hugging Face directory",
        (
            RUN,
            _argument("out", type=Path, metavar="OUT", help="the directory to create"),
            _argument("--step", type=int, help="step of the checkpoint; default: the newest"),
        ),
    ),
    Command(validate, "report everything that would be refused; starts nothing", OVERRIDES),
    Command(doctor, "check this machine, the cluster and both Python environments", OVERRIDES),
    Command(
        templates,
        "copy the sbatch templates, to adapt them to your site",
        (_argument("out", type=Path, metavar="DIR", help="the directory to copy them to"),),
    ),
    Command(completion, "print a script for the shell's completion"),
)


class _NoRun(Exception):
    """The given directory is not a run's."""


def _run(path: Path) -> RunDir:
    """Return the run in a directory. Raises _NoRun."""
    from atropos_hpc.observe.report import is_run

    if not is_run(path):
        reason = "it has no run.json" if path.exists() else "it does not exist"
        raise _NoRun(f"{path} is not a run's directory: {reason}")
    return RunDir(path.resolve())


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="atropos-hpc", description="GRPO training on rewards from Atropos environments."
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        description = f"{command.help[0].upper()}{command.help[1:]}."
        added = commands.add_parser(command.name, help=command.help, description=description)
        added.set_defaults(function=command.run)
        for names, options in command.arguments:
            added.add_argument(*names, **options)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Refusals are printed as one line."""
    from atropos_hpc.observe.report import NotARunError
    from atropos_hpc.runtime.slurm import SlurmError

    options = parser().parse_args(arguments)
    try:
        return int(options.function(options))
    except (NotARunError, _NoRun, SlurmError, Unreadable) as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # as with `| head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
