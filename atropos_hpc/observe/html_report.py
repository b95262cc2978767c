"""The report: one HTML page that needs no network, and its plots as PNG files beside it.

Of a run: its results, every metric over steps, the timeline of its members, and an excerpt of its
rollouts. Of a sweep: what it compares, the curves and final values of its points, their differences
from the best point, and the command that trains that one.

Rollouts, texts, restarts and the points of curves are limited, so a long run has no large page.
"""

import base64
import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from atropos_hpc.contracts.metrics import Rollout
from atropos_hpc.contracts.status import PointStatus
from atropos_hpc.observe import comparison, excerpt, history, plots, report, status
from atropos_hpc.observe.history import Config, History
from atropos_hpc.observe.status_view import duration, number
from atropos_hpc.observe.summary import summarize
from atropos_hpc.runtime import shell
from atropos_hpc.runtime.run_dir import RunDir, write_file

DPI = 144
PROMPT_CHARS, COMPLETION_CHARS = 1000, 2000  # of a sequence that are shown
RESTARTS = 200  # the last of which are listed


def write(directory: Path, rows: Sequence[PointStatus], out: Path) -> Path:
    """Write the report of the run or sweep in `directory` into `out`, and return the page's path.

    `rows` are the points of it. Raises OSError.
    """
    out.mkdir(parents=True, exist_ok=True)  # before anything is drawn: it may be refused
    runs = [history.read(Path(row.run_dir)) for row in rows]
    if report.is_run(directory):
        drawn, values = plots.run_plots(runs[0]), _run_values(runs[0], rows[0])
    else:
        keys = history.compared_keys(runs)
        drawn, values = plots.sweep_plots(runs, keys), _sweep_values(rows, runs, keys)
    page = out / "report.html"
    title = "/".join(directory.resolve().parts[-2:])
    html = _template().render(**values, title=title, images=_write_images(drawn, out))
    write_file(page, html.encode(), durable=False)
    return page


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("atropos_hpc.observe", "templates")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)  # type: ignore[arg-type]
    environment.filters |= {"number": number, "duration": duration, "local": _local}
    environment.filters |= {"short": history.short_keys, "versions": _versions, "cut": _cut}
    environment.filters["value_in"] = lambda name, values: values.get(name)
    environment.filters["signed"] = lambda value: f"{value:+.3g}" if isfinite(value) else "-"
    environment.globals |= {"now": time.time, "results": comparison.RESULTS}
    return environment.get_template("report.html.j2")


def _local(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _versions(each: Rollout) -> str:
    return "-".join(map(str, dict.fromkeys(each.policy_versions or ())))


def _cut(text: str, limit: int) -> str:
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[:limit]} [... {left_out:,} more characters]"


def _write_images(figures: Mapping[str, Figure | None], out: Path) -> dict[str, tuple[str, str]]:
    """Write each figure as a PNG file, and return {name: (data URL, description)}."""
    images = {}
    for name, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=DPI, format="png")
            write_file(out / f"{name}.png", buffer.getvalue(), durable=False)
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            images[name] = (url, _describe_figure(figure))
    return images


def _describe_figure(figure: Figure) -> str:
    """Describe a figure in words: its title, and where each of its curves begins and ends."""
    first, parts = figure.axes[0], []
    for line in first.lines:
        label, values = str(line.get_label()), np.asarray(line.get_ydata(), float)
        if not label.startswith("_") and len(values):
            parts.append(f"{label} from {values[0]:.3g} to {values[-1]:.3g}")
    rows = ", ".join(axes.get_ylabel() for axes in figure.axes)
    title = first.get_title(loc="left") or f"Timeline of {rows}"
    return title + (": " + "; ".join(parts) if parts else "")


def _run_values(run: History, row: PointStatus) -> dict[str, object]:
    info = RunDir(run.path).info()
    rollouts = excerpt.read(RunDir(run.path), run.lines[-1].step if run.lines else 0)
    return {
        "run": run,
        "point": row,
        "summary": (summary := summarize(RunDir(run.path), run.lines)),
        "rules": list(dict.fromkeys(name for e in summary.evaluations for name in e.metrics)),
        "shares": status.time_shares(run.lines),
        "excerpt": rollouts,
        "environments": sorted({each.environment for each in rollouts.rollouts}),
        "limits": {"prompt": PROMPT_CHARS, "completion": COMPLETION_CHARS, "restarts": RESTARTS},
        "about": _describe(run.config),
        "created": info.created if info is not None else 0.0,
        "command": command(row),
    }


def _sweep_values(
    rows: Sequence[PointStatus], runs: Sequence[History], keys: Sequence[str]
) -> dict[str, object]:
    best = report.best(rows)
    best_run = next((run for row, run in zip(rows, runs, strict=True) if row is best), None)
    states = Counter(row.state for row in rows)
    return {
        "points": list(zip(rows, runs, strict=True)),
        "states": ", ".join(f"{count} {state}" for state, count in states.items()),
        "keys": keys,
        "best": best,
        "axes": comparison.axes(runs, keys),
        "differences": best_run and [comparison.difference(run, best_run) for run in runs],
        "command": command(best) if best is not None else None,
    }


def _describe(config: Config) -> str:
    """Name the model and the environment."""
    path, make = config.get("model.path"), config.get("model.make")
    model = str(make).rpartition(".")[2] if make else Path(str(path or "?")).name
    return f"{model} on {str(config.get('environment.target', '?')).rpartition(':')[2]}"


def command(row: PointStatus) -> str:
    """Return the command that trains a run again, in a new directory."""
    directory = Path(row.run_dir)
    info = RunDir(directory).info()
    argv = row.overrides or (info.command if info is not None else [])
    fixed = ("run_dir=", "hydra")
    overrides = [each for each in argv if "=" in each and not each.startswith(fixed)]
    again = shell.override("run_dir", f"runs/again-{'-'.join(directory.parts[-2:])}")
    return shell.printed("python", "-m", "atropos_hpc.train", *overrides, again)
