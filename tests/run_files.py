"""Read and write the typed files of a run, for tests."""

from typing import Any

from atropos_hpc.contracts.metrics import ActivityLine, Evaluation, StepMetrics
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records


def step_metrics(run: RunDir) -> list[StepMetrics]:
    return read_records(run.metrics, StepMetrics)


def scalars(run: RunDir) -> list[dict[str, Any]]:
    """The scalars of every step."""
    return [dict(line.scalars) for line in step_metrics(run)]


def evaluations(run: RunDir) -> list[Evaluation]:
    return read_records(run.evaluations, Evaluation)


def activity(run: RunDir) -> list[ActivityLine]:
    return read_records(run.activity, ActivityLine)


def append_step(
    run: RunDir,
    step: int,
    step_s: float = 1.0,
    phases: dict[str, float] | None = None,
    time: float | None = None,
    **scalars: float,
) -> None:
    """Append a step to metrics.jsonl as the learner would."""
    when = 1000.0 + step if time is None else time
    append_record(run.metrics, StepMetrics(step, step, 0, when, step_s, phases or {}, {**scalars}))
