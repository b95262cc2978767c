"""What is made of the answers of Slurm's commands, by recorded ones. No Slurm is needed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.cli import main
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.launch import hydra_api
from atropos_hpc.observe import report
from atropos_hpc.runtime import slurm
from atropos_hpc.runtime.run_dir import RunDir, write_struct

Answers = Callable[..., None]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Let Slurm's commands answer what is given; a text that begins with "!" is an error."""

    def give(**given: str) -> None:
        def run(*command: str, env: Any = None) -> str:
            answer = given[command[0]]
            if answer.startswith("!"):
                raise slurm.SlurmError(answer[1:])
            return answer

        monkeypatch.setattr(slurm, "run_command", run)
        monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")

    return give


@pytest.mark.parametrize("folder", ["/runs/kl", "/runs/my sweep"])
def test_a_job_that_was_queued_although_its_answer_was_lost_is_not_submitted_again(
    answers: Answers, folder: str
) -> None:
    script = f"{folder}/.submission_file_1.sh"
    answers(sbatch="!Socket timed out", squeue=f"7|{folder}/other.sh\n8+1|{script}\n8+0|{script}")
    assert slurm.submit(script, os.environ, pause_s=0) == "8"


def test_while_the_queue_cannot_be_seen_a_job_is_not_submitted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost, script = slurm.SlurmError("Socket timed out"), "/runs/kl/.submission_file_1.sh"
    answers: dict[str, list[Any]] = {"sbatch": [lost, "9"], "squeue": [lost, lost, f"8|{script}"]}

    def run(*command: str, env: Any = None) -> str:
        answer = answers[command[0]].pop(0)
        if answer is lost:
            raise lost
        return str(answer)

    monkeypatch.setattr(slurm, "run_command", run)
    assert slurm.submit(script, os.environ, pause_s=0) == "8"


def test_the_queue_is_searched_after_the_last_lost_answer_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "/runs/kl/.submission_file_1.sh"
    asked: list[str] = []

    def run(*command: str, env: Any = None) -> str:
        asked.append(command[0])
        if command[0] == "squeue":
            return f"8|{script}" if asked.count("sbatch") == slurm.SUBMISSIONS else ""
        raise slurm.SlurmError("Socket timed out")

    monkeypatch.setattr(slurm, "run_command", run)
    assert slurm.submit(script, os.environ, pause_s=0) == "8"


@pytest.mark.parametrize(
    ("state", "so"),
    [
        *((name, "running") for name in ("SIGNALING", "STAGE_OUT", "RESIZING", "A_LATER_STATE")),
        *((name, "failed") for name in ("LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED")),
    ],
)
def test_a_job_runs_and_is_not_submitted_again_unless_its_state_is_an_end(
    answers: Answers, tmp_path: Path, state: str, so: str
) -> None:
    answers(squeue=f"7+0|{state}\n7+1|{state}")
    jobs = slurm.known_states(["7"])
    assert report.run_state(SweepPoint(0, [], str(tmp_path), job="7"), jobs, 4, True) == so


def test_a_sweep_is_not_said_to_be_stopped_while_the_controller_does_not_answer(
    answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_struct(tmp_path / "jobs.json", [SweepPoint(0, [], str(tmp_path / "0"), job="7")])
    answers(squeue="!squeue: Unable to contact slurm controller")
    assert main(["stop", str(tmp_path)]) == 1
    assert "may still start: job 7" in capsys.readouterr().err


def test_stopping_from_a_machine_without_slurm_names_the_jobs_that_may_be_queued(
    answers: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_struct(tmp_path / "jobs.json", [SweepPoint(0, [], str(tmp_path / "0"), job="7")])
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert main(["stop", str(tmp_path)]) == 1
    assert "may still start: job 7" in capsys.readouterr().err


def test_a_full_quota_is_named_with_the_file_and_not_by_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path).create()
    write_struct(tmp_path / "jobs.json", [SweepPoint(0, [], str(tmp_path))])

    def full(*_: object) -> int:
        raise OSError(122, os.strerror(122))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="quota exceeded: .*summary.json"):
        write_struct(RunDir(tmp_path).summary, SweepPoint(0, [], ""))


def test_a_command_for_one_run_names_the_runs_of_a_submission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_struct(tmp_path / "jobs.json", [SweepPoint(0, [], str(tmp_path / "0"), job="7")])
    assert main(["samples", str(tmp_path)]) == 2
    assert f"name one of its runs, such as {tmp_path / '0'}" in capsys.readouterr().err


def test_overrides_with_the_slurm_launcher_are_validated_as_they_are_submitted() -> None:
    launcher = "hydra/launcher=submitit_slurm"
    assert hydra_api.compose([launcher]).launch.allocation == "het"
    assert hydra_api.compose([launcher, "launch=split"]).launch.allocation == "split"
    assert hydra_api.compose([]).launch.allocation == "local"
