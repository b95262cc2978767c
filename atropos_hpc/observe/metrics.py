"""Write the metrics of a run: one line per optimizer step to metrics.jsonl and to the trackers.

metrics.jsonl is the source for status, report and summary. A step that is repeated after a crash
replaces its earlier line, so every step is there once.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from atropos_hpc.config import WandbConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.metrics import Evaluation, Sample, StepMetrics
from atropos_hpc.observe import samples
from atropos_hpc.observe.trackers import TensorBoardTracker, Tracker, WandbTracker
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records, write_file


@dataclass(frozen=True)
class StepTimes:
    """Where the time since the previous step went, in seconds."""

    step_s: float
    phases: dict[str, float]


class Phases:
    """Measure named phases: `with phases("wait"): ...`. `take` returns them and starts anew."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def take(self) -> StepTimes:
        """Return the times since the last call."""
        now = time.monotonic()
        phases = {name: round(seconds, 4) for name, seconds in self._seconds.items()}
        taken = StepTimes(round(now - self._since, 4), phases)
        self._seconds, self._since = {}, now
        return taken


class MetricsWriter:
    """Write metrics and samples, on the learner's rank 0."""

    def __init__(self, run: RunDir, trackers: Sequence[Tracker], resume_at: int) -> None:
        """`resume_at`: the step that training resumes at.

        Lines of later steps are removed with the first line that is written: a start that ends
        before it has made a step leaves the files as they are.
        """
        self.run, self._trackers = run, trackers
        self._attempt = run.attempt()
        steps = read_records(run.metrics, StepMetrics)
        chosen = read_records(run.samples, Sample)
        self._kept: dict[str, list[StepMetrics] | list[Sample]] = {
            "metrics": [line for line in steps if line.step <= resume_at],
            "samples": [line for line in chosen if line.version < resume_at],
        }
        self._evaluations = 0

    def _remove_later_lines(self) -> None:
        for name in tuple(self._kept):
            _rewrite(self.run, name, self._kept[name])
            del self._kept[name]

    def write(self, step: int, scalars: Mapping[str, float], times: StepTimes) -> None:
        """Write one step, with the last held-out accuracy if a new one has arrived."""
        self._remove_later_lines()
        scalars = {name: float(value) for name, value in scalars.items()}
        evaluations = self._new_evaluations()
        if evaluations and evaluations[-1].accuracy is not None:
            scalars["accuracy"] = evaluations[-1].accuracy
            scalars["accuracy_version"] = evaluations[-1].version
        line = StepMetrics(
            step=step,
            version=step,
            attempt=self._attempt,
            time=time.time(),
            step_s=times.step_s,
            phases=times.phases,
            scalars=dict(scalars),
        )
        append_record(self.run.metrics, line)
        for tracker in self._trackers:
            tracker.step(line)

    def sample(self, version: int, steps: int, groups: Sequence[Group]) -> None:
        """Write samples of the batch trained at `version`, if that version is due."""
        if not groups or not samples.is_due(version, steps):
            return
        self._remove_later_lines()
        chosen = samples.choose(groups[0], version)
        for sample in chosen:
            append_record(self.run.samples, sample)
        if self._trackers:
            decoded = samples.decode(chosen, self.run.config().model.path or "")
            for tracker in self._trackers:
                tracker.samples(decoded)

    def _new_evaluations(self) -> list[Evaluation]:
        """Return the evaluations since the last call that have an accuracy; pass them on."""
        lines = read_records(self.run.evaluations, Evaluation)
        new = [line for line in lines[self._evaluations :] if line.accuracy is not None]
        self._evaluations = len(lines)
        for evaluation in new:
            for tracker in self._trackers:
                tracker.evaluation(evaluation)
        return new

    def close(self) -> None:
        """Pass on the remaining evaluations and close the trackers."""
        if self._trackers:
            self._new_evaluations()
        for tracker in self._trackers:
            tracker.close()


def _rewrite(run: RunDir, name: str, lines: Sequence[StepMetrics] | Sequence[Sample]) -> None:
    path = run.path / f"{name}.jsonl"
    write_file(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def open_trackers(
    run: RunDir, wandb: WandbConf, tensorboard: bool, resume_at: int
) -> list[Tracker]:
    """Open the trackers that the config asks for."""
    trackers: list[Tracker] = []
    if wandb.mode != "disabled":
        trackers.append(WandbTracker(run, wandb))
    if tensorboard:
        trackers.append(TensorBoardTracker(run, resume_at))
    return trackers
