"""The report's figures, by matplotlib. Each is a function from series to a Figure, or None where there is nothing to draw."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from atropos_hpc.observe import history
from atropos_hpc.observe.history import Groups, Series, Values
from atropos_hpc.observe.timeline import SPARSEST_S

WIDE, NARROW = (11.0, 3.3), (5.4, 3.0)  # inches
POINTS = 400  # of a curve; steps in between are averaged, their range is shaded
BINS = 330
BLUE, ORANGE, GREEN, RED, GREY, PURPLE = (
    "#2f6db5",
    "#d97b29",
    "#3a923a",
    "#c03d3e",
    "#8a8a8a",
    "#8763b0",
)
STARTING = "#d4d4d4"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, "#845b53", "#d684bd", "#7f7f00", "#17a2b8", "#4c4c4c")
PHASE_COLORS = {"wait": "#e8c9a0", "batch": "#7aa6d6", "log_probs": "#5588c7", "update": BLUE, "publish": GREEN, "checkpoint": PURPLE,
                "other": STARTING}  # fmt: skip
WORDS = {"wait": "waiting for data", "batch": "making the batch", "log_probs": "log-probs", "publish": "publishing", "update": "training",
         "checkpoint": "checkpointing", "other": "starting", "registering": "starting", "evaluating version": "evaluating"}  # fmt: skip
BUSY = {"generating": BLUE, "serving": BLUE, "training": BLUE, "running": BLUE, "evaluating version": PURPLE, "loading": "#7aa6d6",
        "idle": "#e8c9a0", "ended": "#f5f5f5", "silent": RED}  # fmt: skip
WAITING = ("#e8c9a0", "#dbb27c", "#cf9b58", "#f1dcc1")


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _curve(axes: Axes, x: Values, y: Values, color: str, label: str | None = None) -> bool:
    """A curve of at most POINTS points over its range. False: there is nothing to draw."""
    there = np.isfinite(y)
    x, y = x[there], y[there]
    if not len(y):
        return False
    cuts = np.linspace(0, len(y), min(POINTS, len(y)) + 1).astype(int)[:-1]
    counts = np.diff(np.append(cuts, len(y)))
    at, mean = np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts
    if len(y) > POINTS:
        axes.fill_between(
            at,
            np.minimum.reduceat(y, cuts),
            np.maximum.reduceat(y, cuts),
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    window = max(1, len(mean) // 25)
    if window > 1:  # single steps are noisy: they stand faint behind their moving mean
        axes.plot(at, mean, color=color, linewidth=0.7, alpha=0.35)
        padded = np.pad(mean, (window // 2, window - 1 - window // 2), mode="edge")
        mean = np.convolve(padded, np.ones(window) / window, mode="valid")
    axes.plot(
        at,
        mean,
        color=color,
        linewidth=1.6,
        label=label,
        marker="o" if len(y) == 1 else None,
        markersize=3,
    )
    return True


def _marks(axes: Axes, run: Series, to_x: Callable[[float], float]) -> None:
    """Where something was started again."""
    for restart in run.restarts:
        axes.axvline(to_x(restart.time), color=RED, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.8)


def curves(
    run: Series, title: str, lines: Iterable[tuple[str, str, str]], unit: str, zero: bool = True
) -> Figure | None:
    """Figures over steps. `lines`: (name in metrics.jsonl, colour, label)."""
    figure, axes = _figure(NARROW)
    drawn = [_curve(axes, run.steps, run.get(name), color, label) for name, color, label in lines]
    if not any(drawn):
        return None
    _marks(axes, run, run.step_at)
    _finish(axes, title, unit, zero, legend=len(drawn) > 1)
    return figure


def _finish(axes: Axes, title: str, unit: str, zero: bool, legend: bool, x: str = "step") -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    if zero and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="best")


def learning(run: Series) -> Figure | None:
    """The reward of training, and the accuracy on held-out problems."""
    figure, axes = _figure(NARROW)
    drawn = _curve(axes, run.steps, run.get("reward"), BLUE, "reward, training")
    if run.evaluations:
        versions, accuracies = (
            [e["version"] for e in run.evaluations],
            [e["accuracy"] for e in run.evaluations],
        )
        axes.plot(
            versions,
            accuracies,
            color=ORANGE,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label="accuracy, held out",
        )
        axes.annotate(f"{accuracies[-1]:.3f}", (versions[-1], accuracies[-1]), (0, 6), textcoords="offset points", fontsize=8, ha="right",
                      color=ORANGE)  # fmt: skip
    elif not drawn:
        return None
    _marks(axes, run, run.step_at)
    _finish(axes, "Reward and held-out accuracy", "", zero=False, legend=True)
    return figure


def throughput(run: Series) -> Figure | None:
    """Tokens per second: trained on, and generated."""
    figure, axes = _figure(NARROW)
    drawn = _curve(axes, run.steps, run.get("tokens_per_s"), BLUE, "trainer: tokens trained on")
    if run.activity:
        steps = np.array([run.step_at(line["time"]) for line in run.activity])
        drawn |= _curve(
            axes,
            steps,
            np.array([line["tokens_per_s"] for line in run.activity], float),
            GREEN,
            "rollout: tokens generated",
        )
    if not drawn:
        return None
    _marks(axes, run, run.step_at)
    _finish(axes, "Throughput", "tokens per second", zero=True, legend=True)
    return figure


def rewards(run: Series) -> list[tuple[str, str, str]]:
    """A line for the reward of each environment, where there are several."""
    names = sorted(name for name in run.figures if name.startswith("reward/"))
    return [
        (name, CYCLE[number % len(CYCLE)], name.removeprefix("reward/"))
        for number, name in enumerate(names)
    ]


OF_A_RUN: dict[str, Callable[[Series], Figure | None]] = {
    "learning": learning,
    "environments": lambda run: curves(run, "Reward by environment", rewards(run), ""),
    "kl": lambda run: curves(run, "KL to the reference", [("kl_reference", BLUE, "KL")], "nats per token"),
    "entropy": lambda run: curves(run, "Entropy of the policy", [("entropy", BLUE, "entropy")], "nats per token"),
    "lengths": lambda run: curves(
        run, "Lengths", [("response_length_mean", BLUE, "response, mean"), ("length_mean", GREEN, "sequence, mean"),
                         ("length_max", GREY, "sequence, longest")], "tokens"),
    "staleness": lambda run: curves(
        run, "Staleness of what is trained on", [("staleness_mean", BLUE, "mean"), ("staleness_max", GREY, "largest"),
                                                 ("staleness_limit", RED, "limit")], "policy versions"),
    "gradient": lambda run: curves(run, "Gradient norm, before clipping", [("grad_norm", BLUE, "norm")], ""),
    "off_policy": lambda run: curves(
        run, "How far the sampled policy was", [("clip_fraction", BLUE, "tokens clipped"), ("ppo_kl", ORANGE, "KL old to new")], ""),
    "throughput": throughput,
}  # fmt: skip


def timeline(run: Series) -> Figure | None:
    """Who did what, when: the learner's phases, and what share of the members of each kind was in which state."""
    times = [
        *run.get("time")[np.isfinite(run.get("time"))],
        *(line["time"] for line in run.activity),
    ]
    if len(times) < 2:
        return None
    first = min(
        min(times),
        float((run.get("time") - np.nan_to_num(run.get("time/step")))[0])
        if len(run.steps)
        else min(times),
    )
    edges = np.linspace(first, max(times), BINS + 1)
    hold = max(2 * SPARSEST_S, 2 * (edges[1] - edges[0]))
    seen = {kind for line in run.activity for kind in line["states"]}
    kinds = [
        kind for kind in ("server", "environment", "evaluator", "trajectories") if kind in seen
    ]
    rows: dict[str, dict[str, Values]] = {"learner": history.phases(run, edges)}
    rows |= {kind: history.states(run, kind, edges, hold) for kind in kinds}
    figure = Figure(figsize=(WIDE[0], 0.9 + 0.62 * len(rows)), layout="constrained")
    unit, seconds = ("hours", 3600.0) if edges[-1] - edges[0] > 3 * 3600 else ("minutes", 60.0)
    x = (edges - edges[0]) / seconds
    axes: Any = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    legend: dict[str, list[str]] = {}  # colour -> what it stands for
    for each, (name, shares) in zip(axes, rows.items(), strict=True):
        below = np.zeros(BINS)
        for state, color in _colored(name, shares):
            each.bar(
                x[:-1], shares[state], np.diff(x), below, color=color, align="edge", linewidth=0
            )
            below += shares[state]
            legend.setdefault(color, []).append(WORDS.get(state, state))
        each.set(ylim=(0, 1), xlim=(x[0], x[-1]), yticks=[])
        each.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        each.spines[["top", "right", "left"]].set_visible(False)
        each.tick_params(labelsize=8)
        _marks(each, run, lambda when: (when - edges[0]) / seconds)
    axes[-1].set_xlabel(
        f"{unit} since the start"
        + ("; dashed: something was started again" if run.restarts else ""),
        fontsize=8,
    )
    handles = [Patch(color=color) for color in legend]
    figure.legend(
        handles,
        [",\n".join(dict.fromkeys(of)) for of in legend.values()],
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    return figure


def _colored(row: str, shares: dict[str, Values]) -> list[tuple[str, str]]:
    """(state, colour), in the order in which they are stacked; states that hardly occur are left out."""
    present = [name for name, share in shares.items() if share.sum() > 1e-3 * len(share)]
    if row == "learner":
        return [
            (name, PHASE_COLORS[name]) for name in (*history.PHASES, "other") if name in present
        ]
    waits = [name for name in present if name.startswith("waiting")]
    rest = sorted(
        (name for name in present if name not in waits), key=lambda name: (name not in BUSY, name)
    )
    return [(name, BUSY.get(name, STARTING)) for name in rest] + [
        (name, WAITING[i % len(WAITING)]) for i, name in enumerate(waits)
    ]


# --- a sweep


def _name(keys: list[str], values: tuple[Any, ...]) -> str:
    """What a group is called in a legend."""
    return (
        ", ".join(
            f"{key.rpartition('.')[2]} {value}" for key, value in zip(keys, values, strict=True)
        )
        or "all points"
    )


def compared(groups: Groups, keys: list[str], name: str, title: str, unit: str) -> Figure | None:
    """One figure of every point: the mean over seeds of each group, and their range."""
    figure, axes = _figure(NARROW)
    drawn = False
    for number, (values, runs) in enumerate(groups.items()):
        color = CYCLE[number % len(CYCLE)]
        if name == "accuracy":
            known = [{e["version"]: e["accuracy"] for e in run.evaluations} for run in runs]
            x = np.array(sorted(set.intersection(*map(set, known))), float)
            rows = np.array([[of[int(version)] for version in x] for of in known])
        else:
            steps = min((len(run.steps) for run in runs), default=0)
            x = runs[0].steps[:steps]
            rows = np.array([run.get(name)[:steps] for run in runs])
        if not rows.size or not np.isfinite(rows).any():
            continue
        drawn = True
        if len(runs) > 1:
            axes.fill_between(x, rows.min(0), rows.max(0), color=color, alpha=0.12, linewidth=0)
        if name == "accuracy":
            axes.plot(
                x,
                rows.mean(0),
                color=color,
                marker="o",
                markersize=3,
                linewidth=1.5,
                label=_name(keys, values),
            )
        else:
            _curve(axes, x, rows.mean(0), color, _name(keys, values))
    if not drawn:
        return None
    _finish(axes, title, unit, zero=False, legend=len(groups) <= len(CYCLE))
    return figure


def finals(
    groups: Groups, keys: list[str], of: Callable[[Series], float], title: str, unit: str
) -> Figure | None:
    """The final values of every group: each seed a dot, their mean and range."""
    known = {
        values: [value for run in runs if np.isfinite(value := of(run))]
        for values, runs in groups.items()
    }
    rows = [(_name(keys, values), finals) for values, finals in known.items() if finals]
    if not rows:
        return None
    figure, axes = _figure((NARROW[0], 0.9 + 0.3 * len(rows)))
    for number, (_, values) in enumerate(rows):
        color, y = CYCLE[number % len(CYCLE)], len(rows) - 1 - number
        axes.plot([min(values), max(values)], [y, y], color=color, linewidth=2, alpha=0.5)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.7)
        axes.plot(float(np.mean(values)), y, "|", color=color, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _finish(axes, title, "", zero=False, legend=False, x=unit)
    return figure


def against(
    runs: list[Series], key: str, of: Callable[[Series], float], title: str, unit: str
) -> Figure | None:
    """Final values over the values of one numeric key; a dot for each point, a line through the means."""
    found = [
        (float(value), of(run))
        for run in runs
        if isinstance(value := history.flat(run.config).get(key), (int, float))
    ]
    found = [(x, y) for x, y in found if np.isfinite(y)]
    values = sorted({x for x, _ in found})
    if len(values) < 2:
        return None
    figure, axes = _figure(NARROW)
    axes.plot(
        [x for x, _ in found], [y for _, y in found], "o", color=BLUE, markersize=5, alpha=0.6
    )
    axes.plot(
        values,
        [float(np.mean([y for x, y in found if x == value])) for value in values],
        color=BLUE,
        linewidth=1.4,
    )
    above = [value for value in values if value > 0]
    if above and max(above) / min(above) >= 10:
        if values[0] <= 0:
            axes.set_xscale("symlog", linthresh=min(above))
        else:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    _finish(axes, title, unit, zero=False, legend=False, x=key)
    return figure
