"""The wheel works by itself: installed into an empty environment, used from an empty directory."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_hpc import resources
from atropos_hpc.runtime.run_dir import RunDir, write_json

pytestmark = pytest.mark.wheel
Run = Callable[..., "subprocess.CompletedProcess[str]"]
TRAIN = ("python", "-m", "atropos_hpc.train")
SWEEP = ("+sweep=kl_coef", "launch.dry_run=true")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Build the wheel and install it; return a function that runs one of its programs elsewhere."""
    home = tmp_path_factory.mktemp("wheel")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(home), str(resources.HOME)]
    subprocess.run(build, env=env, check=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    python = home / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", str(wheel)]
    subprocess.run(install, env=env, check=True)

    def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        empty = home / "elsewhere"
        empty.mkdir(exist_ok=True)
        command = [str(python.parent / program), *arguments]
        return subprocess.run(
            command, cwd=empty, env=env, capture_output=True, text=True, check=False, timeout=120
        )

    return run


def test_help(installed: Run) -> None:
    tool, train = installed("atropos-hpc", "--help"), installed(*TRAIN, "--help")
    assert tool.returncode == 0 and "validate" in tool.stdout, tool.stderr
    assert train.returncode == 0 and "experiment: arithmetic_cpu" in train.stdout, train.stderr
    assert installed("atropos-hpc", "train", "--help").stdout == train.stdout


def test_validate_reports_the_missing_role_environments_only(installed: Run) -> None:
    done = installed("atropos-hpc", "validate")
    keys = {line.strip().partition(":")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert {"roles.trainer.python", "roles.rollout.python"} <= keys, done.stderr
    assert (
        "algorithm.kl_coef" in installed("atropos-hpc", "validate", "algorithm.kl_coef=-1").stderr
    )


def test_a_dry_run_of_a_sweep_prints_every_batch_script(installed: Run) -> None:
    done = installed("atropos-hpc", "submit", *SWEEP, "run_dir=sweep")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH hetjob") == 15 and "Nothing was submitted" in done.stdout


def test_report_prints_the_table_and_says_what_its_page_needs(
    installed: Run, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    write_json(run.run_json, {"id": "x", "config": {"trainer": {"steps": 3}}})
    done = installed("atropos-hpc", "report", str(run.path))
    assert done.returncode == 0 and "queued" in done.stdout, done.stderr
    assert "atropos-hpc[login]" in done.stderr


def test_templates_are_copied_and_never_overwritten(installed: Run) -> None:
    done = installed("atropos-hpc", "templates", "slurm")
    paths = [Path(line) for line in done.stdout.split()]
    assert done.returncode == 0 and {"het_grpo.sbatch"} <= {path.name for path in paths}
    again = installed("atropos-hpc", "templates", "slurm")
    assert again.returncode == 2 and "het_grpo.sbatch" in again.stderr and not again.stdout
