"""Member files, the roster, requests, and the records that the supervisor keeps of a run.

A member is a process that takes part in a run. It describes itself in a file of its own,
rendezvous/members/<name>.json: one state struct per kind of member. The supervisor collects the
member files in the roster.
"""

from typing import ClassVar

import msgspec

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.contracts.prompts import PromptCounts


class Wait(msgspec.Struct, frozen=True):
    """What a member waits for. Times are Unix times; the wait fails at `deadline`."""

    what: str
    from_whom: str
    since: float
    deadline: float | None = None


# --- member files, rendezvous/members/<name>.json


STARTING_STATES = ("starting", "joining", "loading", "registering", "starting servers")


class MemberState(msgspec.Struct, kw_only=True, tag_field="kind"):
    """What every member says. The fields of the first block are set by `runtime.membership.Member`.

    `state` is one or two words about the present activity; "ended" is final. `alarm` describes what
    keeps failing while others wait for it: a full disk, for example. `alive` is valid in the roster
    only: the supervisor's judgement by the heartbeat. `peak_bytes` is the most host memory that the
    process has held so far.
    """

    name: str = ""
    node: str = ""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    peak_bytes: int = 0

    state: str = "starting"
    waiting: Wait | None = None
    error: str | None = None
    alarm: str | None = None
    alive: bool = True

    @property
    def kind(self) -> str:
        """The tag that names the state struct in JSON."""
        return str(self.__struct_config__.tag)

    @property
    def reported(self) -> bool:
        """Whether the member has finished starting."""
        return self.state not in STARTING_STATES

    @property
    def silent(self) -> bool:
        """Whether the member should send heartbeats and does not."""
        return not self.alive and self.state != "ended"


class SupervisorState(MemberState, tag="supervisor"):
    """The supervisor of the run. `outcome` is the name of the action that ended it; then `error`
    says why a run failed."""

    job: str | None = None
    outcome: str | None = None


class RolloutJobState(MemberState, tag="rollout_job"):
    """The supervisor of one rollout node in a rollout job of its own (allocation `split`)."""

    job: str | None = None
    outcome: str | None = None


class TrainerState(MemberState, tag="trainer"):
    """A learner rank. `store` is (host, port) of rank 0's process group store; `step_id` names this
    start of the trainer step; `micro_batches` counts what it has begun, now and then."""

    rank: int = 0
    step: int | None = None
    micro_batches: int = 0
    step_id: str | None = None
    store: tuple[str, int] | None = None


class ServerState(msgspec.Struct, kw_only=True):
    """A vLLM server of an agent. `version` is None until it serves a published policy version."""

    name: str = ""
    url: str = ""
    version: PolicyVersion | None = None
    pid: int | None = None


class AgentState(MemberState, tag="agent"):
    """A node agent. `policy` is the newest version in the node's cache, `children` has the pids of
    workers and evaluator, `server_peaks` the `peak_bytes` of each server with its processes."""

    number: int = 0
    servers: list[ServerState] = []
    policy: PolicyVersion | None = None
    children: dict[str, int] = {}
    server_peaks: dict[str, int] = {}


class TrajectoriesState(MemberState, tag="trajectories"):
    """The trajectory server, with the counts of its queue. `url` is None until it listens."""

    url: str | None = None
    queued_groups: int | None = None
    queued_sequences: int | None = None
    next_batch: int | None = None
    unacknowledged: int | None = None
    stale: int | None = None
    stale_sequences: int | None = None
    repeated: int | None = None
    refused: int | None = None
    prompts: dict[str, PromptCounts] | None = None


class LossReason(msgspec.Struct, kw_only=True, frozen=True):
    """A reason for which groups were not trained on: its kind (rollout_failures.Loss), how often it
    occurred, and the last message."""

    kind: str
    count: int
    text: str


class EnvironmentState(MemberState, tag="environment"):
    """An environment worker, with counts of its groups since it started: sent; refused as malformed
    or by the trajectory server; unsent, by kind (rollout_failures.Loss). `reasons` are the most
    frequent reasons of the refused and unsent ones.

    Tokens of answers whose server was lost, or that an update aborted: `continued_tokens` were
    kept, `regenerated_tokens` had to be generated again."""

    environment: str = ""  # the key and target of its environment
    in_flight: int | None = None
    tokens_per_s: float | None = None
    continued_tokens: int | None = None
    regenerated_tokens: int | None = None
    sent: int | None = None
    refused: int | None = None
    unsent: int | None = None
    unsent_by: dict[str, int] = {}
    reasons: list[LossReason] = []
    complete: bool | None = None


class EvaluatorState(MemberState, tag="evaluator"):
    complete: bool | None = None


AnyMember = (
    SupervisorState
    | RolloutJobState
    | TrainerState
    | AgentState
    | TrajectoriesState
    | EnvironmentState
    | EvaluatorState
)


class Roster(msgspec.Struct, kw_only=True):
    """rendezvous/roster.json. `beat` grows with each write; `written` is a Unix time."""

    beat: int = -1
    written: float = 0.0
    members: dict[str, AnyMember] = {}


# --- requests, rendezvous/requests/<name>.json


class Request(msgspec.Struct, kw_only=True):
    """A request to a member that polls for it; `asked` is the Unix time at which it was posted."""

    name: ClassVar[str]
    asked: float = 0.0


class StopRequest(Request, kw_only=True):
    """Asks the learner to save a checkpoint and the run to end."""

    name: ClassVar[str] = "stop"
    by: str = "supervisor"


class RepublishRequest(Request, kw_only=True):
    """Asks the learner to publish `version` again, because a reader cannot use it."""

    name: ClassVar[str] = "republish"
    version: PolicyVersion
    why: str


# --- the supervisor's records


class Holder(msgspec.Struct, kw_only=True):
    """holder.json: the process that holds the run's lock, or held it last."""

    what: str = "unknown process"
    host: str | None = None
    pid: int | None = None
    since: float = 0.0
    job: str | None = None
    restarts: str | None = None  # how often Slurm had started the job again, by its own variable


class Done(msgspec.Struct, kw_only=True):
    """done.json: the learner has made its last step, `version`, durable."""

    version: int


class AttemptStart(msgspec.Struct, kw_only=True):
    """logs/attempt-<n>/start.json. `durable` is the newest durable step at the start. `script`: the
    command line of a job that a person has submitted with sbatch."""

    job: str | None
    durable: int
    script: str | None = None


class RestartEvent(msgspec.Struct, kw_only=True):
    """A restart of a process: which, how it ended, and the action taken."""

    time: float
    who: str
    how: str
    done: str


class AttemptRecord(msgspec.Struct, kw_only=True):
    """logs/attempt-<n>/attempt.json, written when the attempt has ended."""

    started: float
    ended: float
    outcome: str
    events: list[RestartEvent]
    error: str | None = None  # why the run failed


class RolloutJobRecord(msgspec.Struct, kw_only=True):
    """rollout_job.json: the id of the rollout job (allocation `split`)."""

    job: str = ""
