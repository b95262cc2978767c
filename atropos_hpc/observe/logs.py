"""The logs of a run's members: their ends, and what is added to them while one watches."""

import sys
import time
from pathlib import Path

from atropos_hpc.observe import report
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, read_json

LOOK_S = 0.5


def show(run: RunDir, member: str, follow: bool, lines: int, attempt: int | None) -> int:
    """Print the ends of the logs whose names begin with `member` ("": all), with -f until interrupted, or the run is complete.

    1: there is none.
    """
    folder = run.logs if attempt is None else run.path / "logs" / f"attempt-{attempt}"
    found = matching(folder, member)
    if not found and not follow:
        if not folder.exists():
            there = (
                ", ".join(path.name.removeprefix("attempt-") for path in report.attempts(run))
                or "none"
            )
            print(f"{run.path} has no attempt {attempt}; there are: {there}", file=sys.stderr)
            return 1
        known = ", ".join(sorted(path.name.removesuffix(".log") for path in folder.glob("*.log")))
        print(
            f"{folder} has no log of {member or 'anybody'}"
            + (f"; it has {known}" if known else ""),
            file=sys.stderr,
        )
        return 1
    at: dict[Path, int] = {}
    for path in found:
        at[path] = path.stat().st_size
        end = process.tail(path, lines) if lines > 0 else ""
        _print(path, end, one=len(found) == 1 and not follow)
    over = False
    while follow and not over:
        over = bool(read_json(run.done)) and not report.is_held(
            run
        )  # before the last look: what is said meanwhile is not missed
        time.sleep(0 if over else LOOK_S)
        for path in matching(folder, member):
            before = at.get(path, 0)
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(min(before, size))
                new = file.read().rpartition(b"\n")[0]
            at[path] = min(before, size) + len(new) + (1 if new else 0)
            _print(path, new.decode(errors="replace"), one=False)
    return 0


def matching(folder: Path, member: str) -> list[Path]:
    """The logs in `folder` whose names are `member`, or begin with it. Of a new attempt, once `folder`, a link, points there."""
    folder = folder.resolve()
    exact = folder / f"{member}.log"
    if exact.exists():
        return [exact]
    return sorted(path for path in folder.glob("*.log") if path.name.startswith(member))


def _print(path: Path, text: str, one: bool) -> None:
    """Its lines, each with whose it is, unless there is only one log."""
    prefix = "" if one else f"{path.name.removesuffix('.log')} | "
    for line in text.splitlines():
        print(f"{prefix}{line}", flush=True)
