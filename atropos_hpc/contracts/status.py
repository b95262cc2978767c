"""What `atropos-hpc status --json` and `atropos-hpc report --json` print. None: not known yet."""

from typing import Literal

from msgspec import Struct

from atropos_hpc.contracts.members import AnyMember, Holder
from atropos_hpc.contracts.metrics import EvaluationSummary

RunState = Literal[
    "queued",
    "requeued",  # saved, and waiting for Slurm to start it again
    "starting",  # running, without a step yet
    "running",
    "complete",
    "failed",
    "stopped",
    "cancelled",
    "lost",  # no process is left, and no outcome was recorded
]
LIVE: tuple[RunState, ...] = ("queued", "requeued", "starting", "running")
ENDED: tuple[RunState, ...] = ("complete", "failed", "stopped", "lost", "cancelled")


class PointStatus(Struct, frozen=True):
    """One point of a sweep. Reward and KL are means over the last tenth of the steps."""

    point: int
    overrides: list[str]
    run_dir: str
    job: str | None
    state: RunState
    step: int
    steps: int | None
    eta_s: float | None
    reward: float | None
    accuracy: float | None  # held-out, of the last evaluation
    kl: float | None  # to the reference
    staleness: float | None
    tokens_per_s: float | None
    best: bool = False
    begun: bool = True  # whether its run has ever started


class SweepStatus(Struct, frozen=True):
    sweep: str
    points: list[PointStatus]


class MemberStatus(Struct, frozen=True):
    """A member as its file describes it, and what the age of that file says."""

    member: AnyMember
    state: str  # the member's own, "silent" without a heartbeat, "gone" once the run has ended
    age_s: float
    silent_s: float  # since the last heartbeat


class WaitStatus(Struct, frozen=True):
    member: str
    what: str
    from_whom: str
    waited_s: float


class VersionStatus(Struct, frozen=True):
    """Policy versions: the learner's, the newest published, durable, and the oldest served."""

    learner: int
    published: int | None
    durable: int | None
    served: int | None


class LogWarning(Struct, frozen=True):
    """A warning or an error at the end of a log of the newest attempt."""

    time: str
    log: str
    level: str  # W, E or C
    message: str


class RunStatus(Struct, frozen=True):
    run_dir: str
    state: RunState
    error: str | None  # why it failed
    job: str | None
    slurm: str | None  # the state of the job in Slurm's own words
    attempts: int
    holder: Holder | None
    step: int
    steps: int | None
    last_step_at: float | None
    eta_s: float | None
    seconds_per_step: float | None
    metrics: dict[str, float | None]  # every scalar of the last step
    recent: dict[str, list[float | None]]  # reward and step seconds of the last steps, in order
    evaluation: EvaluationSummary | None  # the last
    queued_sequences: int | None  # for the learner
    groups_in_flight: int
    versions: VersionStatus
    trained_tokens_per_s: float | None  # over the last steps
    generated_tokens_per_s: float | None  # over the last seconds
    time_shares: dict[str, float]  # of the learner's time by phase; they add up to 1
    members: list[MemberStatus]
    waits: list[WaitStatus]
    warnings: list[LogWarning]
    job_log: list[str]  # its last lines, of a job that ended before the run began


Status = RunStatus | SweepStatus
