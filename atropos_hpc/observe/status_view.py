"""The status as people see it: one screen for a run, one line for each point of a sweep."""

import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atropos_hpc.contracts.members import AgentState, EnvironmentState, TrainerState
from atropos_hpc.contracts.metrics import EvaluationSummary
from atropos_hpc.contracts.status import ENDED, MemberStatus, RunStatus, Status, SweepStatus
from atropos_hpc.observe.report import best, varying
from atropos_hpc.observe.status import served_version
from atropos_hpc.runtime import shell

MANY = 8  # members of one kind that are still shown one by one
SHORT_ERROR = 60  # characters of an error in the table of members
BARS = "▁▂▃▄▅▆▇█"  # of a sparkline
SHORT_WAIT_S = 1.0  # waits below are not shown
STYLES = {
    **{"running": "green", "complete": "bold green", "starting": "cyan", "ended": "dim"},
    **dict.fromkeys(("queued", "requeued", "stopped", "cancelled"), "yellow"),
    **dict.fromkeys(("failed", "lost", "silent", "gone"), "bold red"),
}
ADVICE = {
    "lost": "no process is left and no outcome was recorded: `{resume}` resumes "
    "from step {durable}",
    "failed": "`{logs}` shows the cause; `{resume}` resumes from step {durable}",
    "stopped": "`{resume}` resumes from step {durable}",
    "requeued": "saved and requeued; Slurm starts it again",
    "complete": "`{report}` draws the report",
}

NOT_BEGUN = "its job has ended before the run began: `{resume}` submits it again"


def draw(status: Status) -> RenderableType:
    return _sweep(status) if isinstance(status, SweepStatus) else _run(status)


def _run(status: RunStatus) -> RenderableType:
    parts: list[RenderableType] = [_head(status)]
    if status.step and status.steps:
        parts.append(ProgressBar(total=status.steps, completed=status.step, width=72))
    if status.step:
        parts += [Text(), _metrics(status)]
    if status.members:
        parts += [Text(), _members(status.members)]
    parts += list(_losses(status.members))
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
    if status.job_log:
        parts += [Text(), Text("the run never began; the end of its job's log", style="bold")]
        parts += [Text(f"  {line}") for line in status.job_log]
    if status.warnings:
        parts += [Text(), Text("last warnings", style="bold")]
    for warning in status.warnings:
        line = f"  {warning.time[11:]} {warning.log.removesuffix('.log')}: {warning.message}"
        style = "red" if warning.level != "W" else ""
        parts.append(Text(line, overflow="ellipsis", no_wrap=True, style=style))
    return Group(*parts)


def _losses(members: Sequence[MemberStatus]) -> Iterator[RenderableType]:
    """Describe the groups that environment workers could not send, by reason."""
    workers = [each.member for each in members if isinstance(each.member, EnvironmentState)]
    counts: Counter[tuple[str, str]] = Counter()
    texts = {}
    for worker in workers:
        for reason in worker.reasons:
            counts[worker.environment, reason.kind] += reason.count
            texts[worker.environment, reason.kind] = reason.text
    if counts:
        yield Text()
        yield Text("groups that were not trained on", style="bold")
    for key, count in counts.most_common(MANY):
        kind = key[1].replace("_", " ")
        yield Text(f"  {count:,} of {key[0]}, {kind}: {texts[key]}")


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
    parts: list[RenderableType] = [head]
    if status.error is not None:
        parts.append(Text(status.error, style="red"))
    begun = status.state not in ENDED or status.attempts > 0
    advice = ADVICE.get(status.state) if begun else NOT_BEGUN
    if advice is not None:
        parts.append(Text(_advice(advice, status), style="dim"))
    return Group(*parts)


def _advice(advice: str, status: RunStatus) -> str:
    commands = {
        name: shell.printed("atropos-hpc", name, status.run_dir) for name in ("resume", "report")
    }
    logs = shell.printed("atropos-hpc", "logs", status.run_dir, "supervisor")
    return advice.format(**commands, logs=logs, durable=status.versions.durable or 0)


