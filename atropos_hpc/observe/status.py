"""What goes on in a run, or in each point of a sweep, from its files alone: on a login node, while it runs and after a crash.

  1. The directory is told apart: a run, a sweep, or neither.
  2. Of a run: the last lines of its figures, its members' files, the ends of its logs, and Slurm's word on its job where there is one.
  3. `screen` draws that for people; as data it is what --json prints.

Nothing is read whole that grows with the run. Ages are by this machine's clock and the filesystem's.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atropos_hpc.observe import report
from atropos_hpc.runtime.membership import DEAD_S
from atropos_hpc.runtime.run_dir import RunDir, last_lines, read_json

FIGURES = {"reward": "reward", "kl": "kl_reference", "entropy": "entropy", "response_length": "response_length_mean",
           "staleness_mean": "staleness_mean", "staleness_max": "staleness_max", "dropped_as_stale": "dropped_as_stale",
           "grad_norm": "grad_norm", "kl_coef": "kl_coef", "learning_rate": "lr"}  # fmt: skip
# where the learner's time goes, in the words of people; what is not named here is "other"
SHARES = {"waiting for data": ("wait",), "training": ("batch", "log_probs", "update"), "publishing": ("publish",),
          "checkpointing": ("checkpoint",)}  # fmt: skip
WARNINGS = 6
LOGS_BYTES = 1 << 20  # read of all logs together
LOG_BYTES = 1 << 16  # at most of one
_OURS = re.compile(rb"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([WEC]) ([^\n]+)", re.M)
_VLLMS = re.compile(rb"^(?:\([^)\n]*\) )?ERROR (\d\d-\d\d \d\d:\d\d:\d\d) ([^\n]+)", re.M)


def of(directory: Path) -> dict[str, Any]:
    """A run's status, or {"sweep": directory, "points": [...]}. Raises report.NotOne when the directory is neither."""
    points = report.with_job_states(report.found(directory))
    if report.is_run(directory):
        return of_run(points[0])
    return {"sweep": str(directory), "points": [report.row(point) for point in points]}


def of_run(point: dict[str, Any]) -> dict[str, Any]:
    """The status of one run. Figures that are not there yet are None."""
    run = RunDir(Path(point["run_dir"]))
    lines = last_lines(run.metrics, report.RECENT)
    last = lines[-1] if lines else {}
    config = read_json(run.run_json).get("config", {})
    steps = config.get("trainer", {}).get("steps")
    state = report.state_of(run, point, steps, bool(lines))
    evaluations = [
        line
        for line in last_lines(run.evaluations, report.RECENT)
        if line.get("accuracy") is not None
    ]
    members = list(_members(run, going=state in ("running", "starting") or report.is_held(run)))
    accuracy = (
        {key: evaluations[-1][key] for key in ("version", "accuracy", "sequences")}
        if evaluations
        else None
    )
    return {
        "run_dir": str(run.path), "state": state, "job": point["job"], "slurm": point.get("queue"),
        "attempts": len(report.attempts(run)), "holder": read_json(run.holder) or None,
        "step": last.get("step", 0), "steps": steps, "last_step_at": last.get("time"),
        "eta_s": report.eta(lines, steps) if state == "running" else None,
        "seconds_per_step": 1 / pace if (pace := _pace(lines)) else None,
        "figures": {name: last.get(key) for name, key in FIGURES.items()}, "evaluation": accuracy,
        "queue": _queue(members, last), "versions": _versions(run, members, last),
        "tokens_per_s": _rates(lines, members), "time_shares": shares(lines[1:] or lines),
        "members": members, "waits": [_wait(member) for member in members if member["waiting"]], "warnings": warnings(run),
    }  # fmt: skip


def _pace(lines: list[dict[str, Any]]) -> float | None:
    """Steps per second."""
    return report.rate([{**line, "one": 1} for line in lines], "one")


