"""The report's plots. Each function returns a Figure, or None where there is nothing to draw."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from atropos_hpc.contracts.metrics import HISTOGRAM_EDGES, evaluation_metrics
from atropos_hpc.observe import history
from atropos_hpc.observe.history import ConfigValue, History, RunGroups, Values
from atropos_hpc.observe.timeline import MAX_INTERVAL_S

Line = tuple[str, str, str]  # metric, colour, label
Final = Callable[[History], float]  # a run's final value

WIDTH, SIZE = 11.0, (5.4, 3.0)  # inches
MAX_POINTS = 400  # of a curve; steps in between are averaged and their range is shaded
FEW_POINTS = 15  # are marked
BINS = 330
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d97b29", "#3a923a", "#c03d3e"
GREY, PURPLE, LIGHT_BLUE, SAND, PALE = "#8a8a8a", "#8763b0", "#7aa6d6", "#e8c9a0", "#d4d4d4"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, "#845b53", "#d684bd", "#7f7f00", "#17a2b8", "#4c4c4c")
PHASE_COLORS = {"wait": SAND, "batch": LIGHT_BLUE, "log_probs": "#5588c7", "update": BLUE}
PHASE_COLORS |= {"publish": GREEN, "checkpoint": PURPLE, "other": PALE}
STATE_COLORS = {"evaluating version": PURPLE, "loading": LIGHT_BLUE, "idle": SAND, "silent": RED}
STATE_COLORS |= dict.fromkeys(("generating", "serving", "training", "running"), BLUE)
STATE_COLORS |= {"ended": "#f5f5f5"}
WAIT_COLORS = (SAND, "#dbb27c", "#cf9b58", "#f1dcc1")
LABELS = {
    "wait": "waiting for data",
    "batch": "building the batch",
    "log_probs": "log-probs",
    "publish": "publishing",
    "update": "training",
    "checkpoint": "checkpointing",
    "other": "starting",
    "registering": "starting",
    "evaluating version": "evaluating",
}


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def _finish(axes: Axes, title: str, y: str = "", x: str = "step", from_zero: bool = False) -> None:
    """Label the axes, with a legend where several lines have a label."""
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    if from_zero and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)
    labels = axes.get_legend_handles_labels()[1]
    if 1 < len(labels) <= len(CYCLE):
        axes.legend(fontsize=8, frameon=False, loc="best")


def draw_curve(axes: Axes, x: Values, y: Values, color: str, label: str | None = None) -> bool:
    """Draw a curve of at most MAX_POINTS points. Returns False if there is nothing to draw."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(y):
        return False
    starts = np.linspace(0, len(y), min(MAX_POINTS, len(y)) + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, len(y)))
    at, mean = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    if len(y) > MAX_POINTS:
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    window = max(1, len(mean) // 25)
    if window > 1:  # single steps are noisy: draw them faintly behind their moving average
        axes.plot(at, mean, color=color, linewidth=0.7, alpha=0.35)
        padded = np.pad(mean, (window // 2, window - 1 - window // 2), mode="edge")
        mean = np.convolve(padded, np.ones(window) / window, mode="valid")
    marker = "o" if len(y) < FEW_POINTS else None
    axes.plot(at, mean, color=color, linewidth=1.6, label=label, marker=marker, markersize=3)
    return True


def _mark_restarts(axes: Axes, run: History, to_x: Callable[[float], float]) -> None:
    for restart in run.restarts:
        axes.axvline(to_x(restart.time), color=RED, linewidth=0.9, linestyle=(0, (2, 2)), alpha=0.8)


# --- a run


def curves(run: History, title: str, unit: str, lines: Sequence[Line]) -> Figure | None:
    """Draw metrics over steps."""
    figure, axes = _axes()
    drawn = [draw_curve(axes, run.steps, run.scalar(name), *rest) for name, *rest in lines]
    if not any(drawn):
        return None
    _mark_restarts(axes, run, run.step_at)
    _finish(axes, title, unit, from_zero=True)
    return figure


def learning(run: History) -> Figure | None:
    """Draw the training reward and the accuracy on held-out problems."""
    figure, axes = _axes()
    drawn = draw_curve(axes, run.steps, run.scalar("reward/mean"), BLUE, "reward, training")
    if not drawn and not run.evaluations:
        return None
    if run.evaluations:
        versions = np.array([each.version for each, _ in run.evaluations], float)
        for rule, color in (("strict_accuracy", GREEN), ("flexible_accuracy", PURPLE)):
            values = [evaluation_metrics(each).get(rule) for each, _ in run.evaluations]
            draw_curve(axes, versions, np.array(values, float), color, rule.replace("_", " "))
        accuracies = np.array([accuracy for _, accuracy in run.evaluations])
        draw_curve(axes, versions, accuracies, ORANGE, "accuracy, held out")
        label = f"{accuracies[-1]:.3f}  "
        axes.text(
            versions[-1], accuracies[-1], label, fontsize=8, color=ORANGE, ha="right", va="bottom"
        )
    _mark_restarts(axes, run, run.step_at)
    _finish(axes, "Reward and held-out accuracy")
    return figure


def throughput(run: History) -> Figure | None:
    """Draw the tokens per second that were trained and generated."""
    figure, axes = _axes()
    drawn = draw_curve(axes, run.steps, run.scalar("perf/throughput"), BLUE, "trainer: trained")
    steps = np.array([run.step_at(line.time) for line in run.activity])
    rates = np.array([line.tokens_per_s for line in run.activity], float)
    drawn |= draw_curve(axes, steps, rates, GREEN, "rollout: generated")
    if not drawn:
        return None
    _mark_restarts(axes, run, run.step_at)
    _finish(axes, "Throughput", "tokens per second", from_zero=True)
    return figure


def histogram(run: History, name: str, title: str, x: str) -> Figure | None:
    """Draw one of the steps' histograms: of the first, the middle and the last third of them."""
    counts = np.array([found for line in run.lines if (found := line.histograms.get(name))])
    if not counts.sum():
        return None
    edges = [f"{edge:g}" for edge in HISTOGRAM_EDGES[name]]
    labels = [f"≤ {edges[0]}", *(f"≤ {edge}" for edge in edges[1:]), f"> {edges[-1]}"]
    used = np.flatnonzero(counts.sum(0))
    bins = slice(used[0], used[-1] + 1)
    names = ("first third of the steps", "middle third", "last third")
    parts = np.array_split(counts, 3) if len(counts) >= len(names) else [counts]
    figure, axes = _axes()
    for index, (part, label) in enumerate(zip(parts, names, strict=False)):
        shares = part.sum(0)[bins] / part.sum()
        at = np.arange(len(shares)) + 0.27 * (index - (len(parts) - 1) / 2)
        color = (PALE, LIGHT_BLUE, BLUE)[index - len(parts)]
        axes.bar(at, shares, 0.25, color=color, label=label if len(parts) > 1 else None)
    axes.set_yscale("log")
    axes.set_xticks(range(len(labels[bins])), labels[bins], rotation=45)
    _finish(axes, title, "share", x)
    return figure


def environments(run: History) -> Figure | None:
    """Draw the reward of each environment, where there are several."""
    found = {name for line in run.lines for name in line.scalars}
    names = sorted(name for name in found if re.fullmatch("reward/.+/mean", name))
    lines = [
        (name, CYCLE[index % len(CYCLE)], name.split("/", 1)[1].removesuffix("/mean"))
        for index, name in enumerate(names)
    ]
    return curves(run, "Reward by environment", "", lines)


CURVES: dict[str, tuple[str, str, list[Line]]] = {
    "kl": ("KL to the reference", "nats per token", [("kl_reference", BLUE, "KL")]),
    "entropy": ("Entropy of the policy", "nats per token", [("entropy", BLUE, "entropy")]),
    "lengths": (
        "Lengths",
        "tokens",
        [
            ("response_length_mean", BLUE, "response, mean"),
            ("length_mean", GREEN, "sequence, mean"),
            ("length_max", GREY, "sequence, longest"),
        ],
    ),
    "staleness": (
        "Staleness of the trained sequences",
        "policy versions",
        [
            ("off_policy/staleness_mean", BLUE, "mean"),
            ("off_policy/staleness_max", GREY, "largest"),
            ("off_policy/staleness_limit", RED, "limit"),
        ],
    ),
    "gradient": ("Gradient norm before clipping", "", [("grad_norm", BLUE, "norm")]),
    "per_gpu": (
        "Throughput per GPU",
        "tokens per second",
        [
            ("perf/throughput_per_gpu", BLUE, "trainer: trained"),
            ("perf/rollout/throughput_per_gpu", GREEN, "rollout: generated"),
        ],
    ),
    "mfu": ("MFU of the update", "", [("perf/mfu", BLUE, "MFU")]),
    "memory": (
        "Peak memory of a trainer rank",
        "GiB",
        [("perf/peak_memory_gib", BLUE, "since its start")],
    ),
    "off_policy": (
        "Distance to the behaviour policy",
        "",
        [("clip_fraction", BLUE, "tokens clipped"), ("ppo_kl", ORANGE, "KL old to new")],
    ),
}


HISTOGRAMS = {
    "ratio": ("Ratio learner / behaviour of trained tokens", "ratio"),
    "staleness": ("Staleness of sequences, histogram", "policy versions"),
}


def run_plots(run: History) -> dict[str, Figure | None]:
    drawn = {
        "timeline": timeline(run),
        "learning": learning(run),
        "environments": environments(run),
    }
    drawn |= {name: curves(run, *arguments) for name, arguments in CURVES.items()}
    drawn |= {f"{name}_histogram": histogram(run, name, *of) for name, of in HISTOGRAMS.items()}
    return {**drawn, "throughput": throughput(run)}


def timeline(run: History) -> Figure | None:
    """Draw the learner's phases over time, and the states of the members of each kind."""
    times = [*run.times, *(line.time for line in run.activity)]
    if len(times) < 2:
        return None
    first = min([*times, *(run.times - run.step_s)[:1]])
    edges = np.linspace(first, max(times), BINS + 1)
    hold_s = max(2 * MAX_INTERVAL_S, 2 * (edges[1] - edges[0]))
    rows = {"learner": history.phase_shares(run, edges)}
    for kind in ("server", "environment", "evaluator", "trajectories"):
        if shares := history.state_shares(run, kind, edges, hold_s):
            rows[kind] = shares
    figure = Figure(figsize=(WIDTH, 0.9 + 0.62 * len(rows)), layout="constrained")
    unit, seconds = ("hours", 3600.0) if edges[-1] - edges[0] > 3 * 3600 else ("minutes", 60.0)
    axes: Any = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    legend: dict[str, list[str]] = {}  # colour -> what it stands for
    for each, (name, shares) in zip(axes, rows.items(), strict=True):
        _timeline_row(each, name, shares, (edges - edges[0]) / seconds, legend)
        _mark_restarts(each, run, lambda when: (when - edges[0]) / seconds)
    note = "; dashed: a process was restarted" if run.restarts else ""
    axes[-1].set_xlabel(f"{unit} since the start{note}", fontsize=8)
    labels = [",\n".join(dict.fromkeys(names)) for names in legend.values()]
    handles = [Patch(color=color) for color in legend]
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _timeline_row(
    axes: Axes, name: str, shares: dict[str, Values], x: Values, legend: dict[str, list[str]]
) -> None:
    """Draw the stacked shares of one row, and add its colours to the legend."""
    below = np.zeros(BINS)
    for state, color in _colored(name, shares):
        axes.bar(x[:-1], shares[state], np.diff(x), below, color=color, align="edge", linewidth=0)
        below += shares[state]
        legend.setdefault(color, []).append(LABELS.get(state, state))
    axes.set(ylim=(0, 1), xlim=(x[0], x[-1]), yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _colored(row: str, shares: dict[str, Values]) -> list[tuple[str, str]]:
    """Return (state, colour) in stacking order, without states that hardly occur."""
    present = [name for name, share in shares.items() if share.sum() > 1e-3 * len(share)]
    if row == "learner":
        order = (*history.PHASES, "other")
        return [(name, PHASE_COLORS[name]) for name in order if name in present]
    waits = [name for name in present if name.startswith("waiting")]
    busy = [name for name in present if name not in waits]
    busy.sort(key=lambda name: (name not in STATE_COLORS, name))
    colored = [(name, STATE_COLORS.get(name, PALE)) for name in busy]
    return colored + [(n, WAIT_COLORS[i % len(WAIT_COLORS)]) for i, n in enumerate(waits)]


# --- a sweep


def sweep_plots(runs: Sequence[History], keys: Sequence[str]) -> dict[str, Figure | None]:
    """Draw every plot of a sweep, by name. `keys`: what the sweep compares."""
    groups = history.grouped(runs, keys)
    kl: Final = lambda run: run.final("kl_reference")  # noqa: E731
    accuracy: Final = lambda run: run.accuracy  # noqa: E731
    reward: Final = lambda run: run.final("reward/mean")  # noqa: E731
    nats = "nats per token"
    drawn = {
        "reward": compare(groups, keys, "reward/mean", "Reward, training"),
        "accuracy": compare(groups, keys, "accuracy", "Accuracy, held out"),
        "kl": compare(groups, keys, "kl_reference", "KL to the reference", nats),
        "entropy": compare(groups, keys, "entropy", "Entropy", nats),
    }
    for key, short in history.short_keys(keys).items():
        drawn[f"{short}_accuracy"] = against(runs, key, accuracy, "accuracy, held out")
        drawn[f"{short}_kl"] = against(runs, key, kl, f"KL to the reference, {nats}")
    drawn["final_accuracy"] = final_values(groups, keys, accuracy, "held-out accuracy")
    drawn["final_reward"] = final_values(groups, keys, reward, "reward")
    drawn["final_kl"] = final_values(groups, keys, kl, f"KL to the reference, {nats}")
    return drawn


def _label(keys: Sequence[str], values: Sequence[ConfigValue]) -> str:
    pairs = zip(history.short_keys(keys).values(), values, strict=True)
    text = ", ".join(f"{short} {value}" for short, value in pairs)
    return text.replace("$", r"\$") or "all points"  # between two of them would be TeX


def compare(
    groups: RunGroups, keys: Sequence[str], name: str, title: str, unit: str = ""
) -> Figure | None:
    """Draw a metric over steps for each group: its mean over seeds, and their range."""
    figure, axes = _axes()
    drawn = False
    for index, (values, runs) in enumerate(groups.items()):
        points = [found for run in runs if (found := run.points(name))]
        if common := sorted(set.intersection(*map(set, points)) if points else ()):
            color = CYCLE[index % len(CYCLE)]
            x, rows = (
                np.array(common, float),
                np.array([[of[at] for at in common] for of in points]),
            )
            if len(rows) > 1:
                low, high = rows.min(0), rows.max(0)
                axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            drawn |= draw_curve(axes, x, rows.mean(0), color, _label(keys, values))
    _finish(axes, title, unit)
    return figure if drawn else None


def final_values(groups: RunGroups, keys: Sequence[str], final: Final, name: str) -> Figure | None:
    """Draw the final values of each group: a dot per seed, their mean and range."""
    rows = []
    for key_values, runs in groups.items():
        if known := [value for run in runs if np.isfinite(value := final(run))]:
            rows.append((_label(keys, key_values), known))
    if not rows:
        return None
    figure, axes = _axes((SIZE[0], 0.9 + 0.3 * len(rows)))
    for index, (_, values) in enumerate(rows):
        color, y = CYCLE[index % len(CYCLE)], len(rows) - 1 - index
        axes.plot([min(values), max(values)], [y, y], color=color, linewidth=2, alpha=0.5)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.7)
        axes.plot(float(np.mean(values)), y, "|", color=color, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _finish(axes, "Final values by seed", x=name)
    return figure


def against(runs: Sequence[History], key: str, final: Final, name: str) -> Figure | None:
    """Draw final values over the values of a numeric key: a dot per run, a line through means."""
    points = [
        (float(x), y)
        for run in runs
        if isinstance(x := run.config.get(key), (int, float)) and np.isfinite(y := final(run))
    ]
    values = sorted({x for x, _ in points})
    if len(values) < 2:
        return None
    figure, axes = _axes()
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, "o", color=BLUE, markersize=5, alpha=0.6)
    means = [float(np.mean([y for x, y in points if x == value])) for value in values]
    axes.plot(values, means, color=BLUE, linewidth=1.4)
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) >= 10:
        axes.set_xscale("symlog", linthresh=min(positive))  # linear around 0, which log excludes
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    _finish(axes, f"Final values against {key.rpartition('.')[2]}", name, x=key)
    return figure
