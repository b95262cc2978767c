"""The sbatch templates of slurm/, run as shell. No Slurm is needed."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from config_parts import composed

from atropos_hpc import resources
from atropos_hpc.contracts.members import Roster
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch.slurm import rollout_job
from atropos_hpc.runtime import process, slurm
from atropos_hpc.runtime.restart_policy import Action
from atropos_hpc.runtime.run_dir import RunDir, write_struct


@pytest.mark.parametrize(
    "template", sorted((resources.data("slurm")).glob("*.sbatch")), ids=lambda path: path.stem
)
def test_templates_are_sound_shell_and_hand_their_arguments_on(template: Path) -> None:
    text = template.read_text()
    subprocess.run(["bash", "-n", str(template)], check=True)
    assert '"$@"' in text or "${1:?" in text
    assert "\nexec " in text


COUNTS = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
GROUPS = [f"{name}_HET_GROUP_{number}" for name in COUNTS for number in (0, 1)]


def run_template(
    tmp_path: Path, template: str, submitted_in: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a copy of a template, as slurmd does. Its clone's Python prints its arguments."""
    clone, spool = tmp_path / "clone", tmp_path / "spool"
    for directory in (clone / ".venv" / "bin", clone / "slurm", tmp_path / "elsewhere", spool):
        directory.mkdir(parents=True)
    programs = {
        clone / ".venv" / "bin" / "python": 'echo "$PWD" "$@"',
        spool / "scontrol": f"echo JobId=7 Command={clone}/slurm/x.sbatch seed=1 WorkDir=/",
    }
    for path, line in programs.items():
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    env = {
        **dict.fromkeys([*COUNTS, *GROUPS], "1"),
        "PATH": f"{spool}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path / submitted_in),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
        **variables,
    }
    text = (resources.data("slurm") / f"{template}.sbatch").read_text()
    (spool / "slurm_script").write_text(text)
    return subprocess.run(
        ["bash", str(spool / "slurm_script"), "seed=1"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / submitted_in,
    )


@pytest.mark.parametrize("template", ["het_grpo", "single_job_grpo", "split_trainer", "sweep_kl"])
@pytest.mark.parametrize("submitted_in", ["clone", "elsewhere"])
def test_templates_find_their_clone_from_any_directory_and_run_in_that_of_submission(
    tmp_path: Path, template: str, submitted_in: str
) -> None:
    done = run_template(tmp_path, template, submitted_in)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / submitted_in} -u -m atropos_hpc.train "), done
    assert "run_dir=runs/x-7" in done.stdout and done.stdout.rstrip().endswith("seed=1")
    assert "gpus_per_node" not in done.stdout, "left to the config"


@pytest.mark.parametrize("template", ["het_grpo", "single_job_grpo", "split_trainer", "sweep_kl"])
def test_a_template_without_a_clone_says_what_to_set(tmp_path: Path, template: str) -> None:
    done = run_template(tmp_path, template, "clone", ATROPOS_HPC_HOME=str(tmp_path / "elsewhere"))
    assert done.returncode == 0, "the clone of the script"
    other = tmp_path / "without"
    other.mkdir()
    (tmp_path / "clone").rename(tmp_path / "moved")
    path = f"{tmp_path / 'spool'}:{os.environ['PATH']}"
    env = {"PATH": path, "SLURM_SUBMIT_DIR": str(other), "SLURM_JOB_ID": "7"}
    command = ["bash", str(tmp_path / "spool" / "slurm_script")]
    lost = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert lost.returncode == 2 and "set ATROPOS_HPC_HOME to the clone" in lost.stderr, lost


@pytest.mark.parametrize(
    "template, variables, roles",
    [
        ("het_grpo", {"_HET_GROUP_0": "4", "_HET_GROUP_1": "a100:8"}, {"trainer": 4, "rollout": 8}),
        ("het_grpo", {"_HET_GROUP_1": "1"}, {"rollout": 1}),
        ("single_job_grpo", {"": "h100:2"}, {"trainer": 2, "rollout": 2}),
        ("split_trainer", {"": "8"}, {"trainer": 8}),
    ],
)
def test_templates_hand_the_number_of_gpus_on(
    tmp_path: Path, template: str, variables: dict[str, str], roles: dict[str, int]
) -> None:
    given = {f"SLURM_GPUS_PER_NODE{name}": value for name, value in variables.items()}
    words = run_template(tmp_path, template, "clone", **given).stdout.split()
    expected = {f"roles.{role}.gpus_per_node={number}" for role, number in roles.items()}
    assert {word for word in words if "gpus_per_node" in word} == expected


def test_a_task_of_a_rollout_script_uses_the_cpus_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    run.write_info(RunInfo(composed("launch=split", "cluster.host=127.0.0.1")))
    write_struct(run.roster, Roster(beat=1))
    started: list[Any] = []

    class Supervisor:
        def __init__(self, _run: Any, _config: Any, steps: Any, *_: Any, **__: Any) -> None:
            started.extend(steps)

        def supervise(self) -> Action:
            return Action.FINISH

    monkeypatch.setattr(rollout_job, "Supervisor", Supervisor)
    for name in ("keep_files_private", "log_to_stderr"):
        monkeypatch.setattr(process, name, lambda: None)
    monkeypatch.setattr(slurm, "expand_nodes", lambda names: [names])
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "n1", "CPUS_PER_TASK": "8"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert rollout_job.main(["--run-dir", str(run.path)]) == 0
    assert "--cpus-per-task=8" in started[0].processes[0].command
