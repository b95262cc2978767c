"""`status` as people see it: one screen per run, one line per point of a sweep."""

import math
from collections import Counter, defaultdict
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atropos_hpc.observe.report import best, varying

MANY = 8  # members of one kind that are still shown one by one
LONG_WAIT_S = 60.0
STYLES = {"running": "green", "complete": "bold green", "starting": "cyan", "queued": "yellow", "requeued": "yellow", "stopped": "yellow",
          "cancelled": "yellow", "failed": "bold red", "lost": "bold red"}  # fmt: skip
ADVICE = {
    "lost": "no process is left, and none said goodbye: `atropos-hpc resume {run}` goes on from step {durable}",
    "failed": "`atropos-hpc logs {run} supervisor` says why; `atropos-hpc resume {run}` goes on from step {durable}",
    "stopped": "`atropos-hpc resume {run}` goes on from step {durable}",
    "requeued": "saved, and handed back to Slurm, which starts it again",
    "complete": "`atropos-hpc report {run}` draws it",
}


def draw(status: dict[str, Any]) -> RenderableType:
    """Either kind of status."""
    return _sweep(status) if "points" in status else _run(status)


def _run(status: dict[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_head(status)]
    if status["step"] and status["steps"]:
        parts.append(ProgressBar(total=status["steps"], completed=status["step"], width=72))
    if status["step"]:
        parts += [Text(), _figures(status)]
    if status["members"]:
        parts += [Text(), _members(status["members"])]
    waits = [wait for wait in status["waits"] if wait["for_s"] >= 1]
    if waits:
        lines = sorted(
            ((w["who"], f"{w['what']}, from {w['whom']}", w["for_s"]) for w in waits),
            key=lambda line: -line[2],
        )
        shown = [
            f"  {who} waits for {what}, for {duration(seconds)}"
            for who, what, seconds in lines[:MANY]
        ]
        if len(lines) > MANY:
            shown.append(f"  and {len(lines) - MANY} more")
        parts += [Text(), Text("who waits for whom", style="bold"), *(Text(line) for line in shown)]
    if status["warnings"]:
        parts += [Text(), Text("last warnings", style="bold")]
        for each in status["warnings"]:
            said = f"  {each['time'][11:]} {each['log'].removesuffix('.log')}: {each['message']}"
            parts.append(
                Text(
                    said,
                    overflow="ellipsis",
                    no_wrap=True,
                    style="red" if each["level"] != "W" else "",
                )
            )
    return Group(*parts)


def _head(status: dict[str, Any]) -> RenderableType:
    state, job = status["state"], status["job"]
    head = Text.assemble((status["run_dir"], "bold"), "  ", (state, STYLES.get(state, "")))
    if status["steps"] is not None:
        head.append(f"  step {status['step']:,} of {status['steps']:,}")
    if status["eta_s"] is not None:
        head.append(
            f"  {duration(status['eta_s'])} to go at {status['seconds_per_step']:.2f} s per step"
        )
    if job:
        head.append(f"  job {job}" + (f" ({status['slurm']})" if status["slurm"] else ""))
    if status["attempts"] > 1:
        head.append(f"  attempt {status['attempts']}")
    advice = ADVICE.get(state)
    if advice is None:
        return head
    return Group(
        head,
        Text(
            advice.format(run=status["run_dir"], durable=status["versions"]["durable"] or 0),
            style="dim",
        ),
    )


def _figures(status: dict[str, Any]) -> Table:
    figures, queue, versions, rates = (
        status[key] for key in ("figures", "queue", "versions", "tokens_per_s")
    )
    evaluation = status["evaluation"]
    held_out = (
        f"{evaluation['accuracy']:.3f} at version {evaluation['version']}" if evaluation else "-"
    )
    shares = "  ".join(f"{name} {share:.0%}" for name, share in status["time_shares"].items())
    served = "-" if versions["served"] is None else versions["served"]
    published = "-" if versions["published"] is None else versions["published"]
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("reward", f"{number(figures['reward'])}    held-out accuracy {held_out}"),
        ("KL to the reference", f"{number(figures['kl'])}    entropy {number(figures['entropy'])}    "
                                f"response length {number(figures['response_length'])} tokens"),
        ("staleness", f"{number(figures['staleness_mean'])} versions on average, {number(figures['staleness_max'])} at most, "
                      f"{number(figures['dropped_as_stale'])} groups dropped"),
        ("versions", f"learner {versions['learner']}, published {published}, served {served}, durable {versions['durable'] or 0}"),
        ("queue", f"{number(queue['sequences'])} sequences wait, {queue['groups_under_way']} groups under way"),
        ("tokens/s", f"trainer {number(rates['trainer'])}    rollout {number(rates['rollout'])}"),
        ("learner's time", shares),
    ):  # fmt: skip
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _members(members: list[dict[str, Any]]) -> Table:
    """One line each; of a kind with many, one line in all, and those that need a look."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("member", "node", "state", "age", "last beat", "version", ""):
        table.add_column(column, no_wrap=True)
    kinds = defaultdict(list)
    for member in members:
        kinds[member["kind"]].append(member)
    for kind, of in kinds.items():
        shown = of if len(of) <= MANY else [member for member in of if _needs_a_look(member)][:MANY]
        if len(of) > MANY:
            states = ", ".join(
                f"{count} {state}"
                for state, count in Counter(member["state"] for member in of).most_common(4)
            )
            versions = [member["version"] for member in of if member["version"] is not None]
            span = (
                ""
                if not versions
                else f"{min(versions)}"
                if min(versions) == max(versions)
                else f"{min(versions)}-{max(versions)}"
            )
            nodes = len({member["node"] for member in of})
            silent = max(
                (member["silent_s"] for member in of if member["state"] not in ("ended", "gone")),
                default=0.0,
            )
            oldest = max(member["age_s"] for member in of)
            table.add_row(
                f"{kind} x {len(of)}",
                f"{nodes} nodes",
                states,
                duration(oldest),
                duration(silent),
                span,
                _about(of),
            )
        for member in shown:
            style = {"silent": "bold red", "gone": "red", "ended": "dim"}.get(member["state"], "")
            version = "" if member["version"] is None else str(member["version"])
            table.add_row(member["name"], member["host"], Text(member["state"], style=style), duration(member["age_s"]),
                          "" if member["state"] == "ended" else duration(member["silent_s"]), version, _about([member]))  # fmt: skip
    return table


def _needs_a_look(member: dict[str, Any]) -> bool:
    wait = member["waiting"]
    return (
        member["state"] in ("silent", "starting", "starting servers")
        or bool(member["error"])
        or bool(wait)
    )


def _about(members: list[dict[str, Any]]) -> str:
    """What there is to say of them besides: servers, groups under way, what went wrong."""
    said = []
    servers = [member["servers"] for member in members if member["servers"]]
    if sum(s["of"] for s in servers):
        said.append(
            f"{sum(s['serving'] for s in servers)} of {sum(s['of'] for s in servers)} servers serve"
        )
    if any(member["in_flight"] for member in members):
        said.append(f"{sum(member['in_flight'] or 0 for member in members)} groups under way")
    if sent := sum(member["sent"] or 0 for member in members):
        said.append(f"{sent:,} sent")
    said += [str(member["error"]) for member in members if member["error"]][:1]
    return ", ".join(said)


def _sweep(status: dict[str, Any]) -> RenderableType:
    rows = status["points"]
    top = best(rows)
    counts = Counter(row["state"] for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in (
        "point",
        "state",
        "step",
        "to go",
        "reward",
        "accuracy",
        "KL",
        "stale",
        "tokens/s",
        "job",
        "overrides",
    ):
        table.add_column(column, no_wrap=column != "overrides")
    for row, overrides in zip(rows, varying([row["overrides"] for row in rows]), strict=True):
        figures = (
            number(row[key]) for key in ("reward", "accuracy", "kl", "staleness", "tokens_per_s")
        )
        step = f"{row['step']:,}/{'?' if row['steps'] is None else format(row['steps'], ',')}"
        what = " ".join(overrides) or row["run_dir"].rpartition("/")[2]
        table.add_row(Text(f"{row['point']}", style="bold" if row is top else ""), Text(row["state"], style=STYLES.get(row["state"], "")),
                      step, "" if row["eta_s"] is None else duration(row["eta_s"]), *figures, row["job"] or "",
                      what + ("  (best so far)" if row is top else ""))  # fmt: skip
    head = Text.assemble(
        (status["sweep"], "bold"),
        "  ",
        ", ".join(f"{count} {state}" for state, count in counts.most_common()),
    )
    return Group(head, Text(), table)


def number(value: float | None) -> str:
    """Three significant digits, whole thousands in full.

    >>> number(0.12345), number(1234567.8), number(3.0), number(None)
    ('0.123', '1,234,568', '3', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time that people read at a glance.

    >>> duration(4.2), duration(200), duration(7300), duration(200000)
    ('4 s', '3 min', '2 h 2 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
