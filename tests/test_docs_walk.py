"""Run every command of the pages in order, as a new user would, or state here why not.

This takes minutes, because it includes the whole demo: ATROPOS_HPC_LONG=1 enables it.
"""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from run_files import step_metrics
from test_docs import COMMAND, PAGES, ROOT

from atropos_hpc.runtime.run_dir import RunDir, read_json

GPU_CLUSTER = "needs a GPU cluster"
NAMES_YOURS = "names what is yours"
NOT_WALKED = {  # what a command begins with or holds -> why it is not run here
    "make setup DEVICE=cuda": GPU_CLUSTER,
    "cluster=my_site": GPU_CLUSTER,
    "gsm8k_qwen2_5_0_5b": GPU_CLUSTER,
    "runs/gsm8k": GPU_CLUSTER,
    "make lint": "CI runs it",
    "make test": "CI runs it, and it runs this",
    "make bench": "a bench is no test",
    "make faults": "tests/test_faults.py does some",
    "make soak": "takes an hour",
    "make release": "the workflow of a release runs it",
    "make docs-site": "CI runs it",
    "make clean": "would remove the environments",
    "atropos-hpc submit": "tests/test_slurm_training.py and tests/test_slurm_runs.py submit",
    "atropos-hpc samples RUN": NAMES_YOURS,
    "hydra/launcher=submitit_slurm algorithm.kl_coef": "tests/test_slurm_training.py runs it",
    "hydra/launcher=submitit_slurm +sweep=kl_coef": "tests/test_slurm_runs.py submits one",
    "sbatch slurm/het_grpo.sbatch": "tests/test_slurm_training.py runs it",
    "package.module:Class": NAMES_YOURS,
    "/models/mine": NAMES_YOURS,
    "SWEEP_DIR": NAMES_YOURS,
}


def commands(page: Path) -> list[str]:
    """In the order in which the page shows them."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    return [re.split(r"\s+#", match["command"])[0].strip() for match in COMMAND.finditer(text)]


def why_not(command: str) -> str | None:
    return next((why for part, why in NOT_WALKED.items() if part in command), None)


def test_no_command_is_left_out_without_a_word() -> None:
    left_out = {
        part: [c for page in PAGES for c in commands(page) if part in c] for part in NOT_WALKED
    }
    assert all(left_out.values()), [
        part for part, found in left_out.items() if not found
    ]  # not shown by any page
    walked = [command for page in PAGES for command in commands(page) if why_not(command) is None]
    assert len(walked) > 15


class Walk:
    """A directory that looks like a clone with its environments, where commands are run."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in (
            "Makefile",
            "requirements",
            "pyproject.toml",
            "configs",
            "slurm",
            ".venv",
            ".venv-rollout",
        ):
            (home / name).symlink_to(ROOT / name)
        code = re.findall(
            r"```python\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.S
        )[0]
        (home / "my_env.py").write_text(code)
        self.done: set[str] = set()
        self.env = {**os.environ, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}

    def paste(self, command: str, codes: tuple[int, ...] = (0,), timeout: float = 900) -> str:
        """Its output."""
        print(f"$ {command}", flush=True)
        ran = subprocess.run(
            shlex.split(command),
            cwd=self.home,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert ran.returncode in codes, (
            f"{command} ended with {ran.returncode}:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
        )
        assert "Traceback" not in ran.stdout + ran.stderr, f"{command}:\n{ran.stderr[-3000:]}"
        self.done.add(command)
        return ran.stdout

    def paste_and_stop(self, command: str, stop: str, run: str) -> None:
        """Start a run, and stop it with the other command once it is under way."""
        with subprocess.Popen(
            shlex.split(command),
            cwd=self.home,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as child:
            deadline = time.monotonic() + 300
            while len(step_metrics(RunDir(self.home / run))) < 3:
                assert time.monotonic() < deadline and child.poll() is None, (
                    f"{command}: no third step"
                )
                time.sleep(0.2)
            self.paste(stop)
            assert child.wait(120) == 75
        self.done.add(command)


@pytest.mark.verl
@pytest.mark.run
@pytest.mark.timeout(2400)
@pytest.mark.skipif(
    not os.environ.get("ATROPOS_HPC_LONG"), reason="takes minutes; ATROPOS_HPC_LONG=1 runs it"
)
def test_a_walk_through_the_pages(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    first = commands(ROOT / "docs" / "quick-start.md")
    train, stop = (
        next(c for c in first if part in c)
        for part in ("train run_dir=runs/first", "stop runs/first")
    )
    for command in first:
        if command == train:
            walk.paste_and_stop(train, stop, "runs/first")
        elif command not in walk.done and why_not(command) is None:
            walk.paste(command)
    assert read_json(tmp_path / "runs/demo/summary.json")["accuracy_after"] >= 0.88
    assert (tmp_path / "runs/demo/report/report.html").exists() and (
        tmp_path / "adder" / "README.md"
    ).exists()
    assert read_json(tmp_path / "runs/first/summary.json")["steps"] == 80

    for page in PAGES:
        for command in commands(page):
            if command not in walk.done and why_not(command) is None:
                doctor = command.endswith(
                    "doctor"
                )  # says what is missing by its code: here there are no GPUs, and may be no Slurm
                walk.paste(command, codes=(0, 1) if doctor else (0,))
