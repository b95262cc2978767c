"""The points of a run or a sweep as a table, from run directories and the state of their jobs.

Nothing that grows with a run is read whole: files that grow are read from their ends.
"""

import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil

from atropos_hpc.contracts.members import AttemptRecord, Done, Holder
from atropos_hpc.contracts.metrics import (
    Evaluation,
    EvaluationSummary,
    StepMetrics,
    SweepPoint,
    evaluation_metrics,
)
from atropos_hpc.contracts.status import PointStatus, RunState
from atropos_hpc.runtime import process, slurm
from atropos_hpc.runtime.membership import DEAD_S
from atropos_hpc.runtime.run_dir import RunDir, last_records, read_struct

RECENT = 50  # steps that count for the pace of a run
FINAL = 0.1  # the last part of the steps, over which a final value is averaged
SUBMITIT_LINES = 30  # at most, that submitit adds to a log when the run was refused
CLOCK_STEP_S = 60.0  # by which a clock may be set while a run goes on
COLUMNS = ["", "point", "state", "step", "reward", "accuracy", "kl", "overrides", "run directory"]

# Job id -> state in the queue; None: Slurm has forgotten it. Jobs not queried are missing.
JobStates = Mapping[str, str | None]
QueryJobs = Callable[[Iterable[str | None]], JobStates]


class NotARunError(Exception):
    """The directory is neither a run's nor a sweep's; the message says what it is instead."""


# --- which runs


def is_run(directory: Path) -> bool:
    """Tell a run directory from others. run.json appears only once the base model exists."""
    return (directory / "run.json").exists() or (
        (directory / "secret").exists() and (directory / "rendezvous").is_dir()
    )


def find_points(directory: Path) -> list[SweepPoint]:
    """Return the points in a sweep's jobs.json, or one for each run at or below `directory`.

    A run that belongs to a sweep is described by the sweep's table.
    """
    if points := sweep_table(directory):
        return points
    if is_run(directory) or row_of(directory) is not None:
        return [_point_of(directory, 0)]
    runs = sorted((path.parent for path in directory.glob("*/run.json")), key=_numeric_order)
    return [_point_of(run, num) for num, run in enumerate(runs)]


def require_points(directory: Path) -> list[SweepPoint]:
    """Return `find_points`; raise NotARunError where there are none."""
    if row_of(directory) is not None:  # a queued point has no directory yet
        return find_points(directory)
    if not directory.exists():
        raise NotARunError(f"{directory} does not exist")
    if not directory.is_dir():
        raise NotARunError(
            f"{directory} is a file; give the directory of a run (run_dir=...) or of a sweep"
        )
    if points := find_points(directory):
        return points
    content = "holds no jobs.json and no run.json, here or one level below"
    if not any(directory.iterdir()):
        content = "is empty"
    raise NotARunError(f"{directory} {content}: it is neither a run's directory nor a sweep's")


def sweep_table(directory: Path) -> list[SweepPoint]:
    """Return the rows of a sweep's jobs.json; [] without one."""
    rows = read_struct(directory / "jobs.json", list[SweepPoint]) or []
    here = paths_in(directory, [row.run_dir for row in rows])
    return [
        msgspec.structs.replace(row, run_dir=here(row.run_dir), log=row.log and here(row.log))
        for row in rows
    ]


def paths_in(directory: Path, run_dirs: Sequence[str]) -> Callable[[str], str]:
    """Return what translates the recorded paths of a sweep, whose directory may since have been
    moved, or copied to another machine. `run_dirs`: the recorded ones of all points."""
    if not run_dirs:
        return str
    recorded = Path(os.path.commonpath([Path(path).parent for path in run_dirs]))
    if recorded.resolve().is_relative_to(directory.resolve()):
        return str

    def translate(path: str) -> str:
        below = Path(path).is_relative_to(recorded)
        return str(directory.absolute() / Path(path).relative_to(recorded)) if below else path

    return translate


def row_of(run: Path) -> SweepPoint | None:
    """Return the row of a run in the table of its sweep, the directory above it."""
    place = run.resolve()
    rows = sweep_table(place.parent)
    return next((row for row in rows if Path(row.run_dir).resolve() == place), None)


