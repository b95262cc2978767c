"""A sweep at a glance: one row per point, from what lies in the run directories and what Slurm says of the jobs."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atropos_hpc.run_dir import RunDir, read_json, read_lines

ENDED = ("complete", "failed", "stopped", "lost", "cancelled")
COLUMNS = ("", "point", "state", "step", "reward", "accuracy", "kl", "overrides", "run directory")


def points(directory: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's jobs.json; without one, one row for each run directory at or below `directory`. [] when there is none."""
    if rows := read_json(directory / "jobs.json"):
        return list(rows)
    runs = [directory] if (directory / "run.json").exists() else sorted(path.parent for path in directory.glob("*/run.json"))
    return [{"num": i, "overrides": [], "run_dir": str(run), "job": None, "steps": None} for i, run in enumerate(runs)]


def with_job_states(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its job's state in the queue under "queue": None when it has none, or Slurm does not know it any more."""
    from atropos_hpc.launch import slurm

    rows = list(rows)
    try:
        states = slurm.states(row["job"] for row in rows if row["job"])
    except slurm.SlurmError:  # no Slurm here: the run directories tell the rest
        states = {}
    return [{**row, "queue": states.get(row["job"])} for row in rows]


def row(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point. Those that are not there yet are None.

    state: queued | starting | running | complete | failed | stopped | cancelled | lost (no process and no last word).
    """
    run = RunDir(Path(point["run_dir"]))
    lines, evaluations = read_lines(run.metrics), [e for e in read_lines(run.evaluations) if e.get("accuracy") is not None]
    last = lines[-1] if lines else {}
    steps = point.get("steps") or read_json(run.run_json).get("config", {}).get("trainer", {}).get("steps")
    return {
        "point": point["num"],
        "overrides": point["overrides"],
        "run_dir": point["run_dir"],
        "job": point["job"],
        "state": _state(run, point, steps, bool(lines)),
        "step": last.get("step", 0),
        "steps": steps,
        "reward": last.get("reward"),
        "accuracy": evaluations[-1]["accuracy"] if evaluations else None,
        "kl": last.get("kl_reference"),
    }


def _state(run: RunDir, point: dict[str, Any], steps: int | None, trained: bool) -> str:
    if (done := read_json(run.done)) and (steps is None or done["version"] >= steps):
        return "complete"
    queue = point.get("queue")
    if queue in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "queued"
    if queue in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED") or (not point["job"] and _held_here(run)):
        return "running" if trained else "starting"
    if queue == "CANCELLED":
        return "cancelled"
    attempts = sorted((run.path / "logs").glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
    outcome = read_json(attempts[-1] / "attempt.json").get("outcome") if attempts else None
    if outcome in ("stop", "fail"):
        return {"stop": "stopped", "fail": "failed"}[outcome]
    if queue is not None:
        return "failed"
    return "lost" if point["job"] or attempts else "queued"


def _held_here(run: RunDir) -> bool:
    """Does the process that noted itself as the run's holder live on this machine?"""
    holder = read_json(run.holder)
    return holder.get("host") == socket.gethostname() and os.path.exists(f"/proc/{holder.get('pid')}")  # noqa: PTH110


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
        figures = ["-" if each[key] is None else f"{each[key]:.4g}" for key in ("reward", "accuracy", "kl")]
        mark, step = ("best" if each is top else ""), f"{each['step']}/{each['steps'] if each['steps'] is not None else '?'}"
        shown.append([mark, str(each["point"]), each["state"], step, *figures, " ".join(overrides), each["run_dir"]])
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
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
