"""What the commands of `atropos-hpc` share: exit codes, refusals, arguments, JSON."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from atropos_hpc.runtime.run_dir import RunDir, Unreadable

EXIT_CODES = {
    0: "done: the run is complete, the command has succeeded",
    1: "failed: the run ended with an error; something asked for does not exist; `doctor` found "
    "something broken",
    2: "refused: the command line, the config or the directory cannot be used; nothing was started",
    75: "stopped: the run has saved a checkpoint, and `resume` continues it",
    130: "interrupted by Ctrl-C before anything was started",
}
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class NoRun(Exception):
    """The given directory is not a run's."""


class Commands(click.Group):
    """The commands in the order of their definition. Refusals are printed as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        from atropos_hpc.observe.report import NotARunError
        from atropos_hpc.runtime.slurm import SlurmError

        try:
            return super().invoke(ctx)
        except (NotARunError, NoRun, SlurmError, Unreadable) as error:
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


def complete_member(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    logs = Path(context.params.get("directory") or ".", "logs", "latest").glob("*.log")
    return sorted(path.stem for path in logs if path.name.startswith(incomplete))


PATH = click.Path(file_okay=False, readable=False, path_type=Path)
directory_argument = click.argument("directory", type=PATH, metavar="RUN|SWEEP")
run_argument = click.argument("run", type=PATH, metavar="RUN")
hydra_words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[OVERRIDE]...")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else."
)
TO_HYDRA = {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False}


def config_arguments(command: Decorated) -> Decorated:
    """Add what describes a config."""
    add = click.argument("overrides", nargs=-1, metavar="[OVERRIDE]...")
    config_dir = click.option("--config-dir", type=PATH, help="Directory of further config files.")
    return add(config_dir(command))


def count_option(
    name: str, least: int, default: int, help: str
) -> Callable[[Decorated], Decorated]:
    """Return the option -n."""
    kind = click.IntRange(min=least)
    return click.option(
        "-n", name, type=kind, default=default, show_default=True, metavar="N", help=help
    )


def print_json(value: object) -> None:
    """Print a struct, or a list of them, as one JSON document."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())


def run_of(path: Path) -> RunDir:
    """Return the run in a directory. Raises NoRun."""
    from atropos_hpc.observe.report import is_run, sweep_table

    if not is_run(path):
        reason = "it has no run.json" if path.exists() else "it does not exist"
        if rows := sweep_table(path):
            reason = f"it is a sweep's; name one of its runs, such as {rows[0].run_dir}"
        raise NoRun(f"{path} is not a run's directory: {reason}")
    return RunDir(path.resolve())
