"""Write the metrics of a run: one line per optimizer step to metrics.jsonl and to the trackers.

A line has the learner's own metrics, and what environments have logged since the previous step.
metrics.jsonl is the source for status, report and summary. A step that is repeated after a crash
replaces its earlier line, so every step is there once.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import EnvironmentState
from atropos_hpc.contracts.metrics import (
    EnvironmentMetrics,
    Evaluation,
    Rollout,
    StepMetrics,
)
from atropos_hpc.observe import samples
from atropos_hpc.observe.rollouts import with_text
from atropos_hpc.observe.tracker_feed import TrackerFeed
from atropos_hpc.observe.trackers import Ending, Tracker, evaluation_scalars, step_scalars
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import (
    RecordReader,
    RunDir,
    append_record,
    read_records,
    write_file,
)


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
    """Write metrics, on the learner's rank 0."""

    def __init__(
        self, run: RunDir, trackers: Mapping[str, Callable[[], Tracker]], resume_at: int
    ) -> None:
        """`trackers`: see TrackerFeed. `resume_at`: the step that training resumes at.

        Lines of later steps are removed with the first line that is written: a start that ends
        before it has made a step leaves the files as they are.
        """
        self.run, self._feed = run, TrackerFeed(run, trackers)
        self._roster = RosterReader(run.roster)
        self._attempt = run.attempt()
        self._resume_at: int | None = resume_at
        # Earlier lines of environments belong to steps that were written.
        self._environments = RecordReader(run.environments, EnvironmentMetrics, at_end=True)
        self._evaluations = RecordReader(run.evaluations, Evaluation)

    def _remove_later_lines(self) -> None:
        if self._resume_at is not None:
            steps = read_records(self.run.metrics, StepMetrics)
            kept = [msgspec.json.encode(line) for line in steps if line.step <= self._resume_at]
            write_file(self.run.metrics, b"".join(line + b"\n" for line in kept))
        self._resume_at = None

    def write(
        self,
        step: int,
        scalars: Mapping[str, float],
        times: StepTimes,
        histograms: Mapping[str, list[float]] = {},
    ) -> None:
        self._remove_later_lines()
        scalars = {name: float(value) for name, value in scalars.items()}
        scalars |= environment_means(self._environments.take())
        workers = self._roster.members(EnvironmentState)
        scalars |= group_counts(workers)
        if workers:
            scalars |= rollout_throughput(workers, self.run.config())
        self._pass_on_evaluations()
        line = StepMetrics(
            step=step,
            version=step,
            attempt=self._attempt,
            time=time.time(),
            step_s=times.step_s,
            phases=times.phases,
            scalars=dict(scalars),
            histograms=dict(histograms),
        )
        append_record(self.run.metrics, line)
        self._feed.add("step", step, line.time, step_scalars(line))

    def sample(self, step: int, steps: int, group: Callable[[], Sequence[Rollout]]) -> None:
        """Show the trackers the best and the worst sequence of a group, if that step is due."""
        if not self._feed or self._feed.knows("step", step) or not samples.is_due(step, steps):
            return
        chosen = samples.best_and_worst(group())
        decoder = samples.decoder(self.run.config().model.path or "")
        self._feed.samples(step, with_text(chosen, decoder))

    def _pass_on_evaluations(self) -> None:
        """Show the trackers the evaluations since the last call that have an accuracy."""
        for line in self._evaluations.take():
            if line.accuracy is not None:
                self._feed.add("evaluation", line.version, line.time, evaluation_scalars(line))

    def close(self, ending: Ending) -> None:
        """Pass on the remaining evaluations and close the trackers."""
        try:
            self._pass_on_evaluations()
        finally:
            self._feed.close(ending)


def environment_means(lines: Iterable[EnvironmentMetrics]) -> dict[str, float]:
    """Average what environments logged over their workers, as env/<environment>/<key>.

    >>> environment_means([EnvironmentMetrics("sums", each, {"x": 1.0}) for each in ("a", "b")])
    {'env/sums/x': 1.0}
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for line in lines:
        for key, value in line.values.items():
            values[f"env/{line.environment}/{key}"].append(value)
    return {name: math.fsum(each) / len(each) for name, each in values.items()}


def group_counts(workers: Iterable[EnvironmentState]) -> dict[str, float]:
    """Add up what the environment workers report about their groups, since these workers started.

    >>> group_counts([EnvironmentState(sent=3, unsent=2, unsent_by={"equal_scores": 2})])
    {'groups_sent': 3, 'groups_refused': 0, 'groups_unsent': 2, 'groups_unsent/equal_scores': 2}
    """
    counts: Counter[str] = Counter()
    for worker in workers:
        counts["groups_sent"] += worker.sent or 0
        counts["groups_refused"] += worker.refused or 0
        counts["groups_unsent"] += worker.unsent or 0
        counts.update({f"groups_unsent/{kind}": n for kind, n in worker.unsent_by.items()})
    return dict(counts)


def rollout_throughput(workers: Iterable[EnvironmentState], config: Config) -> dict[str, float]:
    """Add up the generated tokens per second of all workers, over the last seconds.

    >>> rollout_throughput([EnvironmentState(tokens_per_s=50.0)] * 2, Config(run_dir=""))
    {'perf/rollout/throughput': 100.0, 'perf/rollout/throughput_per_gpu': 100.0}
    """
    rate = math.fsum(worker.tokens_per_s or 0.0 for worker in workers)
    rollout = config.rollout
    gpus = config.roles.rollout.nodes * rollout.servers * rollout.tensor_parallel
    return {"perf/rollout/throughput": rate, "perf/rollout/throughput_per_gpu": rate / gpus}
