"""The report of a sweep: the state of each point, and the best one."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from run_files import append_step

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AttemptRecord
from atropos_hpc.contracts.metrics import ActivitySample, AttemptMark, Evaluation, SweepPoint
from atropos_hpc.contracts.run_info import Private, RunInfo, SecretValue
from atropos_hpc.observe import history, logs, report
from atropos_hpc.observe.model_card import model_card
from atropos_hpc.observe.summary import summarize
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


def test_the_last_tenth_of_a_long_run_is_the_same_in_the_table_and_on_the_page(
    tmp_path: Path,
) -> None:
    row = point(tmp_path, 0)
    run = trained(row, 900, reward=0.0)
    for step in range(901, 1001):
        append_step(run, step, **{"reward/mean": step / 1000, "kl_reference": 0.0})
    found = report.point_status(row, {}).reward
    assert found == pytest.approx(history.read(run.path).final("reward/mean"))
    assert found == pytest.approx(0.9505)


def test_a_point_that_was_resumed_with_more_steps_shows_those(tmp_path: Path) -> None:
    row = point(tmp_path, 0)
    run = trained(row, 6, reward=0.5)
    write_json(run.run_json, {"id": "x", "config": {"trainer": {"steps": 9}}})
    write_json(run.done, {"version": 4})
    assert report.point_status(row, {"7": "RUNNING"}).steps == 9
    submitted_again = msgspec.structs.replace(row, steps=12)
    assert report.point_status(submitted_again, {"7": "PENDING"}).steps == 12


def test_a_copy_or_an_archive_of_an_attempt_s_logs_is_not_an_attempt(tmp_path: Path) -> None:
    run = RunDir(Path(point(tmp_path, 0).run_dir))
    for _ in range(3):
        run.new_attempt()
    (run.path / "logs" / "attempt-0.tar.gz").touch()
    (run.path / "logs" / "attempt-1.old").mkdir()
    assert [path.name for path in run.attempts()] == ["attempt-0", "attempt-1", "attempt-2"]
    assert run.new_attempt().name == "attempt-3" and run.attempt() == 3


def test_the_logs_of_a_sweep_mask_the_runs_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = point(tmp_path, 0)
    run = RunDir(Path(row.run_dir))
    run.new_attempt()
    write_struct(run.private, Private([SecretValue(["x"], "correct-horse-battery")]))
    (run.logs / "supervisor.log").write_text("first\nlogin correct-horse-battery\n")
    logs.show_points([row], 1)
    assert "login ***" in capsys.readouterr().out
    logs.show_points([row], 0)
    assert "***" not in capsys.readouterr().out


def test_attempts_that_were_killed_count_in_the_wall_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    for started, last, ended in ((1000.0, 1060.0, None), (2000.0, 2020.0, 2025.0), (3000.0,) * 3):
        attempt = run.new_attempt()
        append_record(run.activity, AttemptMark(started, attempt.name))
        append_record(run.activity, ActivitySample(last, {}, 0.0))
        if ended is not None:
            record = AttemptRecord(started=started, ended=ended, outcome="stop", events=[])
            write_struct(attempt / "attempt.json", record)
    run.new_attempt()  # refused before anything was supervised
    assert summarize(run).wall_s == 60 + 25


def test_the_card_of_an_earlier_checkpoint_counts_the_steps_up_to_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    config = Config(run_dir=str(tmp_path))
    config.trainer.steps = 40
    run.write_info(RunInfo(config, id="x"))
    for step in range(1, 31):
        append_step(run, step, sequences=8, trained_tokens=100)
    card = model_card(run, 20)
    assert "| sequences, tokens trained | 160, 2,000 |" in card and ", 20 steps of" in card
