"""The status of a run, or of each point of a sweep, from files: on a login node, during and after it.

  1. Tell whether the directory is a run's or a sweep's.
  2. Of a run, read the last lines of its metrics, the member files, and the ends of the logs.
  3. `status_view` draws the result for people; `--json` prints it.

Nothing that grows with the run is read whole. Ages compare this host's clock with file times.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    EnvironmentState,
    Holder,
    TrainerState,
    TrajectoriesState,
)
from atropos_hpc.contracts.metrics import StepMetrics, SweepPoint
from atropos_hpc.contracts.status import (
    EvaluationStatus,
    LogWarning,
    MemberStatus,
    QueueStatus,
    RunStatus,
    ServerCount,
    Status,
    SweepStatus,
    TokenRates,
    VersionStatus,
    WaitStatus,
)
from atropos_hpc.observe import report
from atropos_hpc.observe.report import JobStates, QueryJobs
from atropos_hpc.runtime.membership import DEAD_S
from atropos_hpc.runtime.run_dir import RunDir, last_records, read_json, read_struct

METRICS = {
    "reward": "reward",
    "kl": "kl_reference",
    "entropy": "entropy",
    "response_length": "response_length_mean",
    "staleness_mean": "staleness_mean",
    "staleness_max": "staleness_max",
    "dropped_as_stale": "dropped_as_stale",
    "grad_norm": "grad_norm",
    "kl_coef": "kl_coef",
    "learning_rate": "lr",
}
ACTIVITIES = {  # what the learner's phases are called here; all others are "other"
    "waiting for data": ("wait",),
    "training": ("batch", "log_probs", "update"),
    "publishing": ("publish",),
    "checkpointing": ("checkpoint",),
}
KINDS = (
    "supervisor",
    "rollout_job",
    "trajectories",
    "trainer",
    "agent",
    "environment",
    "evaluator",
)
WARNINGS = 6
LOGS_BYTES = 1 << 20  # read from all logs together
LOG_BYTES = 1 << 16  # read from one, at most
_OWN_LINE = re.compile(rb"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([WEC]) ([^\n]+)", re.M)
_VLLM_LINE = re.compile(rb"^(?:\([^)\n]*\) )?ERROR (\d\d-\d\d \d\d:\d\d:\d\d) ([^\n]+)", re.M)


def read_status(directory: Path, query_jobs: QueryJobs = lambda jobs: {}) -> Status:
    """Return the status of a run or of a sweep. Raises report.NotARunError."""
    points = report.require_points(directory)
    jobs = query_jobs(point.job for point in points)
    if report.is_run(directory):
        return run_status(points[0], jobs)
    rows = [report.point_status(point, jobs) for point in points]
    return SweepStatus(str(directory), rows)


def run_status(point: SweepPoint, jobs: JobStates) -> RunStatus:
    """Return the status of one run."""
    run = RunDir(Path(point.run_dir))
    lines = last_records(run.metrics, StepMetrics, report.RECENT)
    last = lines[-1] if lines else None
    steps = report.configured_steps(run)
    state = report.run_state(point, jobs, steps, bool(lines))
    members = read_members(run, active=state in ("running", "starting") or report.is_held(run))
    pace = report.steady(lines)
    return RunStatus(
        run_dir=str(run.path),
        state=state,
        job=point.job,
        slurm=jobs.get(point.job or ""),
        attempts=len(report.attempts(run)),
        holder=read_struct(run.holder, Holder),
        step=last.step if last else 0,
        steps=steps,
        last_step_at=last.time if last else None,
        eta_s=report.eta(lines, steps) if state == "running" else None,
        seconds_per_step=sum(line.step_s for line in pace) / len(pace) if pace else None,
        metrics={name: last.get(key) if last else None for name, key in METRICS.items()},
        evaluation=_evaluation(run),
        queue=_queue(members, last),
        versions=_versions(run, members, last),
        tokens_per_s=_token_rates(lines, members),
        time_shares=time_shares(pace),
        members=members,
        waits=[member.wait for member in members if member.wait is not None],
        warnings=log_warnings(run),
    )


def _evaluation(run: RunDir) -> EvaluationStatus | None:
    last = report.last_evaluation(run)
    if last is None or last.accuracy is None:
        return None
    return EvaluationStatus(last.version, last.accuracy, last.sequences)


def read_members(run: RunDir, active: bool) -> list[MemberStatus]:
    """Return every member in order of kind and number.

    `active`: the run is under way, so a member without a heartbeat is "silent" and not "gone".
    """
    found = []
    decoder = msgspec.json.Decoder(AnyMember)
    for path in run.members.glob("[!.]*.json") if run.members.is_dir() else ():
        try:
            member, beat = decoder.decode(path.read_bytes()), path.stat().st_mtime
        except (
            OSError,
            msgspec.MsgspecError,
        ):  # replaced or removed meanwhile; the next look finds it
            continue
        found.append(_member(member, beat, active))

    def order(member: MemberStatus) -> tuple[int, list[int | str]]:
        kind = KINDS.index(member.kind) if member.kind in KINDS else len(KINDS)
        parts = re.split(r"(\d+)", member.name)  # so that rollout10 comes after rollout9
        return kind, [int(part) if part.isdigit() else part for part in parts]

    return sorted(found, key=order)


def _member(member: AnyMember, beat: float, active: bool) -> MemberStatus:
    now = time.time()
    state = member.state
    if state != "ended" and not active:
        state = "gone"  # the run is over, and the process had no time to leave
    elif state != "ended" and now - beat > DEAD_S:
        state = "silent"
    shown = MemberStatus(
        name=member.name,
        kind=member.kind,
        node=member.node,
        host=member.host,
        state=state,
        age_s=round((now if active else beat) - member.started, 1),
        silent_s=round(now - beat, 1),
        error=member.error,
    )
    wait = member.waiting
    if wait is not None and state not in ("ended", "gone"):
        waited_s = round(max(0.0, now - wait.since), 1)
        shown.wait = WaitStatus(member.name, wait.what, wait.from_whom, waited_s)
    match member:
        case AgentState():
            serving = [server.version for server in member.servers if server.version is not None]
            shown.version = min(serving, default=None)
            shown.servers = ServerCount(len(serving), len(member.servers))
        case TrainerState():
            shown.version = member.step
        case EnvironmentState():
            shown.tokens_per_s, shown.in_flight = member.tokens_per_s, member.in_flight
            shown.sent = member.sent
        case TrajectoriesState():
            shown.queued_sequences = member.queued_sequences
    return shown


def _queue(members: Sequence[MemberStatus], last: StepMetrics | None) -> QueueStatus:
    """Return the trajectory server's queue, as it is now or was at the last step."""
    queued = next((m.queued_sequences for m in members if m.queued_sequences is not None), None)
    if queued is None and last is not None:
        value = last.get("queued_sequences")
        queued = None if value is None else int(value)
    in_flight = sum(m.in_flight or 0 for m in members if m.state not in ("ended", "gone"))
    return QueueStatus(queued, in_flight)


