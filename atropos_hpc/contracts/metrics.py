"""The files in which a run records its progress, one struct per JSON line or file.

    metrics.jsonl        StepMetrics      learner rank 0, one line per optimizer step
    evaluations.jsonl    Evaluation       evaluator, one line per held-out evaluation
    samples.jsonl        Sample           learner rank 0, about a hundred steps per run
    activity.jsonl       ActivityLine     supervisor, every few seconds
    summary.json         Summary          supervisor, at the end of an attempt
    jobs.json            [SweepPoint]     the submission of a sweep

A float that is not finite is written as null, because JSON has no other spelling for it.
"""

from msgspec import Struct


class StepMetrics(Struct, frozen=True):
    """One optimizer step."""

    step: int
    version: int  # the policy version that the step produced
    attempt: int  # logs/attempt-<n> of the process that did it
    time: float  # end of the step, seconds since the epoch
    step_s: float  # seconds since the end of the previous step
    phases: dict[str, float]  # seconds of it per phase; the rest is unaccounted for
    scalars: dict[str, float | None]

    def get(self, name: str) -> float | None:
        """Return a scalar, or None where the step has none or it is not finite."""
        return self.scalars.get(name)


class Evaluation(Struct, frozen=True):
    """One held-out evaluation of a policy version."""

    version: int
    accuracy: float | None = None  # None: the evaluation failed, or reports no such metric
    metrics: dict[str, float | None] = {}
    sequences: int = 0
    served: tuple[int, int] | None = None  # oldest and newest version that generated answers
    wall_s: float = 0.0
    time: float = 0.0
    error: str | None = None


class Sample(Struct, frozen=True):
    """One sequence of a trained batch. Token ids in the file, text once it is decoded."""

    version: int  # the policy version that was trained
    policy_versions: tuple[int, int] | None  # oldest and newest that generated it
    score: float
    prompt: list[int] | str
    completion: list[int] | str  # from the first trained token on


class ActivitySample(Struct, frozen=True, tag_field="kind", tag="sample"):
    """The number of members of each kind in each state at one moment."""

    time: float
    states: dict[str, dict[str, int]]
    tokens_per_s: float  # generated, all environment workers together


class RestartMark(Struct, frozen=True, tag_field="kind", tag="restart"):
    """A member or a vLLM server has a new process."""

    time: float
    name: str


class AttemptMark(Struct, frozen=True, tag_field="kind", tag="attempt"):
    """A new attempt of the whole run has started."""

    time: float
    name: str


ActivityLine = ActivitySample | RestartMark | AttemptMark


class PhaseTotal(Struct, frozen=True):
    """A phase of the learner's steps, added up over a run."""

    s: float
    share: float  # of the time of all steps


class EvaluationSummary(Struct, frozen=True):
    """The parts of an evaluation that a summary repeats."""

    version: int
    accuracy: float
    sequences: int


class Summary(Struct, frozen=True):
    """What a run achieved, over all its attempts. None: not measured."""

    outcome: str | None  # of the last attempt
    accuracy_before: float | None  # of version 0
    accuracy_after: float | None  # of the last version
    evaluations: list[EvaluationSummary]
    steps: int
    sequences: int
    tokens: int
    trained_tokens: int
    stale_sequences: int
    dropped_as_stale: int
    reward_first: float | None
    reward_last: float | None
    wall_s: float
    attempts: int
    restarts: int
    phases: dict[str, PhaseTotal]


class SweepPoint(Struct, frozen=True):
    """One point of a sweep, as it was submitted."""

    num: int
    overrides: list[str]
    run_dir: str
    steps: int | None = None
    job: str | None = None
    slot: str | None = None  # the name of its singleton slot
    log: str | None = None  # of the job's batch step
    submitted: float | None = None
