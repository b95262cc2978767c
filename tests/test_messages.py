"""Mistakes on the command line are reported in one line, with what to do, without a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import in_process
import pytest
from run_files import append_step

from atropos_hpc.config import Config
from atropos_hpc.launch import doctor, role_environment
from atropos_hpc.runtime import devices
from atropos_hpc.runtime.run_dir import RunDir, write_json

Arrange = Callable[[Path], list[str]]


def finished(path: Path) -> RunDir:
    """A run's directory with one attempt, no process, and nothing done."""
    run = RunDir(path / "run")
    run.create()
    write_json(
        run.run_json,
        {
            "id": "x",
            "config": {
                "run_dir": str(run.path),
                "trainer": {"steps": 4},
                "model": {"path": "none"},
                "environment": {"target": "a:B"},
            },
        },
    )
    (run.new_attempt() / "trainer-0.log").write_text("first\nlast\n")
    return run


def damaged(path: Path) -> list[str]:
    run = finished(path)
    run.run_json.write_text("{")
    return ["status", str(run.path)]


def closed(path: Path) -> list[str]:
    (path / "it").mkdir()
    (path / "it").chmod(0)
    return ["status", str(path / "it")]


MISTAKES: list[tuple[Arrange, int, tuple[str, ...]]] = [
    (lambda path: ["stat"], 2, ("No such command 'stat'", "'status'")),
    (lambda path: ["status", str(path / "nothing")], 2, ("does not exist",)),
    (lambda path: ["stop", str(path)], 2, ("neither a run's directory nor a sweep's",)),
    (lambda path: ["stop", str(finished(path).path)], 1, ("nothing runs in",)),
    (
        lambda path: ["logs", str(finished(path).path), "nobody"],
        1,
        ("no log of nobody", "it has trainer-0"),
    ),
    (
        lambda path: ["logs", str(finished(path).path), "--attempt", "7"],
        1,
        ("no attempt 7", "there are: 0"),
    ),
    (lambda path: ["samples", str(finished(path).path)], 1, ("has no rollouts",)),
    (
        lambda path: ["resume", str(finished(path).path), "trainer.stepss=5"],
        2,
        ("trainer.stepss", "did you mean trainer.steps?"),
    ),
    (
        lambda path: ["resume", str(finished(path).path), "trainer.steps"],
        2,
        ("trainer.steps: is not of the form key=value",),
    ),
    (
        lambda path: ["validate", "experiment=math_qwen3_4b"],
        2,
        ("environment.target: must be given",),
    ),
    (
        lambda path: ["validate", "trainer.steps=many"],
        2,
        ("trainer.steps", "could not be converted"),
    ),
    (lambda path: ["doctor", "algoritm=grpo"], 2, ("algoritm",)),
    (damaged, 2, ("run.json is not JSON", "damaged")),
]


@pytest.mark.parametrize(("arrange", "code", "says"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_reported_in_one_line(
    tmp_path: Path, arrange: Arrange, code: int, says: tuple[str, ...]
) -> None:
    done = in_process.command(*arrange(tmp_path))
    assert done.returncode == code, done.stderr
    headlines = ("usage:", "The config was refused", "The overrides were", "This config would be")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(headlines)]
    assert len(lines) == 1 and all(each in lines[0] for each in says), done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_somebody_else_s_directory(tmp_path: Path) -> None:
    done = in_process.command(*closed(tmp_path))
    assert (
        done.returncode == 2
        and "Permission denied" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_logs_are_shown_from_the_end_and_followed(tmp_path: Path) -> None:
    run = finished(tmp_path)
    command = [sys.executable, "-u", "-m", "atropos_hpc.cli", "logs", str(run.path)]
    assert (
        subprocess.run(
            [*command, "trainer", "-n", "1"], capture_output=True, text=True, check=True
        ).stdout
        == "last\n"
    )
    following = subprocess.Popen([*command, "-f", "-n", "1"], stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None and following.stdout.readline() == "trainer-0 | last\n"
    with (run.logs / "trainer-0.log").open("a") as log:
        log.write("half a l")
        log.flush()
        log.write("ine\n")
    assert following.stdout.readline() == "trainer-0 | half a line\n"
    (run.new_attempt() / "agent-0.log").write_text(
        "of the next attempt\n"
    )  # a resumed run logs elsewhere
    assert following.stdout.readline() == "agent-0 | of the next attempt\n"
    write_json(run.done, {"version": 3})
    assert following.wait(30) == 0, "nothing more can come"


def test_a_run_that_is_complete_is_not_resumed(tmp_path: Path) -> None:
    run = finished(tmp_path)
    write_json(run.done, {"version": 4})
    append_step(run, 4)
    done = in_process.command("resume", run.path)
    assert "is complete at 4 steps" in done.stdout and "trainer.steps=" in done.stdout


@pytest.mark.environments
def test_the_doctor_finds_an_environment_that_does_not_work_and_tells_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        doctor.examine(
            ["roles.rollout.python=/no/python", f"roles.trainer.python={sys.executable}"]
        )
        == 1
    )
    said = capsys.readouterr().out
    assert (
        "NO there is no /no/python: `make setup` creates it" in said
        and f"ok {sys.executable}" in said
        and "this machine" in said
        and "NVIDIA driver: " in said
    )


@pytest.mark.parametrize(
    ("driver", "asked", "ok"), [("580.65", 2, False), ("580.65", 0, None), (None, 2, None)]
)
def test_the_doctor_names_the_cuda_of_torch_and_refuses_one_that_sees_no_gpu(
    driver: str | None, asked: int, ok: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = role_environment.TorchBuild("2.13.0+cu130", "13.0", 0)
    monkeypatch.setattr(role_environment, "torch_build", lambda *_: build)
    monkeypatch.setattr(devices, "driver_version", lambda: driver)
    config = Config(run_dir="/run")
    config.roles.trainer.gpus_per_node = asked
    (found,) = doctor.torch_findings(config, "trainer")
    assert found.ok is ok
    assert "torch 2.13.0+cu130, built for CUDA 13.0, sees 0 GPUs" in found.text
    assert ok is not False or "580.65" in found.fix


@pytest.mark.verl
def test_a_role_s_interpreter_tells_its_torch() -> None:
    import torch

    config = Config(run_dir="/run")
    config.roles.trainer.python = sys.executable
    build = role_environment.torch_build(config, "trainer")
    assert build is not None
    assert (build.torch, build.cuda) == (torch.__version__, torch.version.cuda)