def _members(run: RunDir, going: bool) -> Iterator[dict[str, Any]]:
    """Each member's row, in order of kind and number. `going`: is the run under way? Then one that is silent is said to be."""
    now = time.time()
    order = (
        "supervisor",
        "rollout_job",
        "trajectories",
        "trainer",
        "agent",
        "environment",
        "evaluator",
    )
    rows = []
    for path in run.members.glob("[!.]*.json") if run.members.is_dir() else ():
        try:
            state, beat = json.loads(path.read_bytes()), path.stat().st_mtime
        except (OSError, ValueError):  # replaced or taken away under us; the next look has it
            continue
        silent = now - beat
        shown = state["state"]
        if shown != "ended" and not going:
            shown = "gone"  # its run is over, and it had no time to say goodbye
        elif shown != "ended" and silent > DEAD_S:
            shown = "silent"
        servers = state.get("servers")
        serving = [server["version"] for server in servers or () if server["version"] is not None]
        rows.append({
            "name": state["name"], "kind": state["kind"], "node": state["node"], "host": state["host"], "state": shown,
            "age_s": round((now if going else beat) - state["started"], 1), "silent_s": round(silent, 1),
            "version": min(serving) if serving else state.get("step"),
            "servers": None if servers is None else {"serving": len(serving), "of": len(servers)},
            "waiting": state.get("waiting") if shown not in ("ended", "gone") else None,
            "tokens_per_s": state.get("tokens_per_s"), "in_flight": state.get("in_flight"), "sent": state.get("sent"),
            "queued_sequences": state.get("queued_sequences"), "error": state.get("error"),
        })  # fmt: skip
    yield from sorted(
        rows,
        key=lambda row: (
            order.index(row["kind"]) if row["kind"] in order else len(order),
            _natural(row["name"]),
        ),
    )


def _natural(name: str) -> list[Any]:
    """So that rollout10 comes after rollout9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _wait(member: dict[str, Any]) -> dict[str, Any]:
    wait = member["waiting"]
    return {
        "who": member["name"],
        "what": wait["what"],
        "whom": wait["from_whom"],
        "for_s": round(max(0.0, time.time() - wait["since"]), 1),
    }


def _queue(members: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """Sequences that wait for the learner, as the trajectory server says now, or said at the last step; groups under way."""
    queued = next(
        (
            member["queued_sequences"]
            for member in members
            if member["queued_sequences"] is not None
        ),
        None,
    )
    under_way = [
        member["in_flight"]
        for member in members
        if member["in_flight"] is not None and member["state"] not in ("ended", "gone")
    ]
    return {
        "sequences": last.get("queued_sequences") if queued is None else queued,
        "groups_under_way": sum(under_way),
    }


def _versions(run: RunDir, members: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """Policy versions: the learner's, the newest published, the newest durable, and the oldest that a server still serves."""
    served = [
        member["version"]
        for member in members
        if member["kind"] == "agent" and member["version"] is not None
    ]
    return {"learner": last.get("step", 0), "published": read_json(run.policy / "latest.json").get("version"),
            "durable": read_json(run.checkpoints / "latest.json").get("step"), "served": min(served, default=None)}  # fmt: skip


def _rates(lines: list[dict[str, Any]], members: list[dict[str, Any]]) -> dict[str, float | None]:
    """Tokens per second of each role: trained on, over the last steps; generated, over the environment workers' last seconds."""
    generated = [
        m["tokens_per_s"]
        for m in members
        if m["tokens_per_s"] is not None and m["state"] not in ("ended", "gone", "silent")
    ]
    return {
        "trainer": report.rate(lines, "tokens"),
        "rollout": sum(generated) if generated else None,
    }


def shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What part of the learner's time in these steps went where; the parts add up to 1. {} without steps."""
    whole = sum(line.get("time/step", 0.0) for line in lines)
    if not whole:
        return {}
    found = {
        name: sum(line.get(f"time/{phase}", 0.0) for line in lines for phase in of) / whole
        for name, of in SHARES.items()
    }
    return {
        **{name: round(share, 4) for name, share in found.items()},
        "other": round(max(0.0, 1 - sum(found.values())), 4),
    }


def warnings(run: RunDir) -> list[dict[str, str]]:
    """The last warnings and errors at the ends of the newest attempt's logs, oldest first: {"time", "log", "level", "message"}. Of those
    that differ in numbers only, the newest.
    """
    logs = sorted(run.logs.glob("*.log")) if run.logs.is_dir() else []
    each = min(LOG_BYTES, max(1 << 12, LOGS_BYTES // max(1, len(logs))))
    found = []
    year = time.strftime("%Y")
    for path in logs:
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - each))
                data = file.read()
        except OSError:
            continue
        ours = ((when.decode(), level.decode(), said) for when, level, said in _OURS.findall(data))
        vllms = ((f"{year}-{when.decode()}", "E", said) for when, said in _VLLMS.findall(data))
        found += [{"time": when, "log": path.name, "level": level, "message": said.decode(errors="replace")}
                  for when, level, said in (*ours, *vllms)]  # fmt: skip
    newest = {
        (each["log"], re.sub(r"\d+", "", each["message"])): each
        for each in sorted(found, key=lambda each: each["time"])
    }
    return sorted(newest.values(), key=lambda each: each["time"])[-WARNINGS:]
