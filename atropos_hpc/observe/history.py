"""The story of a run as arrays: what the report's figures are drawn from. Reads whole files; nothing of it is for a live view."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atropos_hpc.observe import report
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_lines

PHASES = (
    "wait",
    "batch",
    "log_probs",
    "update",
    "publish",
    "checkpoint",
)  # in the order in which a step goes through them
# what differs between the points of a sweep without being what is compared
NOT_COMPARED = re.compile(r"^(run_dir|seed|model\.path|model\.make_options\.seed|wandb\..*)$")

Values = NDArray[np.float64]
Groups = dict[
    tuple[Any, ...], list["Series"]
]  # the runs of a sweep by the values of what is compared


@dataclass
class Restart:
    """A process that was started again, or a new attempt of all."""

    time: float  # seconds since the epoch
    what: str


@dataclass
class Series:
    """One run. Arrays are of the steps, in order; NaN where a step lacks the figure."""

    path: Path
    config: dict[str, Any]
    steps: Values
    figures: dict[str, Values]
    evaluations: list[dict[str, Any]]  # with an accuracy
    activity: list[dict[str, Any]]  # samples of what members did
    restarts: list[Restart] = field(default_factory=list)

    def get(self, name: str) -> Values:
        """A figure's values; all NaN where no step has it."""
        return self.figures.get(name, np.full(len(self.steps), np.nan))

    def final(self, name: str) -> float:
        """The mean of a figure over the last tenth of the steps; NaN where there is none."""
        values = self.get(name)
        last = values[-max(1, int(len(values) * report.FINAL)) :]
        last = last[np.isfinite(last)]
        return float(last.mean()) if len(last) else float("nan")

    @property
    def accuracy(self) -> float:
        """Held-out, of the last evaluation; NaN before the first."""
        return float(self.evaluations[-1]["accuracy"]) if self.evaluations else float("nan")

    def step_at(self, when: float) -> float:
        """How many steps were done by then."""
        return float(np.searchsorted(self.get("time"), when))


def read(path: Path) -> Series:
    """All that a run's directory tells."""
    run = RunDir(path)
    lines = [line for line in read_lines(run.metrics) if "step" in line]
    names = sorted(
        {name for line in lines for name, value in line.items() if isinstance(value, (int, float))}
    )
    figures = {name: np.array([line.get(name, np.nan) for line in lines], float) for name in names}
    activity = read_lines(run.activity)
    return Series(
        path, read_json(run.run_json).get("config", {}), figures.get("step", np.zeros(0)), figures,
        [line for line in read_lines(run.evaluations) if line.get("accuracy") is not None],
        [line for line in activity if "states" in line], _restarts(run, activity),
    )  # fmt: skip


def _restarts(run: RunDir, activity: list[dict[str, Any]]) -> list[Restart]:
    """All but the first start."""
    found = [
        Restart(line["time"], line["name"])
        for line in activity
        if line.get("event") == "started again"
    ]
    if activity:
        starts = [line["time"] for line in activity if line.get("event") == "attempt"]
    else:
        starts = [
            (path / "start.json").stat().st_mtime
            for path in report.attempts(run)
            if (path / "start.json").exists()
        ]
    found += [Restart(start, f"attempt {number}") for number, start in enumerate(starts) if number]
    return sorted(found, key=lambda each: each.time)


# --- a timeline: what share of each of some bins of time went where


def phases(series: Series, edges: Values) -> dict[str, Values]:
    """The learner's phases: {name: share of each bin}. What a step spent outside of them ("other") came first in it."""
    ends, whole = series.get("time"), np.nan_to_num(series.get("time/step"))
    spent = {name: np.nan_to_num(series.get(f"time/{name}")) for name in PHASES}
    at = ends - whole
    shares = {}
    for name, seconds in {"other": np.maximum(0.0, whole - sum(spent.values())), **spent}.items():
        shares[name] = _shares(at, at + seconds, np.ones(len(at)), edges)
        at = at + seconds
    return shares


def states(series: Series, kind: str, edges: Values, hold_s: float) -> dict[str, Values]:
    """The states of the members of a kind: {state: share of members in each bin}. A sample holds until the next, at most `hold_s`."""
    samples = [
        (line["time"], line["states"][kind]) for line in series.activity if kind in line["states"]
    ]
    if not samples:
        return {}
    starts = np.array([when for when, _ in samples])
    ends = np.minimum(np.append(starts[1:], np.inf), starts + hold_s)
    names = sorted({name for _, counts in samples for name in counts})
    totals = np.array([sum(counts.values()) for _, counts in samples], float)
    return {
        name: _shares(
            starts, ends, np.array([counts.get(name, 0) for _, counts in samples]) / totals, edges
        )
        for name in names
    }


def _shares(starts: Values, ends: Values, weights: Values, edges: Values) -> Values:
    """How much of each bin the weighted intervals cover, in [0, 1]. The intervals are in order and do not overlap."""
    if not len(starts):
        return np.zeros(len(edges) - 1)
    points = np.maximum.accumulate(np.column_stack([starts, ends]).ravel())
    covered = np.cumsum(np.column_stack([np.zeros(len(starts)), (ends - starts) * weights]).ravel())
    return np.clip(np.diff(np.interp(edges, points, covered)) / np.diff(edges), 0.0, 1.0)


# --- a sweep


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        key: value
        for name, below in config.items()
        for key, value in flat(below, f"{prefix}.{name}" if prefix else name).items()
    }


def compared(runs: Iterable[Series]) -> list[str]:
    """The keys whose values differ between runs, but for what only tells repetitions apart."""
    configs = [flat(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config if not NOT_COMPARED.match(key)})
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def grouped(runs: Iterable[Series], keys: list[str]) -> Groups:
    """The runs by their values of `keys`; those in one group differ in their seed."""
    groups: Groups = {}
    for run in runs:
        config = flat(run.config)
        groups.setdefault(tuple(_hashable(config.get(key)) for key in keys), []).append(run)
    return dict(
        sorted(
            groups.items(),
            key=lambda item: [
                (isinstance(value, str), value if value is not None else -1) for value in item[0]
            ],
        )
    )


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
