"""The report as one HTML page that needs no network, and its figures as PNG files beside it.

Of a run: what came of it, every figure over steps, and the timeline of who did what. Of a sweep: what is compared, the curves and final
values of its points, and the best point with the command that trains it again.
"""

import base64
import io
import math
import shlex
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atropos_hpc.observe import history, plots, report, status
from atropos_hpc.observe.history import Series
from atropos_hpc.observe.status_view import duration, number
from atropos_hpc.observe.summary import summarize
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_file

DPI = 144
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.state { color: #666; margin: .2rem 0 1rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.facts div { border: 1px solid #e4e4e4; border-radius: 6px; padding: .45rem .8rem; } .facts b { display: block; font-size: 1.15rem; }
.facts span { color: #666; font-size: .8rem; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; align-items: start; } .figures .wide { grid-column: 1 / 3; }
img { width: 100%; height: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee; white-space: nowrap; vertical-align: top; }
tr.best td { background: #fff6e6; font-weight: 600; } .table { overflow-x: auto; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; border-radius: 6px; white-space: pre-wrap; }
@media (max-width: 800px) { .figures { grid-template-columns: 1fr; } .figures .wide { grid-column: 1; } }
"""


def write(directory: Path, rows: list[dict[str, Any]], out: Path) -> Path:
    """Draw the run or sweep in `directory`, whose points are `rows`, into `out`; returns the page. Raises OSError."""
    runs = [history.read(Path(row["run_dir"])) for row in rows]
    one = report.is_run(directory)
    drawn = _of_run(runs[0]) if one else _of_sweep(runs)
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in drawn.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format="png")
        write_file(out / f"{name}.png", buffer.getvalue(), durable=False)
        images[name] = buffer.getvalue()
    body = _run_body(runs[0], rows[0]) if one else _sweep_body(directory, rows, runs)
    page = out / "report.html"
    write_file(page, _html(directory.resolve().name, body, images).encode(), durable=False)
    return page


def _of_run(run: Series) -> dict[str, Figure | None]:
    return {
        "timeline": plots.timeline(run),
        **{name: draw(run) for name, draw in plots.OF_A_RUN.items()},
    }


def _of_sweep(runs: list[Series]) -> dict[str, Figure | None]:
    keys = history.compared(runs)
    groups = history.grouped(runs, keys)
    drawn: dict[str, Figure | None] = {
        name: plots.compared(groups, keys, of, title, unit)
        for name, of, title, unit in (
            ("reward", "reward", "Reward, training", ""), ("accuracy", "accuracy", "Accuracy, held out", ""),
            ("kl", "kl_reference", "KL to the reference", "nats per token"), ("entropy", "entropy", "Entropy", "nats per token"),
        )
    }  # fmt: skip
    kl = lambda run: run.final("kl_reference")  # noqa: E731
    for key in keys:
        short = key.rpartition(".")[2]
        drawn[f"{short}_accuracy"] = plots.against(
            runs, key, lambda run: run.accuracy, f"{short} against accuracy", "accuracy, held out"
        )
        drawn[f"{short}_kl"] = plots.against(
            runs, key, kl, f"{short} against KL to the reference", "nats per token"
        )
    drawn["final_accuracy"] = plots.finals(
        groups, keys, lambda run: run.accuracy, "Final held-out accuracy, by seed", "accuracy"
    )
    drawn["final_reward"] = plots.finals(
        groups, keys, lambda run: run.final("reward"), "Final reward, by seed", "reward"
    )
    drawn["final_kl"] = plots.finals(
        groups, keys, kl, "Final KL to the reference, by seed", "nats per token"
    )
    return drawn


def _html(name: str, body: str, images: dict[str, bytes]) -> str:
    shown = "".join(
        f'<div class="{"wide" if each == "timeline" else ""}"><img alt="{escape(each)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
        for each, data in images.items()
    )
    shown = (
        f'<div class="figures">{shown}</div>'
        if images
        else "<p>No step has been done yet: there is nothing to draw.</p>"
    )
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>'
        + body.replace("<!--figures-->", shown)
        + f'<p class="state">Drawn {made} by atropos-hpc report.</p></body></html>\n'
    )


def _facts(facts: Iterable[tuple[str, str | None]]) -> str:
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in facts if v)
        + "</div>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]], best: int | None = None) -> str:
    def cells(tag: str, of: Iterable[Any]) -> str:
        return "".join(f"<{tag}>{escape(str(each))}</{tag}>" for each in of)

    body = "".join(
        f'<tr class="{"best" if index == best else ""}">{cells("td", row)}</tr>'
        for index, row in enumerate(rows)
    )
    return f'<div class="table"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _run_body(run: Series, row: dict[str, Any]) -> str:
    directory = RunDir(run.path)
    about, summary = read_json(directory.run_json), summarize(directory)
    model = history.flat(run.config)
    before, after = summary["accuracy_before"], run.accuracy
    shares = status.shares(
        [{name: float(run.figures[name].sum()) for name in run.figures if name.startswith("time/")}]
    )
    attempts = len(report.attempts(directory))
    facts = _facts([
        ("steps", f"{summary['steps']:,} of {row['steps'] or '?'}"),
        ("held-out accuracy", None if math.isnan(after) else (f"{before:.3f} to " if before is not None else "") + f"{after:.3f}"),
        ("reward, last tenth of the steps", number(run.final("reward"))),
        ("KL to the reference", number(run.final("kl_reference"))),
        ("sequences", f"{summary['sequences']:,}"), ("tokens trained on", f"{summary['trained_tokens']:,}"),
        ("wall time", duration(summary["wall_s"]) if summary["wall_s"] else None),
        ("restarts of processes", str(sum(not each.what.startswith("attempt") for each in run.restarts))), ("attempts", str(attempts)),
        ("of the learner's time: waiting for data", f"{shares['waiting for data']:.0%}" if shares else None),
    ])  # fmt: skip
    evaluations = _table(
        ("version", "accuracy", "problems", "served by versions", "seconds"),
        ((e["version"], f"{e['accuracy']:.3f}", e["sequences"], "-".join(map(str, e.get("served") or ())), f"{e.get('wall_s', 0):.1f}")
         for e in run.evaluations),
    ) if run.evaluations else "<p>None.</p>"  # fmt: skip
    restarts = _table(("when", "what"), ((time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)), f"{each.what} was started")
                                         for each in run.restarts))  # fmt: skip
    config = "\n".join(f"{key}: {value}" for key, value in model.items())
    made_by = f"<h2>Command</h2><pre>{escape(command(row))}</pre>"
    return (
        f'<h1>{escape(_name(run.path))}</h1><p class="state">{escape(row["state"])}, {escape(_what(run.config))}, '
        f"begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(about.get('created', 0)))}</p>{facts}"
        f"<!--figures--><h2>Held-out evaluations</h2>{evaluations}"
        + (f"<h2>Restarts</h2>{restarts}" if run.restarts else "")
        + f"{made_by}<h2>Config</h2><details><summary>{len(model)} values</summary><pre>{escape(config)}</pre></details>"
    )


def _name(directory: Path) -> str:
    """The last two parts of its path: which run of which project."""
    return "/".join(directory.resolve().parts[-2:])


def _what(config: dict[str, Any]) -> str:
    """Model and environment, in short."""
    flat = history.flat(config)
    model = (
        str(flat.get("model.make") or flat.get("model.path") or "?")
        .rstrip("/")
        .rpartition("/")[2]
        .rpartition(".")[2]
    )
    return f"{model} on {str(flat.get('environment.target', '?')).rpartition(':')[2]}"


def _sweep_body(directory: Path, rows: list[dict[str, Any]], runs: list[Series]) -> str:
    keys, top = history.compared(runs), report.best(rows)
    states: dict[str, int] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + 1
    shown = []
    for row, run in zip(rows, runs, strict=True):
        config = history.flat(run.config)
        finals = (
            number(value)
            for value in (run.final("reward"), run.accuracy, run.final("kl_reference"))
        )
        shown.append([row["point"], row["state"], f"{row['step']}/{row['steps'] or '?'}", *(config.get(key) for key in keys),
                      config.get("seed"), *finals, row["job"] or "", row["run_dir"]])  # fmt: skip
    head = [
        "point",
        "state",
        "step",
        *(key.rpartition(".")[2] for key in keys),
        "seed",
        "reward",
        "accuracy",
        "KL",
        "job",
        "run directory",
    ]
    best = (
        ""
        if top is None
        else f"<h2>Best point: {top['point']}</h2><pre>{escape(command(top))}</pre>"
    )
    return (
        f'<h1>{escape(_name(directory))}</h1><p class="state">{len(rows)} points: '
        f"{', '.join(f'{count} {state}' for state, count in states.items())}; compared: {escape(', '.join(keys) or 'seeds')}</p>{best}"
        f"<!--figures--><h2>Points</h2>{_table(head, shown, None if top is None else rows.index(top))}"
        '<p class="state">Reward and KL are means over the last tenth of the steps; accuracy is the last held-out evaluation\'s.</p>'
    )


def command(row: dict[str, Any]) -> str:
    """What trains a run again, by itself, in a directory of its own."""
    argv = (
        row["overrides"]
        or read_json(RunDir(Path(row["run_dir"])).run_json).get("command", [""])[1:]
    )
    overrides = [
        each for each in argv if "=" in each and not each.startswith(("run_dir=", "hydra"))
    ]
    return shlex.join(
        [
            "python",
            "-m",
            "atropos_hpc.train",
            *overrides,
            f"run_dir=runs/again-{'-'.join(Path(row['run_dir']).parts[-2:])}",
        ]
    )
