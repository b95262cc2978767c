"""The sbatch templates of slurm/, run as shell. No Slurm is needed."""

import os
import subprocess
from pathlib import Path

import pytest

from atropos_hpc import resources


@pytest.mark.parametrize(
    "template", sorted((resources.data("slurm")).glob("*.sbatch")), ids=lambda path: path.stem
)
def test_templates_are_sound_shell_and_hand_their_arguments_on(template: Path) -> None:
    text = template.read_text()
    subprocess.run(["bash", "-n", str(template)], check=True)
    assert '"$@"' in text or "${1:?" in text
    assert "\nexec " in text


@pytest.mark.parametrize("template", ["het_grpo", "single_job_grpo", "split_trainer", "sweep_kl"])
@pytest.mark.parametrize("submitted_in", ["clone", "elsewhere"])
def test_templates_find_their_clone_from_any_directory_and_run_in_that_of_submission(
    tmp_path: Path, template: str, submitted_in: str
) -> None:
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
    counts = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
    groups = [f"{name}_HET_GROUP_{number}" for name in counts for number in (0, 1)]
    env = {
        **dict.fromkeys([*counts, *groups], "1"),
        "PATH": f"{spool}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path / submitted_in),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
    }
    text = (resources.data("slurm") / f"{template}.sbatch").read_text()
    (spool / "slurm_script").write_text(text)
    done = subprocess.run(
        ["bash", str(spool / "slurm_script"), "seed=1"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / submitted_in,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / submitted_in} -u -m atropos_hpc.train "), done
    assert "run_dir=runs/x-7" in done.stdout and done.stdout.rstrip().endswith("seed=1")
