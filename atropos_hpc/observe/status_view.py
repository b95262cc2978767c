"""The status as people see it: one screen for a run, one line for each point of a sweep."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atropos_hpc.contracts.status import MemberStatus, RunStatus, Status, SweepStatus
from atropos_hpc.observe.report import best, varying

MANY = 8  # members of one kind that are still shown one by one
SHORT_WAIT_S = 1.0  # waits below are not shown
STYLES = {
    "running": "green",
    "complete": "bold green",
    "starting": "cyan",
    "queued": "yellow",
    "requeued": "yellow",
    "stopped": "yellow",
    "cancelled": "yellow",
    "failed": "bold red",
    "lost": "bold red",
    "silent": "bold red",
    "gone": "red",
    "ended": "dim",
}
ADVICE = {
    "lost": "no process is left and no outcome was recorded: `atropos-hpc resume {run}` resumes "
    "from step {durable}",
    "failed": "`atropos-hpc logs {run} supervisor` shows the cause; `atropos-hpc resume {run}` "
    "resumes from step {durable}",
    "stopped": "`atropos-hpc resume {run}` resumes from step {durable}",
    "requeued": "saved and requeued; Slurm starts it again",
    "complete": "`atropos-hpc report {run}` draws the report",
}


def draw(status: Status) -> RenderableType:
    """Draw either kind of status."""
    return _sweep(status) if isinstance(status, SweepStatus) else _run(status)


def _run(status: RunStatus) -> RenderableType:
    parts: list[RenderableType] = [_head(status)]
    if status.step and status.steps:
        parts.append(ProgressBar(total=status.steps, completed=status.step, width=72))
    if status.step:
        parts += [Text(), _metrics(status)]
    if status.members:
        parts += [Text(), _members(status.members)]
    waits = [wait for wait in status.waits if wait.waited_s >= SHORT_WAIT_S]
    if waits:
        parts += [Text(), Text("waits", style="bold")]
        for wait in sorted(waits, key=lambda wait: -wait.waited_s)[:MANY]:
            waited = duration(wait.waited_s)
            parts.append(
                Text(f"  {wait.member} waits for {wait.what} from {wait.from_whom}, for {waited}")
            )
        if len(waits) > MANY:
            parts.append(Text(f"  and {len(waits) - MANY} more"))
    if status.warnings:
        parts += [Text(), Text("last warnings", style="bold")]
    for warning in status.warnings:
        line = f"  {warning.time[11:]} {warning.log.removesuffix('.log')}: {warning.message}"
        style = "red" if warning.level != "W" else ""
        parts.append(Text(line, overflow="ellipsis", no_wrap=True, style=style))
    return Group(*parts)


def _head(status: RunStatus) -> RenderableType:
    head = Text.assemble(
        (status.run_dir, "bold"), "  ", (status.state, STYLES.get(status.state, ""))
    )
    if status.steps is not None:
        head.append(f"  step {status.step:,} of {status.steps:,}")
    if status.eta_s is not None and status.seconds_per_step is not None:
        pace = f"{status.seconds_per_step:.2f} s per step"
        head.append(f"  {duration(status.eta_s)} left at {pace}")
    if status.job:
        head.append(f"  job {status.job}" + (f" ({status.slurm})" if status.slurm else ""))
    if status.attempts > 1:
        head.append(f"  attempt {status.attempts}")
    advice = ADVICE.get(status.state)
    if advice is None:
        return head
    durable = status.versions.durable or 0
    return Group(head, Text(advice.format(run=status.run_dir, durable=durable), style="dim"))


def _metrics(status: RunStatus) -> Table:
    metrics = {name: number(value) for name, value in status.metrics.items()}
    evaluation, versions, queue = status.evaluation, status.versions, status.queue
    accuracy = f"{evaluation.accuracy:.3f} at version {evaluation.version}" if evaluation else "-"
    rows = {
        "reward": f"{metrics['reward']}    held-out accuracy {accuracy}",
        "KL to the reference": f"{metrics['kl']}    entropy {metrics['entropy']}    "
        f"response length {metrics['response_length']} tokens",
        "staleness": f"{metrics['staleness_mean']} versions on average, "
        f"{metrics['staleness_max']} at most, {metrics['dropped_as_stale']} groups dropped",
        "versions": f"learner {versions.learner}, published {number(versions.published)}, "
        f"served {number(versions.served)}, durable {versions.durable or 0}",
        "queue": f"{number(queue.sequences)} sequences queued, "
        f"{queue.groups_in_flight} groups in flight",
        "tokens/s": f"trainer {number(status.tokens_per_s.trainer)}    "
        f"rollout {number(status.tokens_per_s.rollout)}",
        "learner's time": "  ".join(
            f"{name} {share:.0%}" for name, share in status.time_shares.items()
        ),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _members(members: Sequence[MemberStatus]) -> Table:
    """Draw a line per member; of a kind with many, one line for all and those that need a look."""
    table = _table("member", "node", "state", "age", "last beat", "version", "")
    kinds = defaultdict(list)
    for member in members:
        kinds[member.kind].append(member)
    for kind, all_of_kind in kinds.items():
        shown = all_of_kind
        if len(all_of_kind) > MANY:
            table.add_row(*_kind_row(kind, all_of_kind))
            shown = [member for member in all_of_kind if _needs_a_look(member)][:MANY]
        for member in shown:
            table.add_row(
                member.name,
                member.host,
                Text(member.state, style=STYLES.get(member.state, "")),
                duration(member.age_s),
                "" if member.state == "ended" else duration(member.silent_s),
                "" if member.version is None else str(member.version),
                _details([member]),
            )
    return table


def _kind_row(kind: str, members: Sequence[MemberStatus]) -> tuple[str, ...]:
    counts = Counter(member.state for member in members).most_common(4)
    versions = {member.version for member in members if member.version is not None}
    span = sorted({min(versions), max(versions)}) if versions else []
    present = [member for member in members if member.state not in ("ended", "gone")]
    return (
        f"{kind} x {len(members)}",
        f"{len({member.node for member in members})} nodes",
        ", ".join(f"{count} {state}" for state, count in counts),
        duration(max(member.age_s for member in members)),
        duration(max((member.silent_s for member in present), default=0.0)),
        "-".join(map(str, span)),
        _details(members),
    )


def _needs_a_look(member: MemberStatus) -> bool:
    troubled = member.state in ("silent", "starting", "starting servers")
    return troubled or bool(member.error) or member.wait is not None


def _details(members: Sequence[MemberStatus]) -> str:
    """Describe servers, groups in flight and errors."""
    details = []
    servers = [member.servers for member in members if member.servers is not None]
    if total := sum(each.total for each in servers):
        details.append(f"{sum(each.serving for each in servers)} of {total} servers serve")
    if in_flight := sum(member.in_flight or 0 for member in members):
        details.append(f"{in_flight} groups in flight")
    if sent := sum(member.sent or 0 for member in members):
        details.append(f"{sent:,} sent")
    details += [member.error for member in members if member.error][:1]
    return ", ".join(details)


def _sweep(status: SweepStatus) -> RenderableType:
    rows, top = status.points, best(status.points)
    metrics = ("reward", "accuracy", "KL", "stale", "tokens/s")
    table = _table("point", "state", "step", "left", *metrics, "job", "overrides")
    table.columns[-1].no_wrap = False
    for row, overrides in zip(rows, varying([row.overrides for row in rows]), strict=True):
        label = " ".join(overrides) or row.run_dir.rpartition("/")[2]
        values = (row.reward, row.accuracy, row.kl, row.staleness, row.tokens_per_s)
        table.add_row(
            Text(str(row.point), style="bold" if row is top else ""),
            Text(row.state, style=STYLES.get(row.state, "")),
            f"{row.step:,}/{'?' if row.steps is None else format(row.steps, ',')}",
            "" if row.eta_s is None else duration(row.eta_s),
            *map(number, values),
            row.job or "",
            label + ("  (best so far)" if row is top else ""),
        )
    counts = Counter(row.state for row in rows).most_common()
    states = ", ".join(f"{count} {state}" for state, count in counts)
    return Group(Text.assemble((status.sweep, "bold"), "  ", states), Text(), table)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def number(value: float | None) -> str:
    """Format a number with three significant digits, thousands in full.

    >>> number(0.12345), number(1234567.8), number(3.0), number(None)
    ('0.123', '1,234,568', '3', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a duration in its largest units.

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
