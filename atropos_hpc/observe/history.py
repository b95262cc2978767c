"""The history of a run as arrays, for the report's plots. Reads whole files."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_hpc.contracts.metrics import (
    ActivityLine,
    ActivitySample,
    AttemptMark,
    Evaluation,
    RestartMark,
    StepMetrics,
)
from atropos_hpc.observe import report
from atropos_hpc.runtime.run_dir import RunDir, read_records

# The phases of a step, in order. "other" is the time outside of them, before the first.
PHASES = ("wait", "batch", "log_probs", "update", "publish", "checkpoint")
# Keys that differ between the points of a sweep without being what it compares.
NOT_COMPARED = re.compile(
    r"^(run_dir|seed|model\.path|model\.make_options\.seed|(wandb|mlflow|trackio|export)\..*)$"
)

Values = NDArray[np.float64]
ConfigValue = int | float | str | bool | None
Config = Mapping[str, ConfigValue]  # dotted key -> value; lists as text
RunGroups = dict[tuple[ConfigValue, ...], list["History"]]  # by the values of the compared keys


@dataclass
class Restart:
    """A process that was restarted, or a new attempt of the run."""

    time: float  # seconds since the epoch
    name: str
    of_run: bool = False


@dataclass
class History:
    """One run. Arrays have one value per step; NaN where a step lacks the metric."""

    path: Path
    config: Config
    lines: list[StepMetrics]
    evaluations: list[tuple[Evaluation, float]]  # with their accuracy
    activity: list[ActivitySample]
    restarts: list[Restart]

    def __post_init__(self) -> None:
        self.steps = np.array([line.step for line in self.lines], float)
        self.times = np.array([line.time for line in self.lines], float)
        self.step_s = np.array([line.step_s for line in self.lines], float)

    def scalar(self, name: str) -> Values:
        return np.array([line.get(name) for line in self.lines], float)  # None becomes NaN

    def phase(self, name: str) -> Values:
        """Return the seconds that each step spent in a phase."""
        return np.array([line.phases.get(name, 0.0) for line in self.lines], float)

    def points(self, name: str) -> dict[int, float]:
        """Return {step or version: value} of a metric, or of the held-out "accuracy"."""
        if name == "accuracy":
            return {each.version: accuracy for each, accuracy in self.evaluations}
        return {line.step: v for line in self.lines if (v := line.get(name)) is not None}

    def final(self, name: str) -> float:
        """Average a metric over the last tenth of the steps; NaN where there is none."""
        values = self.scalar(name)
        last = values[-max(1, int(len(values) * report.FINAL)) :]
        last = last[np.isfinite(last)]
        return float(last.mean()) if len(last) else math.nan

    def values(self, keys: Iterable[str]) -> list[ConfigValue]:
        return [self.config.get(key) for key in keys]

    @property
    def accuracy(self) -> float:
        """The accuracy of the last held-out evaluation; NaN before the first."""
        return self.evaluations[-1][1] if self.evaluations else math.nan

    def step_at(self, when: float) -> float:
        """Return how many steps were done at a time."""
        return float(np.searchsorted(self.times, when))


def read(path: Path) -> History:
    run = RunDir(path)
    info = run.info()
    kind: Any = ActivityLine
    activity: list[ActivityLine] = read_records(run.activity, kind)
    steps = read_records(run.metrics, StepMetrics)
    evaluations = read_records(run.evaluations, Evaluation)
    return History(
        path,
        flatten(msgspec.to_builtins(info.config)) if info is not None else {},
        steps,
        report.evaluated(evaluations, max((line.step for line in steps), default=0)),
        [line for line in activity if isinstance(line, ActivitySample)],
        _restarts(activity),
    )


def _restarts(activity: Sequence[ActivityLine]) -> list[Restart]:
    attempts = [line for line in activity if isinstance(line, AttemptMark)]
    found = [Restart(line.time, line.name.replace("-", " "), True) for line in attempts[1:]]
    found += [Restart(line.time, line.name) for line in activity if isinstance(line, RestartMark)]
    return sorted(found, key=lambda restart: restart.time)


# --- the timeline: shares of the bins between `edges`


def phase_shares(run: History, edges: Values) -> dict[str, Values]:
    """Return the share of each bin that the learner spent in each phase."""
    spent = {name: run.phase(name) for name in PHASES}
    other = np.maximum(0.0, run.step_s - sum(spent.values()))
    start = run.times - run.step_s
    shares = {}
    for name, seconds in {"other": other, **spent}.items():
        shares[name] = _coverage(start, start + seconds, np.ones(len(start)), edges)
        start = start + seconds
    return shares


def state_shares(run: History, kind: str, edges: Values, hold_s: float) -> dict[str, Values]:
    """Return the share of the members of a kind in each state, per bin.

    A sample counts until the next one, at most for `hold_s` seconds.
    """
    samples = [line for line in run.activity if kind in line.states]
    if not samples:
        return {}
    starts = np.array([line.time for line in samples])
    ends = np.minimum(np.append(starts[1:], np.inf), starts + hold_s)
    names = sorted({name for line in samples for name in line.states[kind]})
    totals = np.array([sum(line.states[kind].values()) for line in samples], float)
    return {
        name: _coverage(
            starts,
            ends,
            np.array([line.states[kind].get(name, 0) for line in samples]) / totals,
            edges,
        )
        for name in names
    }


def _coverage(starts: Values, ends: Values, weights: Values, edges: Values) -> Values:
    """Return how much of each bin the weighted, ordered, disjoint intervals cover, in [0, 1]."""
    if not len(starts):
        return np.zeros(len(edges) - 1)
    points = np.maximum.accumulate(np.column_stack([starts, ends]).ravel())
    covered = np.cumsum(np.column_stack([np.zeros(len(starts)), (ends - starts) * weights]).ravel())
    return np.clip(np.diff(np.interp(edges, points, covered)) / np.diff(edges), 0.0, 1.0)


# --- a sweep


def flatten(config: Any, prefix: str = "") -> dict[str, ConfigValue]:
    """Flatten a nested config into dotted keys; lists become text.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': '[2]'}
    """
    if not isinstance(config, dict):
        simple = isinstance(config, (int, float, str, bool, type(None)))
        return {prefix: config if simple else str(config)}
    return {
        key: value
        for name, below in config.items()
        for key, value in flatten(below, f"{prefix}.{name}" if prefix else name).items()
    }


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Map dotted keys to their last part, or as many of the last parts as tell them apart.

    >>> short_keys(["a.x.lr", "b.x.lr", "a.steps"])
    {'a.x.lr': 'a.x.lr', 'b.x.lr': 'b.x.lr', 'a.steps': 'steps'}
    """
    ends = {key: [key[match.end() :] for match in re.finditer(r"^|\.", key)] for key in keys}
    counts = Counter(end for each in ends.values() for end in each)
    return {key: next((e for e in reversed(ends[key]) if counts[e] == 1), key) for key in keys}


def compared_keys(runs: Sequence[History]) -> list[str]:
    """Return the keys whose values differ between runs, except those of NOT_COMPARED.

    A run that has not begun has no config yet, and is not compared.
    """
    runs = [run for run in runs if run.config]
    keys = sorted({key for run in runs for key in run.config if not NOT_COMPARED.match(key)})
    return [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]


def grouped(runs: Iterable[History], keys: Sequence[str]) -> RunGroups:
    """Group runs by their values of `keys`; the runs of one group differ in their seed."""
    groups: RunGroups = {}
    for run in runs:
        groups.setdefault(tuple(run.values(keys)), []).append(run)

    def order(values: tuple[ConfigValue, ...]) -> list[tuple[bool, Any]]:
        return [(isinstance(v, str), -1 if v is None else v) for v in values]

    return {values: groups[values] for values in sorted(groups, key=order)}
