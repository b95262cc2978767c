"""A sweep at a glance: one row per point, from what lies in the run directories and what Slurm says of the jobs."""

import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atropos_hpc.launch.slurm import commands
from atropos_hpc.runtime.membership import DEAD_S
from atropos_hpc.runtime.run_dir import RunDir, last_lines, read_json

RECENT = 50  # steps whose pace counts
FINAL = 0.1  # the last part of the steps, over which a final value is averaged
ENDED = ("complete", "failed", "stopped", "lost", "cancelled")
COLUMNS = ("", "point", "state", "step", "reward", "accuracy", "kl", "overrides", "run directory")


class NotOne(Exception):
    """The directory is neither a run's nor a sweep's; the message says what it is instead."""


def points(directory: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's jobs.json; without one, one row for each run directory at or below `directory`. [] when there is none.

    The row of a run that is a point of a sweep is that of its sweep's table.
    """
    if rows := read_json(directory / "jobs.json"):
        return list(rows)
    runs = (
        [directory]
        if is_run(directory)
        else sorted((path.parent for path in directory.glob("*/run.json")), key=_by_number)
    )
    return [_row(run, num) for num, run in enumerate(runs)]


def _row(run: Path, num: int) -> dict[str, Any]:
    of_sweep = read_json(run.resolve().parent / "jobs.json") or ()
    known: dict[str, Any] = next(
        (row for row in of_sweep if Path(row["run_dir"]).resolve() == run.resolve()), {}
    )
    job = read_json(RunDir(run).holder).get("job")  # who holds it may have come after the sweep
    return {
        "num": num,
        "overrides": [],
        "steps": None,
        "job": job,
        **known,
        "run_dir": str(run),
        **({"job": job} if job else {}),
    }


def found(directory: Path) -> list[dict[str, Any]]:
    """`points`, of a directory that has to have some. Raises NotOne."""
    if not directory.exists():
        raise NotOne(f"there is no {directory}")
    if not directory.is_dir():
        raise NotOne(
            f"{directory} is a file; give the directory of a run (run_dir=...) or of a sweep"
        )
    rows = points(directory)
    if not rows:
        is_what = (
            "is empty"
            if not any(directory.iterdir())
            else "holds no jobs.json and no run.json, here or one level below"
        )
        raise NotOne(f"{directory} {is_what}: it is neither a run's directory nor a sweep's")
    return rows


def is_run(directory: Path) -> bool:
    """Is it a run's directory? run.json comes a little after the rest, once the base model is there."""
    return (directory / "run.json").exists() or (
        (directory / "secret").exists() and (directory / "rendezvous").is_dir()
    )


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else -1, path.name)


