"""The points of a sweep beside each other: as parallel coordinates, and as differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atropos_hpc.observe.history import ConfigValue, History, compared_keys, short_keys

RESULTS = {"accuracy": "accuracy", "reward": "reward/mean", "KL": "kl_reference"}
TICKS = 6  # of an axis, at most


def result(run: History, name: str) -> float:
    """Return one of RESULTS; NaN where the run has none."""
    return run.accuracy if name == "accuracy" else run.final(RESULTS[name])


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates. Heights are in [0, 1]."""

    name: str
    ticks: list[tuple[float, str]]
    heights: list[float | None]  # of each run; None: it has no value


def axes(runs: Sequence[History], keys: Sequence[str]) -> list[Axis]:
    """Return an axis for each key, with its values evenly spaced, and for each result."""
    short = short_keys(keys).items()
    found = [_values(name, [run.config.get(key) for run in runs]) for key, name in short]
    results = (_results(name, [result(run, name) for run in runs]) for name in RESULTS)
    return found + [axis for axis in results if any(y is not None for y in axis.heights)]


def _values(name: str, values: Sequence[ConfigValue]) -> Axis:
    def order(value: ConfigValue) -> tuple[bool, float, str]:
        numeric = isinstance(value, (int, float))
        return (not numeric, float(value) if numeric else 0.0, str(value))  # type: ignore[arg-type]

    distinct = sorted(set(values), key=order)
    height = {value: index / max(1, len(distinct) - 1) for index, value in enumerate(distinct)}
    ticks = [(height[value], str(value)) for value in distinct]
    return Axis(name, ticks[:: -(-len(ticks) // TICKS)], [height[value] for value in values])


def _results(name: str, values: Sequence[float]) -> Axis:
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def height(value: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    heights = [height(value) if math.isfinite(value) else None for value in values]
    return Axis(name, [(height(value), f"{value:.3g}") for value in sorted({low, high})], heights)


@dataclass(frozen=True)
class Difference:
    changed: list[tuple[str, ConfigValue, ConfigValue]]  # key, the other's value, this run's
    results: dict[str, float]  # this run's minus the other's


def difference(run: History, other: History) -> Difference:
    """Compare a run with another, by the keys that differ and their results."""
    keys = compared_keys([other, run])
    if run.config.get("seed") != other.config.get("seed"):
        keys.append("seed")
    changed = [(key, other.config.get(key), run.config.get(key)) for key in keys]
    return Difference(changed, {name: result(run, name) - result(other, name) for name in RESULTS})
