"""summary.json: what a run achieved, from its metrics, evaluations and attempts."""

from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.contracts.members import AttemptRecord
from atropos_hpc.contracts.metrics import (
    ActivityLine,
    AttemptMark,
    Evaluation,
    EvaluationSummary,
    PhaseTotal,
    StepMetrics,
    Summary,
)
from atropos_hpc.observe.report import summarized
from atropos_hpc.runtime.run_dir import RunDir, read_intact, read_records


def summarize(run: RunDir, lines: Sequence[StepMetrics] | None = None) -> Summary:
    """Add up a run over all its attempts. `lines`: its metrics, if they have been read."""
    steps = read_records(run.metrics, StepMetrics) if lines is None else lines
    last = max((line.step for line in steps), default=0)
    evaluations = evaluation_summaries(run, last)
    directories = run.attempts()
    found = [read_intact(path / "attempt.json", AttemptRecord) for path in directories]
    records = [record for record in found if record is not None]

    def total(name: str) -> int:
        return int(sum(line.get(name) or 0 for line in steps))

    return Summary(
        outcome=records[-1].outcome if records else None,
        error=records[-1].error if records else None,
        accuracy_before=next((e.accuracy for e in evaluations if e.version == 0), None),
        accuracy_after=next((e.accuracy for e in reversed(evaluations) if e.version == last), None),
        evaluations=evaluations,
        steps=last,
        sequences=total("sequences"),
        tokens=total("tokens"),
        trained_tokens=total("trained_tokens"),
        stale_sequences=total("stale_sequences"),
        dropped_as_stale=int(steps[-1].get("dropped_as_stale") or 0) if steps else 0,
        reward_first=steps[0].get("reward/mean") if steps else None,
        reward_last=steps[-1].get("reward/mean") if steps else None,
        wall_s=round(_wall_s(run, directories, found), 1),
        attempts=len(directories),
        restarts=sum(len(record.events) for record in records),
        phases=_phases(steps),
    )


def _wall_s(
    run: RunDir, directories: Sequence[Path], records: Sequence[AttemptRecord | None]
) -> float:
    """Add up the attempts; one that was killed has no record, and counts up to its last sample."""
    lines: list[ActivityLine] = read_records(run.activity, ActivityLine)  # type: ignore[arg-type]
    seen: dict[str, tuple[float, float]] = {}
    name = ""
    for line in lines:
        name = line.name if isinstance(line, AttemptMark) else name
        seen[name] = seen.get(name, (line.time, 0.0))[0], line.time
    spans = [
        (record.started, record.ended) if record else seen.get(path.name, (0.0, 0.0))
        for path, record in zip(directories, records, strict=True)
    ]
    return sum(ended - started for started, ended in spans)


def evaluation_summaries(run: RunDir, step: int) -> list[EvaluationSummary]:
    """Return the evaluations up to a step."""
    return summarized(read_records(run.evaluations, Evaluation), step)


def _phases(steps: Sequence[StepMetrics]) -> dict[str, PhaseTotal]:
    whole = sum(line.step_s for line in steps) or 1.0
    totals: dict[str, float] = {}
    for line in steps:
        for name, seconds in line.phases.items():
            totals[name] = totals.get(name, 0.0) + seconds
    return {
        name: PhaseTotal(round(seconds, 2), round(seconds / whole, 4))
        for name, seconds in sorted(totals.items())
    }