def with_job_states(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its job's state in the queue under "queue": None where Slurm does not know the job (any more). No such key
    where Slurm cannot be asked.
    """
    rows = list(rows)
    jobs = [row["job"] for row in rows if row["job"]]
    if not jobs or shutil.which("squeue") is None:
        return rows
    try:
        states = commands.states(jobs)
    except commands.SlurmError:  # the run directories tell the rest
        return rows
    return [{**row, "queue": states.get(row["job"])} for row in rows]


def row(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point. Those that are not there yet are None. Cheap: files that grow are read from their ends.

    Reward and KL are means over the last tenth of the steps, of at most RECENT of them; staleness is the last step's.
    state: queued | requeued | starting | running | complete | failed | stopped | cancelled | lost (no process and no last word).
    """
    run = RunDir(Path(point["run_dir"]))
    lines = last_lines(run.metrics, RECENT)
    evaluations = [e for e in last_lines(run.evaluations, RECENT) if e.get("accuracy") is not None]
    last = lines[-1] if lines else {}
    final = lines[-max(1, int(last.get("step", 0) * FINAL)) :]
    steps = point.get("steps") or read_json(run.run_json).get("config", {}).get("trainer", {}).get(
        "steps"
    )
    state = state_of(run, point, steps, bool(lines))
    return {
        "point": point["num"],
        "overrides": point["overrides"],
        "run_dir": point["run_dir"],
        "job": point["job"],
        "state": state,
        "step": last.get("step", 0),
        "steps": steps,
        "eta_s": eta(lines, steps) if state == "running" else None,
        "reward": mean(final, "reward"),
        "accuracy": evaluations[-1]["accuracy"] if evaluations else None,
        "kl": mean(final, "kl_reference"),
        "staleness": last.get("staleness_mean"),
        "tokens_per_s": rate(lines, "tokens"),
    }


def mean(lines: list[dict[str, Any]], key: str) -> float | None:
    """Of a figure that need not be in every line."""
    known = [line[key] for line in lines if line.get(key) is not None]
    return statistics.fmean(known) if known else None


def eta(lines: list[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds until the last step, at the pace of these; their median, so that one step with an evaluation in it does not count."""
    known = [line["time/step"] for line in lines if "time/step" in line]
    return (
        None
        if not known or steps is None
        else statistics.median(known) * max(0, steps - lines[-1]["step"])
    )


def rate(lines: list[dict[str, Any]], key: str) -> float | None:
    """A figure per second of these steps; the first of a start is left out where there are others: it has the start's waits in it."""
    of = [line for line in lines if key in line and "time/step" in line]
    of = of[1:] or of
    seconds = sum(line["time/step"] for line in of)
    return sum(line[key] for line in of) / seconds if seconds else None


def state_of(run: RunDir, point: dict[str, Any], steps: int | None, trained: bool) -> str:
    """One word for how a run goes, from its files, and Slurm's word ("queue") where the point has it."""
    if (done := read_json(run.done)) and (steps is None or done["version"] >= steps):
        return "complete"
    queue = point.get("queue")
    if queue in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "queued"
    asked = bool(point["job"]) and "queue" in point
    if queue in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED") or (not asked and is_held(run)):
        return "running" if trained else "starting"
    if queue == "CANCELLED":
        return "cancelled"
    attempt = attempts(run)[-1:]
    outcome = read_json(attempt[0] / "attempt.json").get("outcome") if attempt else None
    if outcome in ("stop", "fail"):
        return {"stop": "stopped", "fail": "failed"}[outcome]
    if outcome == "requeue" and not asked:
        return "requeued"
    if queue is not None:
        return "failed"
    return "lost" if attempt or asked else "queued"


def attempts(run: RunDir) -> list[Path]:
    """The log directories of the run's attempts, in order."""
    return sorted(
        (run.path / "logs").glob("attempt-*"),
        key=lambda path: int(path.name.removeprefix("attempt-")),
    )


def is_held(run: RunDir) -> bool:
    """Does the process live that noted itself as the run's holder? On another machine, its roster is fresh."""
    holder = read_json(run.holder)
    if holder.get("host") == socket.gethostname():
        return os.path.exists(f"/proc/{holder.get('pid')}")  # noqa: PTH110
    try:
        return bool(holder) and time.time() - run.roster.stat().st_mtime < DEAD_S
    except OSError:
        return False


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the highest held-out accuracy; where there is none, with the highest reward."""
    for key in ("accuracy", "reward"):
        if known := [each for each in rows if each[key] is not None]:
            return max(known, key=lambda each: each[key])
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text; the best is marked, and of the overrides those are shown that not all points share."""
    top, shown, swept = best(rows), [list(COLUMNS)], varying([each["overrides"] for each in rows])
    for each, overrides in zip(rows, swept, strict=True):
        figures = [
            "-" if each[key] is None else f"{each[key]:.4g}" for key in ("reward", "accuracy", "kl")
        ]
        mark, step = (
            ("best" if each is top else ""),
            f"{each['step']}/{each['steps'] if each['steps'] is not None else '?'}",
        )
        shown.append(
            [
                mark,
                str(each["point"]),
                each["state"],
                step,
                *figures,
                " ".join(overrides),
                each["run_dir"],
            ]
        )
    return aligned(shown)


def varying(overrides: list[list[str]]) -> list[list[str]]:
    """Each point's overrides without those that all points have.

    >>> varying([["a=1", "b=2"], ["a=1", "b=3"]])
    [['b=2'], ['b=3']]
    """
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [[each for each in of if each not in common] for of in overrides]


def aligned(lines: list[list[str]]) -> str:
    """Cells as text in columns, whatever the terminal's width: the table is read by people and by grep."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
