"""The files in which a run records its progress, one struct per JSON line or file.

    metrics.jsonl        StepMetrics      learner rank 0, one line per optimizer step
    evaluations.jsonl    Evaluation       evaluator, one line per held-out evaluation
    environments.jsonl   EnvironmentMetrics  trajectory server, one line per log of a worker
    tracked.jsonl        Tracked          learner rank 0, what the experiment trackers are given
    rollouts/*.zst       Rollout          learner, one line per trained sequence
    activity.jsonl       ActivityLine     supervisor, every few seconds
    summary.json         Summary          supervisor, at the end of an attempt
    jobs.json            [SweepPoint]     the submission of a sweep

A float that is not finite is written as null, because JSON has no other spelling for it.
"""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Annotated

from msgspec import Meta, Struct

ONLY_ENVIRONMENT = "environment"  # the name in metrics of an environment without a label

# Between the bins of StepMetrics.histograms; the last bin of each has everything above.
HISTOGRAM_EDGES: dict[str, tuple[float, ...]] = {
    "ratio": (0.5, 0.67, 0.8, 0.9, 0.95, 0.98, 0.99, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0),
    "staleness": (0, 1, 2, 3, 4, 6, 8, 12, 16),
}


def finite_numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return the finite numbers among an environment's metrics, numpy's and torch's included."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if hasattr(value, "item"):
            size = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
            value = value.item() if size == 1 else value
        if isinstance(value, Real) and math.isfinite(value):
            found[name] = float(value)
    return found


class StepMetrics(Struct, frozen=True):
    step: int
    version: int  # the policy version that the step produced
    attempt: int  # logs/attempt-<n> of the process that did it
    time: float  # end of the step, seconds since the epoch
    step_s: float  # seconds since the end of the previous step
    phases: dict[str, float]  # seconds of it per phase; the rest is unaccounted for
    scalars: dict[str, float | None]
    # Counts per bin, upper edges included: of trained tokens by the ratio learner / behaviour, of
    # sequences by staleness.
    histograms: dict[str, list[float]] = {}

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


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the metrics of the run's first environment, by short name.

    >>> metrics = {"eval/environment/pass@4": 0.75, "eval/b/pass@4": 0.25, "b/eval/x": 1.0}
    >>> evaluation_metrics(Evaluation(0, 0.5, metrics))
    {'pass@4': 0.75}
    """
    own = re.compile(rf"eval/(?:{ONLY_ENVIRONMENT}/)?([^/]+)")
    found = ((own.fullmatch(name), value) for name, value in evaluation.metrics.items())
    return {name[1]: value for name, value in found if name}


class Tracked(Struct, frozen=True):
    """What experiment trackers are given of one step, or of one evaluation."""

    number: int  # of this line, from 0
    kind: str  # a key of observe.trackers.MARKERS
    step: int  # of an evaluation: the policy version
    time: float
    scalars: dict[str, float]


class EnvironmentMetrics(Struct, frozen=True):
    """What a worker's environment has logged for training; also the body of its request.

    The trajectory server sets `time`.
    """

    environment: Annotated[str, Meta(max_length=256)]  # its name in metrics
    member: Annotated[str, Meta(max_length=256)]
    values: Annotated[dict[str, float], Meta(max_length=1024)]
    time: float = 0.0


class Rollout(Struct, frozen=True, omit_defaults=True):
    """One sequence of a trained batch."""

    step: int  # that trained it, as in metrics.jsonl
    environment: str  # its name in metrics
    group: int  # number of its group in order of arrival
    index: int  # within its group
    score: float | None  # None: not finite
    tokens: list[int]
    trained: list[tuple[int, int]]  # [start, end) of the spans of trained tokens
    policy_versions: tuple[int, int] | None = None  # oldest and newest that generated it
    advantage: float | None = None  # mean over its trained tokens; None: not in the batch
    advantages: list[float] | None = None  # of each trained token, where they differ
    finish_reason: str | None = None
    prompt: str | None = None  # text up to the first trained token
    completion: str | None = None  # text from there on

    @property
    def length(self) -> int:
        """Number of trained tokens."""
        return sum(end - start for start, end in self.trained)


class ActivitySample(Struct, frozen=True, tag_field="kind", tag="sample"):
    """The number of members of each kind in each state at one moment."""

    time: float
    states: dict[str, dict[str, int]]
    tokens_per_s: float  # generated, all environment workers together
    # Tokens of interrupted answers, since the workers started: kept, and generated again.
    continued_tokens: int = 0
    regenerated_tokens: int = 0


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
    version: int
    accuracy: float
    sequences: int
    metrics: dict[str, float | None] = {}  # by short name


class Summary(Struct, frozen=True):
    """What a run achieved, over all its attempts. None: not measured."""

    outcome: str | None  # of the last attempt
    error: str | None  # why it failed
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