def _prompts(status: RunStatus) -> dict[str, str]:
    """Return a row about the prompts of each environment."""

    def row(name: str) -> str:
        def count(what: str) -> str:
            return number(status.metrics.get(f"prompts/{name}/{what}"))

        epoch = "" if count("epoch") == "-" else f"epoch {count('epoch')}, "
        return (
            f"{epoch}{count('drawn')} drawn, {count('outstanding')} outstanding, "
            f"{count('returned')} to be drawn again, {count('no_signal')} without signal"
        )

    names = [key.split("/")[1] for key in status.metrics if re.fullmatch("prompts/.*/drawn", key)]
    return {f"prompts of {name}": row(name) for name in names}


def _evaluation(evaluation: EvaluationSummary | None) -> str:
    if evaluation is None:
        return "-"
    others = [f"{name} {number(value)}" for name, value in evaluation.metrics.items()]
    return "    ".join([f"{evaluation.accuracy:.3f} at version {evaluation.version}", *others])


def _metrics(status: RunStatus) -> Table:
    def metric(name: str) -> str:
        return number(status.metrics.get(name))

    versions, shares, steps = status.versions, status.time_shares.items(), status.recent["step_s"]
    rows = {
        "reward": f"{metric('reward/mean')}    {sparkline(status.recent['reward'])}",
        "seconds per step": f"{number(steps[-1])}    {sparkline(steps)}",
        "held-out accuracy": _evaluation(status.evaluation),
        "KL to the reference": f"{metric('kl_reference')}    entropy {metric('entropy')}    "
        f"response length {metric('response_length_mean')} tokens",
        "staleness": f"{metric('off_policy/staleness_mean')} versions on average, at most "
        f"{metric('off_policy/staleness_max')}, {metric('dropped_as_stale')} groups dropped",
        "versions": f"learner {versions.learner}, published {number(versions.published)}, "
        f"served {number(versions.served)}, durable {versions.durable or 0}",
        "queue": f"{number(status.queued_sequences)} sequences queued, "
        f"{status.groups_in_flight} groups in flight",
        **_prompts(status),
        "tokens/s": f"trainer {number(status.trained_tokens_per_s)}    "
        f"rollout {number(status.generated_tokens_per_s)}    per GPU "
        f"{metric('perf/throughput_per_gpu')} and {metric('perf/rollout/throughput_per_gpu')}",
        "trainer's devices": f"MFU of the update {metric('perf/mfu')}    "
        f"peak memory {metric('perf/peak_memory_gib')} GiB",
        "learner's time": "  ".join(f"{phase} {share:.0%}" for phase, share in shares),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _members(members: Sequence[MemberStatus]) -> Table:
    """Draw a line per member; of a kind with many, one line for all and those that need a look."""
    table = _table("member", "node", "state", "age", "last beat", "peak GiB", "version", "")
    kinds = defaultdict(list)
    for shown in members:
        kinds[shown.member.kind].append(shown)
    for kind, every in kinds.items():
        if len(every) > MANY:
            table.add_row(*_kind_row(kind, every))
            every = [shown for shown in every if _needs_a_look(shown)][:MANY]
        for shown in every:
            table.add_row(
                shown.member.name,
                shown.member.host,
                Text(shown.state, style=STYLES.get(shown.state, "")),
                duration(shown.age_s),
                "" if shown.state == "ended" else duration(shown.silent_s),
                _gib(shown.member.peak_bytes),
                _versions([shown]),
                _details([shown]),
            )
    return table


def _kind_row(kind: str, members: Sequence[MemberStatus]) -> tuple[str, ...]:
    counts = Counter(shown.state for shown in members).most_common(4)
    silent = [shown.silent_s for shown in members if shown.state not in ("ended", "gone")]
    return (
        f"{kind} x {len(members)}",
        f"{len({shown.member.node for shown in members})} nodes",
        ", ".join(f"{count} {state}" for state, count in counts),
        duration(max(shown.age_s for shown in members)),
        duration(max(silent, default=0.0)),
        _gib(max(shown.member.peak_bytes for shown in members)),
        _versions(members),
        _details(members),
    )


def _needs_a_look(shown: MemberStatus) -> bool:
    troubled = shown.state in ("silent", "starting", "starting servers")
    return troubled or bool(shown.member.error) or shown.member.waiting is not None


def _versions(members: Sequence[MemberStatus]) -> str:
    """Return the range of the versions that the members train or serve."""
    states = [shown.member for shown in members]
    versions = [m.step if isinstance(m, TrainerState) else served_version(m) for m in states]
    known = [version for version in versions if version is not None]
    return "-".join(map(str, sorted({min(known), max(known)}))) if known else ""


def _details(members: Sequence[MemberStatus]) -> str:
    """Describe servers, groups in flight and errors."""
    agents = [each.member for each in members if isinstance(each.member, AgentState)]
    workers = [each.member for each in members if isinstance(each.member, EnvironmentState)]
    details = []
    if servers := [server for agent in agents for server in agent.servers]:
        serving = sum(server.version is not None for server in servers)
        details.append(f"{serving} of {len(servers)} servers serve")
    if peak := max((each for a in agents for each in a.server_peaks.values()), default=0):
        details.append(f"{_gib(peak)} GiB peak of a server")
    if in_flight := sum(worker.in_flight or 0 for worker in workers):
        details.append(f"{in_flight} groups in flight")
    if sent := sum(worker.sent or 0 for worker in workers):
        details.append(f"{sent:,} sent")
    if kept := sum(worker.continued_tokens or 0 for worker in workers):
        details.append(f"{kept:,} tokens of interrupted answers kept")
    if lost := sum(worker.regenerated_tokens or 0 for worker in workers):
        details.append(f"{lost:,} generated again")
    errors = [shown.member.error for shown in members if shown.member.error]
    details += [textwrap.shorten(error, SHORT_ERROR) for error in errors[:1]]
    return ", ".join(details)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size else ""


def _sweep(status: SweepStatus) -> RenderableType:
    rows, top = status.points, best(status.points)
    metrics = ("reward", "accuracy", "KL", "stale", "tokens/s")
    table = _table("point", "state", "step", "left", *metrics, "job", "overrides")
    table.columns[-1].no_wrap = False
    for row, overrides in zip(rows, varying([row.overrides for row in rows]), strict=True):
        job = row.job or ""
        if row.state in ENDED and not row.begun:
            job += " (ended before the run began: `atropos-hpc logs` shows why)"
        label = " ".join(overrides) or row.run_dir.rpartition("/")[2]
        values = (row.reward, row.accuracy, row.kl, row.staleness, row.tokens_per_s)
        table.add_row(
            Text(str(row.point), style="bold" if row is top else ""),
            Text(row.state, style=STYLES.get(row.state, "")),
            f"{row.step:,}/{'?' if row.steps is None else format(row.steps, ',')}",
            "" if row.eta_s is None else duration(row.eta_s),
            *map(number, values),
            job,
            Text(label + ("  (best so far)" if row is top else "")),
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


def sparkline(values: Sequence[float | None]) -> str:
    """Draw values as bars between the smallest and the largest; a space where there is none.

    >>> sparkline([1.0, 2.0, None, 8.0]), sparkline([3.0, 3.0]), sparkline([None])
    ('▁▂ █', '▁▁', ' ')
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, top = min(known, default=0.0), len(BARS) - 1
    span = max(known, default=0.0) - low or 1.0
    return "".join(
        " "
        if value is None or not math.isfinite(value)
        else BARS[round((value - low) / span * top)]
        for value in values
    )


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
