"""The command `atropos-hpc`: start runs, look at them, stop, resume and export them.

A command is a function that returns the exit code, and its docstring is its help text. It imports
what it needs itself, so that `--help` and `status` start fast on any login node.
"""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atropos_hpc import __version__, resources
from atropos_hpc.cli_arguments import (
    EXIT_CODES,
    PATH,
    TO_HYDRA,
    Commands,
    complete_member,
    config_arguments,
    count_option,
    directory_argument,
    hydra_words,
    json_option,
    print_json,
    run_argument,
    run_of,
)
from atropos_hpc.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from atropos_hpc.contracts.status import PointStatus

REFRESH_S = 2.0  # of the live status
SLURM = "hydra/launcher=submitit_slurm"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExit codes:\n" + "\n".join(f"{n:5}  {text}" for n, text in EXIT_CODES.items()),
)
@click.version_option(__version__, prog_name="atropos-hpc")
def app() -> None:
    """GRPO training of language models on rewards from Atropos environments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, one of EXIT_CODES."""
    words = None if arguments is None else list(arguments)
    try:
        return int(app.main(words, prog_name="atropos-hpc", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "atropos-hpc"
        print(f"{path}: {error.format_message()} See `{path} --help`.", file=sys.stderr)
        return 2
    except click.Abort:
        return 130


# --- commands


@app.command(**TO_HYDRA)
@hydra_words
def train(words: tuple[str, ...]) -> int:
    """Train on this machine; with run_dir=DIR, resume the run in DIR if there is one.

    Takes overrides such as algorithm.kl_coef=0.01, and Hydra's options: -m for a sweep, --cfg job,
    --help.
    """
    from atropos_hpc import train as module

    sys.argv = ["atropos-hpc train", *words]
    return module.main()


@app.command(**TO_HYDRA)
@hydra_words
def submit(words: tuple[str, ...]) -> int:
    """Submit to Slurm: one job, or one per point of a sweep.

    The same as `train -m hydra/launcher=submitit_slurm`. launch.dry_run=true prints the scripts.
    """
    from atropos_hpc import train as module

    sys.argv = ["atropos-hpc submit", "--multirun", SLURM, *words]
    return module.main()


@app.command()
@directory_argument
@click.option("--once", is_flag=True, help="Print it once, as without a terminal.")
@json_option
def status(directory: Path, once: bool, as_json: bool) -> int:
    """Show a run live: its processes, what each waits for, progress and metrics.

    Of a sweep, one line per point. Reads files only.
    """
    from atropos_hpc.observe.status import read_status
    from atropos_hpc.runtime.slurm import known_states

    found = read_status(directory, known_states)
    if as_json:
        print_json(found)
        return 0
    from atropos_hpc.observe import status_view
    from atropos_hpc.observe.terminal import terminal as make_terminal

    terminal = make_terminal()
    if once or not terminal.is_terminal:
        terminal.width = terminal.width if terminal.is_terminal else 160
        terminal.print(status_view.draw(found))
        return 0
    from rich.live import Live

    with Live(status_view.draw(found), console=terminal, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(REFRESH_S)
            found = read_status(directory, known_states)
            live.update(status_view.draw(found), refresh=True)


@app.command()
@directory_argument
@click.option("--out", type=PATH, help="Directory of the page; default: report/ in RUN.")
@json_option
def report(directory: Path, out: Path | None, as_json: bool) -> int:
    """Print the points as a table, and write a page with every plot.

    With --json the table is printed, and no page is written.
    """
    import msgspec

    from atropos_hpc.observe import report as observe
    from atropos_hpc.runtime.slurm import known_states

    points = observe.require_points(directory)
    jobs = known_states(point.job for point in points)
    rows = [observe.point_status(point, jobs) for point in points]
    best = observe.best(rows)
    if as_json:
        print_json([msgspec.structs.replace(row, best=row is best) for row in rows])
        return 0
    print(observe.table(rows))
    return _html_report(directory, out or directory / "report", rows)


def _html_report(directory: Path, out: Path, rows: "list[PointStatus]") -> int:
    try:
        from atropos_hpc.observe import html_report
    except ImportError as error:
        install = "pip install 'atropos-hpc[login]'"
        print(f"no report page: {error}; install what is missing with {install}", file=sys.stderr)
        return 0
    try:
        written = html_report.write(directory, rows, out)
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = f"cannot write {error.filename}: {error.strerror}"
        print(f"no report page: {reason}; --out names another directory", file=sys.stderr)
        return 1
    print(f"\n{written}, with its plots as PNG files in the same directory")
    return 0


@app.command()
@directory_argument
@click.argument("member", default="", shell_complete=complete_member)
@click.option("-f", "--follow", is_flag=True, help="Continue as the logs grow.")
@count_option("--lines", least=0, default=20, help="Last lines of each log.")
@click.option("--attempt", type=int, metavar="N", help="An earlier attempt; default: the newest.")
def logs(directory: Path, member: str, follow: bool, lines: int, attempt: int | None) -> int:
    """Show the logs of a run's members, or of a sweep's points.

    MEMBER is the beginning of a name, such as trainer or server-0; default: all.
    """
    from atropos_hpc.observe import logs as observe
    from atropos_hpc.observe import report

    points = report.require_points(directory)
    if not report.is_point(directory, points):
        return observe.show_points(points, lines)
    return observe.show_point(points[0], observe.LogOptions(member, follow, lines, attempt))


@app.command()
@run_argument
@click.option("--step", type=int, metavar="N", help="Only of this optimizer step.")
@click.option("--score", metavar="CONDITION", help="Only of this score; also such as '>0.5'.")
@click.option("--environment", metavar="KEY", help="Only of this environment.")
@click.option("--text", metavar="REGEX", help="Only where this regular expression matches.")
@click.option(
    "--sort",
    type=click.Choice(("step", "score", "length")),
    default="step",
    show_default=True,
    help="The largest first.",
)
@click.option("--reverse", is_flag=True, help="The smallest first.")
@count_option("--last", least=1, default=5, help="Number to show.")
@json_option
def samples(run: Path, as_json: bool, **selected: Any) -> int:
    """Show trained prompts and completions with their scores."""
    from atropos_hpc.observe import samples as observe

    selection = observe.Selection(**selected)
    try:
        found = observe.read(run_of(run), selection)
    except observe.BadFilter as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print_json(found)
    elif found:
        observe.show(found)
    else:
        filtered = any(selected[name] for name in ("score", "environment", "text"))
        filtered = filtered or selection.step is not None
        what = "no rollouts that match" if filtered else "no rollouts yet"
        print(f"{run} has {what}", file=sys.stderr)
    return 0 if found else 1


@app.command()
@directory_argument
def stop(directory: Path) -> int:
    """Save a checkpoint and end the run, or every run of a sweep.

    What waits in Slurm's queue is cancelled.
    """
    from atropos_hpc.launch import stop as launch

    return launch.stop(directory)


@app.command()
@directory_argument
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def resume(directory: Path, overrides: tuple[str, ...]) -> int:
    """Continue a run, or every run of a sweep, from its last durable step.

    It continues where it ran: on this machine, or as a new job. Keys may be changed, such as
    trainer.steps=300.
    """
    from atropos_hpc.launch import resume as launch

    return launch.resume(directory, overrides)


@app.command()
@run_argument
@click.argument("out", type=PATH)
@click.option("--step", type=int, metavar="N", help="Step of the checkpoint; default: the newest.")
@click.option("--push", metavar="NAME", help="Also upload it to the Hugging Face Hub: USER/MODEL.")
@click.option("--public", is_flag=True, help="With --push: a new repository is not private.")
@json_option
def export(
    run: Path, out: Path, step: int | None, push: str | None, public: bool, as_json: bool
) -> int:
    """Write a checkpoint as a Hugging Face directory with a model card."""
    from atropos_hpc.contracts.answers import Exported

    found = run_of(run)
    try:
        with redirect_stdout(sys.stderr):
            from atropos_hpc.learner import hub
            from atropos_hpc.learner.checkpoint_files import BadCheckpoint
            from atropos_hpc.learner.export import export as write
    except ImportError as error:
        print(
            f"{error}: export needs the trainer's environment (roles.trainer.python)",
            file=sys.stderr,
        )
        return 2
    try:
        with redirect_stdout(sys.stderr):  # libraries tell of themselves when they are imported
            if push:
                hub.prepare(push, public)
            done = write(found, out, step)
            url = hub.push(out, push, done) if push else None
    except (OSError, ValueError, BadCheckpoint, hub.PushFailed) as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print_json(Exported(str(out), done, url))
    else:
        print(f"{out}: the weights after step {done}", *[url] * bool(url), sep="\n")
    return 0


@app.command()
@config_arguments
@json_option
def validate(overrides: tuple[str, ...], config_dir: Path | None, as_json: bool) -> int:
    """Report everything that `train` and `submit` would refuse; start nothing.

    For Slurm, choose launch=het, split or single, unless the experiment does: otherwise the run is
    one of this machine.
    """
    from atropos_hpc.contracts.answers import MemoryNeed, Problem, Validated
    from atropos_hpc.launch import hydra_api, memory_check, preflight
    from atropos_hpc.runtime import cores
    from atropos_hpc.runtime.masking import mask_assignments
    from atropos_hpc.validate import refuse

    memory: list[MemoryNeed] = []
    threads = None
    warnings: list[Problem] = []
    try:
        config = hydra_api.compose(overrides, config_dir)
    except hydra_api.ERRORS as error:
        found = hydra_api.problems(error)
    else:
        run_dir = Path(config.run_dir).absolute()
        on_slurm = config.launch.allocation != "local"
        found = preflight.check(config, run_dir, RunDir(run_dir).info(), on_slurm, imports=True)
        memory, threads = memory_check.needs(config, on_slurm), cores.describe(config)
        slow = cores.slow_dtype(config) if not on_slurm else None
        warnings = memory_check.warnings(config) + ([slow] if slow else [])
    if as_json:
        refused = [Problem(each.key, mask_assignments(each.message)) for each in found]
        print_json(Validated(refused, memory, warnings))
        return 2 if found else 0
    print(*memory_check.lines(memory), sep="\n", end="\n" if memory else "")
    if threads is not None:
        print(f"cores: {threads}")
    for each in warnings:
        print(f"warning: {each.key}: {each.message}")
    if found:
        return refuse(found, "This config would be refused.")
    print("nothing wrong was found")
    return 0


@app.command()
@config_arguments
@json_option
def doctor(overrides: tuple[str, ...], config_dir: Path | None, as_json: bool) -> int:
    """Check this machine, the cluster and both Python environments; say how to get what is missing.

    Takes the overrides of the run that is meant; changes nothing.
    """
    from atropos_hpc.launch import doctor as launch

    return launch.examine(overrides, config_dir, as_json)


@app.command()
@click.argument("out", type=PATH, metavar="DIR")
@json_option
def templates(out: Path, as_json: bool) -> int:
    """Copy the sbatch templates to DIR, to adapt them to your site; overwrite nothing."""
    sources = sorted(resources.data("slurm").glob("*.sbatch"))
    taken = [source.name for source in sources if (out / source.name).exists()]
    if taken:
        print(
            f"{out} already has {', '.join(taken)}; nothing was written: "
            "move them, or name another directory",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for source in sources:
        # the copy does not lie in a clone
        text = re.sub(r"# Slurm runs a copy.*?\n}\n", "", source.read_text(), flags=re.S)
        text = text.replace('"$home/.venv/bin/python"', shlex.quote(sys.executable))
        (out / source.name).write_text(text)
    written = [str(out / source.name) for source in sources]
    if as_json:
        print_json(written)
    else:
        print(*written, sep="\n")
    return 0


@app.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), default="bash")
def completion(shell: str) -> int:
    """Print the completion script of a shell: eval "$(atropos-hpc completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(app, {}, "atropos-hpc", "_ATROPOS_HPC_COMPLETE").source())
    return 0


if __name__ == "__main__":
    sys.exit(main())
