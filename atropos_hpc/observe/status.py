"""The status of a run, or of each point of a sweep, from files, during a run and after it.

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

from atropos_hpc.contracts.checkpoint import LatestCheckpoint
from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    EnvironmentState,
    Holder,
    TrajectoriesState,
)
from atropos_hpc.contracts.metrics import StepMetrics, SweepPoint
from atropos_hpc.contracts.policy import LatestPolicy
from atropos_hpc.contracts.status import (
    ENDED,
    LogWarning,
    MemberStatus,
    RunStatus,
    Status,
    SweepStatus,
    VersionStatus,
    WaitStatus,
)
from atropos_hpc.observe import report
from atropos_hpc.runtime import masking
from atropos_hpc.runtime.membership import DEAD_S
from atropos_hpc.runtime.run_dir import RunDir, last_records, read_struct

KINDS = "supervisor rollout_job trajectories trainer agent environment evaluator"  # in order
WARNINGS = 6
JOB_LINES = 15
LOGS_BYTES = 1 << 20  # read from all logs together
LOG_BYTES = 1 << 16  # read from one, at most
_OWN_LINE = re.compile(rb"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([WEC]) ([^\n]+)", re.M)
_VLLM_LINE = re.compile(rb"^(?:\([^)\n]*\) )?ERROR (\d\d-\d\d \d\d:\d\d:\d\d) ([^\n]+)", re.M)


def read_status(directory: Path, query_jobs: report.QueryJobs = lambda jobs: {}) -> Status:
    """Return the status of a run or of a sweep. Raises report.NotARunError."""
    points = report.require_points(directory)
    jobs = query_jobs(point.job for point in points)
    if report.is_point(directory, points):
        return run_status(points[0], jobs)
    rows = [report.point_status(point, jobs) for point in points]
    return SweepStatus(str(directory), rows)


def run_status(point: SweepPoint, jobs: report.JobStates) -> RunStatus:
    run = RunDir(Path(point.run_dir))
    lines = last_records(run.metrics, StepMetrics, report.RECENT)
    last = lines[-1] if lines else None
    steps = report.configured_steps(run)
    state = report.run_state(point, jobs, steps, bool(lines))
    shown = read_members(run, active=state in ("running", "starting") or report.is_held(run))
    present = [each for each in shown if each.state not in ("ended", "gone")]
    members = [each.member for each in present]
    workers = [member for member in members if isinstance(member, EnvironmentState)]
    record = report.last_attempt(run)
    served = [v for member in members if (v := served_version(member)) is not None]
    queues = [m.queued_sequences for m in members if isinstance(m, TrajectoriesState)]
    evaluation = report.last_evaluation(run, last.step if last else 0)
    published = read_struct(run.policy / "latest.json", LatestPolicy)
    durable = read_struct(run.checkpoints / "latest.json", LatestCheckpoint)
    pace = report.steady(lines)
    return RunStatus(
        run_dir=str(run.path),
        state=state,
        error=record.error if record is not None and state == "failed" else None,
        job=point.job,
        slurm=jobs.get(point.job or ""),
        attempts=len(run.attempts()),
        holder=read_struct(run.holder, Holder),
        step=last.step if last else 0,
        steps=steps,
        last_step_at=last.time if last else None,
        eta_s=report.eta(lines, steps) if state == "running" else None,
        seconds_per_step=sum(line.step_s for line in pace) / len(pace) if pace else None,
        metrics=last.scalars if last else {},
        recent={
            "reward": [line.get("reward/mean") for line in lines],
            "step_s": [line.step_s for line in lines],
        },
        evaluation=evaluation,
        queued_sequences=queues[0] if queues else None,
        groups_in_flight=sum(worker.in_flight or 0 for worker in workers),
        versions=VersionStatus(
            learner=last.version if last else 0,
            published=published.version if published else None,
            durable=durable.step if durable else None,
            served=min(served, default=None),
        ),
        trained_tokens_per_s=report.rate(lines, "tokens"),
        generated_tokens_per_s=sum(w.tokens_per_s or 0.0 for w in workers) if workers else None,
        time_shares=time_shares(pace),
        members=shown,
        waits=[_wait(member) for member in members if member.waiting is not None],
        warnings=log_warnings(run),
        job_log=report.job_log(point, JOB_LINES) if state in ENDED else [],
    )


def read_members(run: RunDir, active: bool) -> list[MemberStatus]:
    """Return every member in order of kind and number.

    `active`: the run is under way, so a member without a heartbeat is "silent" and not "gone".
    """
    found, now = [], time.time()
    decoder = msgspec.json.Decoder(AnyMember)
    for path in run.members.glob("[!.]*.json") if run.members.is_dir() else ():
        try:
            member, beat = decoder.decode(path.read_bytes()), path.stat().st_mtime
        except (OSError, msgspec.MsgspecError):  # replaced meanwhile; the next look finds it
            continue
        state = member.state
        if state != "ended" and not active:
            state = "gone"  # the run is over, and the process had no time to leave
        elif state != "ended" and now - beat > DEAD_S:
            state = "silent"
        age_s = round((now if active else beat) - member.started, 1)
        found.append(MemberStatus(member, state, age_s, round(now - beat, 1)))

    def order(shown: MemberStatus) -> tuple[int, list[int | str]]:
        parts = re.split(r"(\d+)", shown.member.name)  # so that rollout10 comes after rollout9
        numbered = [int(part) if part.isdigit() else part for part in parts]
        return KINDS.index(shown.member.kind), numbered

    return sorted(found, key=order)


def served_version(member: AnyMember) -> int | None:
    """Return the oldest version that a server of an agent serves."""
    servers = member.servers if isinstance(member, AgentState) else []
    return min((s.version.version for s in servers if s.version is not None), default=None)


def _wait(member: AnyMember) -> WaitStatus:
    wait = member.waiting
    assert wait is not None
    waited_s = round(max(0.0, time.time() - wait.since), 1)
    return WaitStatus(member.name, wait.what, wait.from_whom, waited_s)


def time_shares(lines: Sequence[StepMetrics]) -> dict[str, float]:
    """Return the share of the learner's time per phase; they add up to 1. {} without steps."""
    total = sum(line.step_s for line in lines)
    if not total:
        return {}
    shares: dict[str, float] = {}
    for line in lines:
        for phase, seconds in line.phases.items():
            shares[phase] = shares.get(phase, 0.0) + seconds / total
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    return {phase: round(share, 4) for phase, share in shares.items()}


def log_warnings(run: RunDir) -> list[LogWarning]:
    """Return the last warnings and errors of the newest attempt's logs, oldest first.

    Messages that differ only in numbers are shown once, by the newest.
    """
    run.learn_secrets()
    known = masking.known_values()
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
            LogWarning(when, path.name, level, masking.mask(text.decode(errors="replace"), known))
            for when, level, text in own + vllm
        ]
    found.sort(key=lambda warning: warning.time)
    newest = {(each.log, re.sub(r"\d+", "", each.message)): each for each in found}
    return sorted(newest.values(), key=lambda warning: warning.time)[-WARNINGS:]
