"""The report: the series behind its plots, and that the page needs no other file."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
from run_files import activity, append_step

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AgentState, EnvironmentState, ServerState, Wait
from atropos_hpc.contracts.metrics import (
    ActivitySample,
    AttemptMark,
    Evaluation,
    RestartMark,
    SweepPoint,
)
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.observe import history, plots
from atropos_hpc.observe.timeline import ActivityRecorder
from atropos_hpc.runtime.run_dir import RunDir, append_record, write_struct

STEP_S = 10.0

PERFORMANCE = ("<dd>12.5</dd>", "<dd>33.5</dd>", "<dd>41%</dd>", "<dd>63.5</dd>")


def made(
    path: Path, kl_coef: float = 0.001, seed: int = 0, steps: int = 40, lost_s: float = 0.0
) -> RunDir:
    """Make a run whose second half a second attempt trained, `lost_s` later."""
    run = RunDir(path)
    run.create()
    run.new_attempt()
    config = Config(run_dir=str(path), seed=seed)
    config.algorithm.kl_coef = kl_coef
    config.trainer.steps = steps
    command = ["train.py", f"algorithm.kl_coef={kl_coef}"]
    write_struct(run.run_json, RunInfo(config, id="x", created=1e9, command=command))
    append_record(run.activity, AttemptMark(1e9, "attempt-0"))
    states = {"environment": {"generating": 3, "waiting for quota": 1}}
    phases = {"wait": 6.0, "update": 3.0}
    for step in range(1, steps + 1):
        late = lost_s if step > steps // 2 else 0.0
        when = 1e9 + STEP_S * step + late
        if lost_s and step == steps // 2 + 1:
            append_record(run.activity, AttemptMark(when - STEP_S, "attempt-1"))
        scalars = {
            "reward/mean": step / steps,
            "kl_reference": 0.1 / (1 + 50 * kl_coef) * step / steps,
            "entropy": 1.0,
            "perf/throughput": 100.0,
            "perf/throughput_per_gpu": 12.5,
            "perf/rollout/throughput_per_gpu": 33.5,
            "perf/mfu": 0.41,
            "perf/peak_memory_gib": 63.5,
            "length_mean": 50.0,
            "off_policy/staleness_mean": 0.5,
        }
        append_step(run, step, STEP_S, phases, when, **scalars)
        append_record(run.activity, ActivitySample(when, states, tokens_per_s=80.0))
    for version, accuracy, served in ((0, 0.2, (0, 0)), (steps, 0.9 - kl_coef, (40, 40))):
        metrics: dict[str, float | None] = {"eval/environment/strict_accuracy": accuracy / 2}
        line = Evaluation(version, accuracy, metrics, sequences=10, served=served, wall_s=1.0)
        append_record(run.evaluations, line)
    return run


def drawn(directory: Path) -> tuple[str, dict[str, tuple[int, int]]]:
    """Draw the report; return the page, and each PNG's width and height in pixels."""
    assert in_process.command("report", directory).returncode == 0
    out = directory / "report"
    sizes = {
        path.stem: struct.unpack(">II", path.read_bytes()[16:24]) for path in out.glob("*.png")
    }
    return (out / "report.html").read_text(), sizes


def test_a_run_s_page_needs_no_other_file_and_marks_restarts(tmp_path: Path) -> None:
    run = made(tmp_path / "run", lost_s=100.0)
    append_record(run.activity, RestartMark(1e9 + 55, "server-0-0"))
    page, sizes = drawn(run.path)
    assert set(sizes) == {
        "timeline",
        "learning",
        "kl",
        "entropy",
        "lengths",
        "staleness",
        "per_gpu",
        "mfu",
        "memory",
        "throughput",
    }
    assert page.count('src="data:image/png;base64,') == len(sizes) and not re.search(
        r'(src|href)="(?!data:)', page
    )
    assert all(width > 600 and height > 150 for width, height in sizes.values())
    for said in (
        "<td>server-0-0</td>",
        "<td>attempt 1</td>",
        "0.200 to 0.899",
        "40 of 40",
        *PERFORMANCE,
    ):
        assert said in page, said


def test_a_sweep_s_page_compares_its_points(tmp_path: Path) -> None:
    rows = []
    for num, (kl, seed) in enumerate((kl, seed) for kl in (0, 0.001, 0.1) for seed in (0, 1)):
        made(tmp_path / str(num), kl, seed)
        overrides = [f"algorithm.kl_coef={kl}", f"seed={seed}", "hydra.launcher.slots=1"]
        rows.append(SweepPoint(num, overrides, str(tmp_path / str(num)), steps=40))
    write_struct(tmp_path / "jobs.json", rows)
    page, sizes = drawn(tmp_path)
    assert {
        "kl_coef_accuracy",
        "kl_coef_kl",
        "final_kl",
        "final_accuracy",
        "accuracy",
        "reward",
        "kl",
    } <= set(sizes)
    assert "compared: algorithm.kl_coef" in page and '<tr class="best"><td>0</td>' in page
    command = "python -m atropos_hpc.train algorithm.kl_coef=0 seed=0 run_dir=runs/again-"
    assert f"{command}{tmp_path.name}-0" in page


def test_compared_keys_with_the_same_last_part_have_plots_of_their_own(tmp_path: Path) -> None:
    for num, (first, second) in enumerate(((1, 3), (2, 4))):
        run = made(tmp_path / str(num), steps=5)
        config = Config(run_dir=str(run.path))
        config.environment.config["size"], config.model.make_options["size"] = first, second
        write_struct(run.run_json, RunInfo(config, id="x"))
    page, sizes = drawn(tmp_path)
    names = ("config.size", "make_options.size")
    assert {f"{name}_kl" for name in names} <= set(sizes)
    assert all(f">{name}<" in page for name in names), "axes and columns"