def is_point(directory: Path, points: Sequence[SweepPoint]) -> bool:
    """Tell whether `find_points(directory)` is about one run, and not about a sweep."""
    return len(points) == 1 and Path(points[0].run_dir).resolve() == directory.resolve()


def _point_of(run: Path, num: int) -> SweepPoint:
    """Describe a run by its row in the sweep's table, and the job of its latest start."""
    holder = read_struct(RunDir(run).holder, Holder)
    job = holder.job if holder is not None else None
    row = row_of(run)
    if row is None:
        return SweepPoint(num, [], str(run), job=job)
    if holder is None or holder.since < (row.submitted or 0.0):  # it was submitted again since
        job = row.job
    return msgspec.structs.replace(row, job=job or row.job)


def _numeric_order(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else -1, path.name)


# --- the state of a run


def run_state(point: SweepPoint, jobs: JobStates, steps: int | None, trained: bool) -> RunState:
    """Return the state of a run, from its files and the state of its job."""
    run = RunDir(Path(point.run_dir))
    done = read_struct(run.done, Done)
    if done is not None and (steps is None or done.version >= steps):
        return "complete"
    known_to_slurm = point.job in jobs
    state = jobs.get(point.job or "")
    if state in slurm.PENDING:
        return "queued"
    if slurm.holds_nodes(state) or (not known_to_slurm and is_held(run)):
        return "running" if trained else "starting"
    if state == "CANCELLED":
        return "cancelled"
    attempt, record = run.attempts()[-1:], last_attempt(run)
    outcome = record.outcome if record is not None else None
    if outcome == "stop":
        return "stopped"
    if outcome == "requeue" and not known_to_slurm:
        return "requeued"
    if outcome == "fail" or state is not None:
        return "failed"
    return "lost" if attempt or known_to_slurm else "queued"


def job_log(point: SweepPoint, lines: int) -> list[str]:
    """Return the last lines of the log of the job of a point whose run has never begun.

    Without submitit's traceback of a refused run, which hides why it was refused.
    """
    if point.log is None or RunDir(Path(point.run_dir)).attempts():
        return []
    path = Path(point.log)
    if not path.exists():
        return []
    found = process.tail(path, lines + SUBMITIT_LINES).splitlines()
    errors = [i for i, line in enumerate(found) if line.startswith("submitit ERROR")]
    return found[: errors[0] if errors else None][-lines:] if lines else []


def last_attempt(run: RunDir) -> AttemptRecord | None:
    attempt = run.attempts()[-1:]
    return read_struct(attempt[0] / "attempt.json", AttemptRecord) if attempt else None


def is_held(run: RunDir) -> bool:
    """Tell whether the holder of the run's lock lives; on another host, by the roster's age."""
    holder = read_struct(run.holder, Holder)
    if holder is None:
        return False
    if holder.host == socket.gethostname():
        try:  # after a restart of a container, the same number may be another process's
            began = psutil.Process(holder.pid).create_time() if holder.pid else math.inf
        except psutil.NoSuchProcess:
            return False
        return began < holder.since + CLOCK_STEP_S
    try:
        return time.time() - run.roster.stat().st_mtime < DEAD_S
    except OSError:
        return False


# --- the metrics of a run


def point_status(point: SweepPoint, jobs: JobStates) -> PointStatus:
    run = RunDir(Path(point.run_dir))
    lines = last_records(run.metrics, StepMetrics, RECENT)
    last = lines[-1] if lines else None
    tenth = max(1, int(last.step * FINAL)) if last else 0
    final = lines if tenth <= RECENT else last_records(run.metrics, StepMetrics, tenth)
    final = final[-tenth:] if tenth else []
    # a run may have been resumed with more steps than it was submitted with, and the reverse
    steps = max(filter(None, (point.steps, configured_steps(run))), default=None)
    state = run_state(point, jobs, steps, bool(lines))
    evaluation = last_evaluation(run, last.step if last else 0)
    return PointStatus(
        point=point.num,
        overrides=point.overrides,
        run_dir=point.run_dir,
        job=point.job,
        state=state,
        step=last.step if last else 0,
        steps=steps,
        eta_s=eta(lines, steps) if state == "running" else None,
        reward=mean(final, "reward/mean"),
        accuracy=evaluation.accuracy if evaluation else None,
        kl=mean(final, "kl_reference"),
        staleness=last.get("off_policy/staleness_mean") if last else None,
        tokens_per_s=rate(lines, "tokens"),
        begun=bool(run.attempts()),
    )