def _versions(
    run: RunDir, members: Sequence[MemberStatus], last: StepMetrics | None
) -> VersionStatus:
    served = [m.version for m in members if m.kind == "agent" and m.version is not None]
    return VersionStatus(
        learner=last.version if last else 0,
        published=read_json(run.policy / "latest.json").get("version"),
        durable=read_json(run.checkpoints / "latest.json").get("step"),
        served=min(served, default=None),
    )


def _token_rates(lines: Sequence[StepMetrics], members: Sequence[MemberStatus]) -> TokenRates:
    generated = [
        m.tokens_per_s
        for m in members
        if m.tokens_per_s is not None and m.state not in ("ended", "gone", "silent")
    ]
    return TokenRates(report.rate(lines, "tokens"), sum(generated) if generated else None)


def time_shares(lines: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the share of the learner's time per activity; they add up to 1. {} without steps."""
    total = sum(line.step_s for line in lines)
    if not total:
        return {}
    shares = {
        name: sum(line.phases.get(phase, 0.0) for line in lines for phase in phases) / total
        for name, phases in ACTIVITIES.items()
    }
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    return {name: round(share, 4) for name, share in shares.items()}


def log_warnings(run: RunDir) -> list[LogWarning]:
    """Return the last warnings and errors of the newest attempt's logs, oldest first.

    Messages that differ only in numbers are shown once, by the newest.
    """
    logs = sorted(run.logs.glob("*.log")) if run.logs.is_dir() else []
    limit = min(LOG_BYTES, max(1 << 12, LOGS_BYTES // max(1, len(logs))))
    found = []
    year = time.strftime("%Y")
    for path in logs:
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - limit))
                data = file.read()
        except OSError:
            continue
        own = [
            (when.decode(), level.decode(), text) for when, level, text in _OWN_LINE.findall(data)
        ]
        vllm = [(f"{year}-{when.decode()}", "E", text) for when, text in _VLLM_LINE.findall(data)]
        found += [
            LogWarning(when, path.name, level, text.decode(errors="replace"))
            for when, level, text in own + vllm
        ]
    found.sort(key=lambda warning: warning.time)
    newest = {(each.log, re.sub(r"\d+", "", each.message)): each for each in found}
    return sorted(newest.values(), key=lambda warning: warning.time)[-WARNINGS:]
