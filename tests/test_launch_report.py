"""The report of a sweep: the state of each point, and the best one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import append_step

from atropos_hpc.contracts.members import AttemptRecord
from atropos_hpc.contracts.metrics import Evaluation, SweepPoint
from atropos_hpc.observe import report
from atropos_hpc.runtime.run_dir import RunDir, append_record, write_json, write_struct


def point(directory: Path, num: int, job: str | None = "7") -> SweepPoint:
    run = RunDir(directory / str(num))
    run.create()
    return SweepPoint(num, ["a=1", f"b={num}"], str(run.path), steps=4, job=job)


def trained(row: SweepPoint, steps: int, reward: float, accuracy: float | None = None) -> RunDir:
    run = RunDir(Path(row.run_dir))
    for step in range(1, steps + 1):
        append_step(run, step, **{"reward/mean": reward, "kl_reference": 0.01 * step})
    if accuracy is not None:
        append_record(run.evaluations, Evaluation(steps, accuracy=accuracy, sequences=10))
    return run


@pytest.mark.parametrize(
    "queue, outcome, done, expected",
    [
        ("PENDING", None, None, "queued"),
        ("PENDING", "requeue", None, "queued"),
        ("RUNNING", None, None, "running"),
        ("COMPLETED", "finish", 4, "complete"),
        (None, "finish", 4, "complete"),
        ("FAILED", "fail", None, "failed"),
        ("FAILED", "stop", None, "stopped"),
        ("CANCELLED", "stop", None, "cancelled"),
        ("TIMEOUT", None, None, "failed"),
        (None, None, None, "lost"),
        ("RUNNING", None, 3, "running"),  # a run that was complete at 3 steps, and goes on to 4
    ],
)
def test_the_state_follows_from_job_attempt_and_done_file(
    tmp_path: Path, queue: str | None, outcome: str | None, done: int | None, expected: str
) -> None:
    row = point(tmp_path, 0)
    run = trained(row, 3, 0.5)
    attempt = run.new_attempt()
    if outcome is not None:
        write_struct(
            attempt / "attempt.json",
            AttemptRecord(started=0.0, ended=1.0, outcome=outcome, events=[]),
        )
    if done is not None:
        write_json(run.done, {"version": done})
    found = report.point_status(row, {"7": queue})
    assert (found.state, found.step, found.steps, found.kl) == (expected, 3, 4, 0.03)


def test_reward_and_kl_are_means_over_the_last_tenth_of_the_steps(tmp_path: Path) -> None:
    row = point(tmp_path, 0)
    run = trained(row, 19, reward=0.0)
    append_step(run, 20, **{"reward/mean": 1.0, "kl_reference": 0.21})
    found = report.point_status(row, {})
    assert (found.reward, found.kl, found.step) == (pytest.approx(0.5), pytest.approx(0.2), 20)


def test_the_best_point_has_the_highest_accuracy_or_else_reward(tmp_path: Path) -> None:
    rows = [point(tmp_path, num) for num in range(3)]
    trained(rows[0], 2, reward=0.9)
    trained(rows[1], 2, reward=0.1)
    found = [report.point_status(row, {}) for row in rows]
    assert report.best(found) is found[0]
    trained(rows[1], 2, reward=0.1, accuracy=0.4)
    found = [report.point_status(row, {}) for row in rows]
    assert report.best(found) is found[1] and report.best([]) is None
    lines = report.table(found).splitlines()
    assert lines[2].startswith("best  1") and "b=1" in lines[2] and "a=1" not in report.table(found)


def test_the_command_reads_a_sweep_and_refuses_other_directories(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atropos_hpc.cli", "report"]
    nothing = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2 and "neither a run's directory nor a sweep's" in nothing.stderr
    row = point(tmp_path, 0)
    trained(row, 4, 0.5, accuracy=0.7)
    write_struct(tmp_path / "jobs.json", [row])
    shown = json.loads(
        subprocess.run(
            [*command, str(tmp_path), "--json"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert len(shown) == 1 and shown[0]["accuracy"] == 0.7 and shown[0]["best"] is True


def test_a_point_s_own_directory_shows_its_row_of_the_sweep(tmp_path: Path) -> None:
    rows = [point(tmp_path, num, job=str(num)) for num in range(2)]
    for row in rows:
        write_json(Path(row.run_dir) / "run.json", {"id": "x"})
    write_struct(tmp_path / "jobs.json", rows)
    (found,) = report.find_points(tmp_path / "1")
    assert found.overrides == ["a=1", "b=1"] and found.job == "1" and found.steps == 4
    write_json(RunDir(tmp_path / "1").holder, {"job": "9"})  # resumed by hand
    assert report.find_points(tmp_path / "1")[0].job == "9"