def test_a_sweep_whose_points_have_not_all_begun_compares_what_it_varies(tmp_path: Path) -> None:
    rows = []
    for num, (kl, seed) in enumerate([(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1)]):
        if num < 3:
            made(tmp_path / str(num), kl, seed, steps=5)
        overrides = [f"algorithm.kl_coef={kl}", f"seed={seed}"]
        rows.append(SweepPoint(num, overrides, str(tmp_path / str(num)), steps=5))
    (tmp_path / "1" / "metrics.jsonl").unlink()
    runs = [history.read(Path(row.run_dir)) for row in rows]
    keys = history.compared_keys(runs)
    assert keys == ["algorithm.kl_coef"]
    figure = plots.compare(history.grouped(runs, keys), keys, "reward/mean", "")
    assert figure is not None
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["kl_coef 0.0", "kl_coef 0.1"], "seed 1 of 0.0 has no step yet"


def test_texts_that_a_sweep_compares_are_not_taken_for_tex(tmp_path: Path) -> None:
    for num, text in enumerate((r"put it in $\boxed{}$", "end with #### and $")):
        run = made(tmp_path / str(num), steps=5)
        config = Config(run_dir=str(run.path))
        config.environment.config["system_prompt"] = text
        write_struct(run.run_json, RunInfo(config, id="x"))
    page, _ = drawn(tmp_path)
    assert "compared: environment.config.system_prompt" in page


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_with_few_steps_has_a_page(tmp_path: Path, steps: int) -> None:
    run = made(tmp_path / "run", steps=steps)
    if not steps:
        run.evaluations.unlink()
    page, _ = drawn(run.path)
    assert ("nothing to draw" in page) == (steps == 0)


def test_an_unwritable_directory_is_reported_and_another_can_be_named(tmp_path: Path) -> None:
    run = made(tmp_path / "run", steps=0)
    (run.path / "report").write_text("in the way")
    done = in_process.command("report", run.path)
    assert done.returncode == 1 and "--out" in done.stderr and "Traceback" not in done.stderr
    done = in_process.command("report", run.path, "--out", tmp_path / "elsewhere")
    assert done.returncode == 0 and (tmp_path / "elsewhere" / "report.html").exists()


def test_the_learner_s_time_is_divided_among_its_phases(tmp_path: Path) -> None:
    run = history.read(made(tmp_path / "run", lost_s=100.0).path)
    edges = np.linspace(1e9, 1e9 + 40 * STEP_S + 100, 51)
    shares = history.phase_shares(run, edges)
    seconds = {name: float((share * np.diff(edges)).sum()) for name, share in shares.items()}
    expected = dict.fromkeys(shares, 0.0) | {"other": 40.0, "wait": 240.0, "update": 120.0}
    assert seconds == pytest.approx(expected)
    gap = (edges[:-1] >= 1e9 + 20 * STEP_S) & (edges[1:] <= 1e9 + 20 * STEP_S + 100)
    assert gap.any() and sum(share[gap].sum() for share in shares.values()) == pytest.approx(
        0
    )  # nothing ran between the attempts
    states = history.state_shares(run, "environment", edges, hold_s=15.0)
    assert set(states) == {"generating", "waiting for quota"} and states[
        "generating"
    ].max() == pytest.approx(0.75)


def test_a_long_curve_is_drawn_with_few_points() -> None:
    figure, axes = plots._axes()
    steps = np.arange(100_000.0)
    assert plots.draw_curve(axes, steps, np.sin(steps), plots.BLUE)
    assert (
        max(len(line.get_xdata()) for line in axes.lines) <= plots.MAX_POINTS and figure is not None
    )


def worker(name: str, pid: int, **more: Any) -> EnvironmentState:
    return EnvironmentState(name=name, pid=pid, state="generating", **more)


def test_activity_samples_states_and_notes_restarts(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    run.new_attempt()
    recorder = ActivityRecorder(run)
    servers = [ServerState(name="server-0-0", pid=7, version=PolicyVersion(version=3, attempt=1))]
    agent = AgentState(name="agent-0", pid=1, state="serving", servers=servers)
    wait = Wait("policy version 12, served by all", "x", 0)
    waiting = worker("environment-1", 3, waiting=wait)
    busy = worker("environment-0", 2, tokens_per_s=5.0)
    recorder.observe({each.name: each for each in (agent, busy, waiting)})
    agent.servers = [ServerState(name="server-0-0", pid=8)]
    recorder.observe({each.name: each for each in (agent, busy, waiting)})
    attempt, sample, restart = activity(run)
    assert isinstance(attempt, AttemptMark) and attempt.name == "attempt-0"
    assert isinstance(sample, ActivitySample) and sample.tokens_per_s == 5.0
    assert sample.states == {
        "agent": {"serving": 1},
        "server": {"serving": 1},
        "environment": {"generating": 1, "waiting for policy version": 1},
    }
    assert isinstance(restart, RestartMark) and restart.name == "server-0-0"


def test_the_table_as_json_draws_nothing(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    shown = in_process.command("report", run.path, "--json").stdout
    assert (
        json.loads(shown)[0]["accuracy"] == pytest.approx(0.899)
        and not (run.path / "report").exists()
    )