def configured_steps(run: RunDir) -> int | None:
    """Return trainer.steps; None before the run has its run.json."""
    info = run.info()
    return info.config.trainer.steps if info is not None else None


def last_evaluation(run: RunDir, step: int) -> EvaluationSummary | None:
    found = summarized(last_records(run.evaluations, Evaluation, RECENT), step)
    return found[-1] if found else None


def evaluated(evaluations: Iterable[Evaluation], step: int) -> list[tuple[Evaluation, float]]:
    """Return the evaluations that have an accuracy, with it, in order of version.

    Those after `step`, the run's last, are left out: training has resumed at an earlier checkpoint.
    It repeats these steps on the same batches, and then they are its own.
    """
    found = ((each, each.accuracy) for each in evaluations if each.version <= step)
    known = [(each, accuracy) for each, accuracy in found if accuracy is not None]
    return sorted(known, key=lambda pair: pair[0].version)


def summarized(evaluations: Iterable[Evaluation], step: int) -> list[EvaluationSummary]:
    """Return what a summary repeats of the evaluations that `evaluated` returns."""
    return [
        EvaluationSummary(each.version, accuracy, each.sequences, evaluation_metrics(each))
        for each, accuracy in evaluated(evaluations, step)
    ]


def mean(lines: Iterable[StepMetrics], name: str) -> float | None:
    """Average a scalar over the steps that have it."""
    known = [value for line in lines if (value := line.get(name)) is not None]
    return statistics.fmean(known) if known else None


def eta(lines: Sequence[StepMetrics], steps: int | None) -> float | None:
    """Estimate the seconds until the last step.

    Uses the median, which a single step with an evaluation in it does not move.
    """
    if not lines or steps is None:
        return None
    return statistics.median(line.step_s for line in lines) * max(0, steps - lines[-1].step)


def steady(lines: Sequence[StepMetrics]) -> Sequence[StepMetrics]:
    """Leave out the first step of each attempt, which includes the wait for the servers."""
    kept = [line for before, line in pairwise(lines) if line.attempt == before.attempt]
    return kept or lines


def rate(lines: Sequence[StepMetrics], name: str) -> float | None:
    """Return a scalar per second of these steps."""
    found = steady(lines)
    known = [(value, line.step_s) for line in found if (value := line.get(name)) is not None]
    seconds = sum(step_s for _, step_s in known)
    return sum(value for value, _ in known) / seconds if seconds else None


# --- the table


def best(rows: Sequence[PointStatus]) -> PointStatus | None:
    """Return the row with the highest held-out accuracy; without any, the highest reward."""
    if known := [row for row in rows if row.accuracy is not None]:
        return max(known, key=lambda row: row.accuracy or 0.0)
    if known := [row for row in rows if row.reward is not None]:
        return max(known, key=lambda row: row.reward or 0.0)
    return None


def table(rows: Sequence[PointStatus]) -> str:
    """Format the rows as aligned text, without the overrides that all points share."""
    top, lines = best(rows), [COLUMNS]
    for row, overrides in zip(rows, varying([row.overrides for row in rows]), strict=True):
        step = f"{row.step}/{'?' if row.steps is None else row.steps}"
        values = (row.reward, row.accuracy, row.kl)
        metrics = ["-" if value is None else f"{value:.4g}" for value in values]
        mark = "best" if row is top else ""
        lines.append(
            [mark, str(row.point), row.state, step, *metrics, " ".join(overrides), row.run_dir]
        )
    return aligned(lines)


def varying(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return each point's overrides without those that all points share.

    >>> varying([["a=1", "b=2"], ["a=1", "b=3"]])
    [['b=2'], ['b=3']]
    """
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [[each for each in point if each not in common] for point in overrides]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Pad cells into columns. Lines are never wrapped, so that the table can be grepped."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
