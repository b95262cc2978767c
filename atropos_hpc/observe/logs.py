"""Print the logs of a run's members: their last lines, and new lines as they are written."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.observe import report
from atropos_hpc.runtime import masking, process
from atropos_hpc.runtime.run_dir import RunDir, read_json

POLL_S = 0.5


@dataclass(frozen=True)
class LogOptions:
    """What of which logs to print."""

    member: str = ""  # the beginning of the logs' names; "": all
    follow: bool = False
    lines: int = 20
    attempt: int | None = None


def show(run: RunDir, options: LogOptions) -> int:
    """Print the last lines of a run's logs; with `follow`, new lines until the run is complete.

    Returns 1 if there is no such log.
    """
    member, attempt = options.member, options.attempt
    run.learn_secrets()
    folder = run.logs if attempt is None else run.path / "logs" / f"attempt-{attempt}"
    found = matching(folder, member)
    if not found and not options.follow:
        print(_missing(run, folder, member, attempt), file=sys.stderr)
        return 1
    offsets: dict[Path, int] = {}
    for path in found:
        offsets[path] = path.stat().st_size
        if options.lines > 0:
            prefixed = len(found) > 1 or options.follow
            _print(path, process.tail(path, options.lines), prefixed)
    complete = False
    while options.follow and not complete:
        # Checked before the last look, so that no line written meanwhile is missed.
        complete = bool(read_json(run.done)) and not report.is_held(run)
        time.sleep(0 if complete else POLL_S)
        for path in matching(folder, member):
            _print(path, _new_lines(path, offsets), prefixed=True)
    return 0


def show_points(points: Sequence[SweepPoint], lines: int) -> int:
    """Print the last lines of the supervisor's log of every point of a sweep; of a point whose run
    never began, of its job's log."""
    for point in points:
        run = RunDir(Path(point.run_dir))
        run.learn_secrets()
        print(f"--- point {point.num}, {point.run_dir}")
        path = run.logs / "supervisor.log"
        text = process.tail(path, lines) if path.exists() else _job_log(point, lines)
        print(text, flush=True)
    return 0


def show_point(point: SweepPoint, options: LogOptions) -> int:
    """Print the logs of one run, or that of its job if the run never began."""
    run = RunDir(Path(point.run_dir))
    if options.follow or run.attempts():
        return show(run, options)
    print(_job_log(point, options.lines))
    return 0


def _job_log(point: SweepPoint, lines: int) -> str:
    if found := report.job_log(point, lines):
        return "\n".join([f"the run never began; the log of its job, {point.log}:", *found])
    job = f"; job {point.job} has written no log yet" if point.job else ""
    return f"{point.run_dir} has no logs{job}"


def _missing(run: RunDir, folder: Path, member: str, attempt: int | None) -> str:
    if not folder.exists():
        known = [path.name.removeprefix("attempt-") for path in run.attempts()]
        return f"{run.path} has no attempt {attempt}; there are: {', '.join(known) or 'none'}"
    names = ", ".join(sorted(path.name.removesuffix(".log") for path in folder.glob("*.log")))
    return f"{folder} has no log of {member or 'any member'}" + (
        f"; it has {names}" if names else ""
    )


def _new_lines(path: Path, offsets: dict[Path, int]) -> str:
    """Return the whole lines written since the last call; start over if the file shrank."""
    before = offsets.get(path, 0)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(min(before, size))
        new = file.read().rpartition(b"\n")[0]
    offsets[path] = min(before, size) + len(new) + (1 if new else 0)
    return masking.mask(new.decode(errors="replace"), masking.known_values())


def matching(folder: Path, member: str) -> list[Path]:
    """Return the log named `member`, or those whose names begin with it.

    `folder` may be a link, which points to a new attempt once one has started.
    """
    folder = folder.resolve()
    exact = folder / f"{member}.log"
    if exact.exists():
        return [exact]
    return sorted(path for path in folder.glob("*.log") if path.name.startswith(member))


def _print(path: Path, text: str, prefixed: bool) -> None:
    prefix = f"{path.name.removesuffix('.log')} | " if prefixed else ""
    for line in text.splitlines():
        print(f"{prefix}{line}", flush=True)
