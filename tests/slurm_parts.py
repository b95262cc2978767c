"""What the tests of runs in Slurm jobs share: a cluster, and a run that is submitted to it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_files import step_metrics
from slurm_cluster import PROGRAMS, ROOT, Cluster, until

from atropos_hpc.policy.node_cache import PREFIX
from atropos_hpc.runtime import process, shell
from atropos_hpc.runtime.private_tmp import LOCK
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.runtime.slurm import merge_states

TRAIN = [sys.executable, "-m", "atropos_hpc.train"]


def require_slurm() -> None:
    """Skip where Slurm is not installed; in CI that is an error."""
    import shutil

    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {', '.join(missing)}; `make apt` installs them")


def stand_in(directory: Path) -> list[str]:
    """Overrides that replace both roles' Python by the stand-in, and the model by an empty one."""
    python, model = directory / "python", directory / "model"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm_stand_in.py "$@"\n')
        python.chmod(0o755)
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "tokenizer.json").write_text("{}")
    return [
        "experiment=arithmetic_cpu",
        f"roles.trainer.python={python}",
        f"roles.rollout.python={python}",
        f"model.path={model}",
    ]


QUICK = [
    "cluster.host=null",
    "cluster.shared=[/]",
    "evaluation.every=0",
    "evaluation.before=false",
    "evaluation.after=false",
    "launch.backoff_s=0.5",
    "launch.grace_s=4",
    "launch.save_timeout_s=30",
    "launch.signal_s=40",
    "trainer.checkpoint_every=5",
    "roles.trainer.mem=1G",
    "roles.rollout.mem=1G",
]


def evaluations_off() -> list[str]:
    return ["evaluation.every=0", "evaluation.before=false", "evaluation.after=false"]


class Submitted:
    """One run in a Slurm job."""

    def __init__(self, cluster: Cluster, run_dir: Path, job: str) -> None:
        self.cluster, self.run, self.job = cluster, RunDir(run_dir), job

    def steps(self) -> list[int]:
        return [line.step for line in step_metrics(self.run)]

    def reach(self, step: int, seconds: float = 90) -> None:
        until(f"step {step}", lambda: (self.steps() or [0])[-1] >= step, seconds, self.story)

    def state(self) -> str:
        return merge_states(
            [state for name, state in self.cluster.jobs().items() if name.split("+")[0] == self.job]
            or ["GONE"]
        )

    def ends(self, state: str = "COMPLETED", seconds: float = 120) -> None:
        until(
            f"end of job {self.job}",
            lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING"),
            seconds,
            self.story,
        )
        assert self.state() == state, self.story()

    def completes(self, steps: int, attempts: int = 1, seconds: float = 120) -> None:
        """Assert success, with each step made once, after that many starts, and no process left of
        it; the next point of a sweep may run."""
        self.ends(seconds=seconds)
        assert self.steps() == list(range(1, steps + 1)), self.story()
        assert len(list((self.run.path / "logs").glob("attempt-*"))) == attempts, self.story()
        assert read_json(self.run.done)["version"] == steps
        self.leaves_nothing()

    def leaves_nothing(self) -> None:
        until(
            f"end of the processes of job {self.job}",
            lambda: not self.cluster.processes(job=self.job),
            40,
            self.story,
        )

    def said_goodbye(self) -> None:
        """Nobody was killed in the end: every member has written that it has ended."""
        states = {path.stem: read_json(path)["state"] for path in self.run.members.glob("*.json")}
        assert set(states.values()) == {"ended"}, f"{states}\n{self.story()}"

    def frees_memory(self) -> None:
        """No node holds a copy of a policy version. A run beside it whose agent was just killed may
        have one, until the next agent removes it."""

        def is_free() -> bool:
            return all(_held(path / LOCK) for path in Path("/dev/shm").glob(f"{PREFIX}*"))

        until("memory without policy versions", is_free, 20, self.story)

    def is_requeued(self, seconds: float = 60) -> None:
        """Wait until Slurm has it in the queue again, and let it start."""
        until("a requeue", lambda: self.state() == "PENDING", seconds, self.story)
        self.cluster.skip_requeue_delay(self.job)

    def log(self, name: str) -> str:
        return "".join(
            path.read_text(errors="replace")
            for path in sorted(self.run.path.glob(f"logs/attempt-*/{name}.log"))
        )

    def member(self, kind: str) -> dict[str, Any]:
        members = read_json(self.run.roster).get("members", {})
        return next((m for m in members.values() if m["kind"] == kind and m["alive"]), {})

    def story(self) -> str:
        logs = [
            *self.run.path.glob("logs/attempt-*/*.log"),
            *self.run.path.glob("logs/*.log"),
            *self.run.path.parent.glob("*.log"),
        ]
        logs += self.run.path.parent.glob(".submitit/*.out")
        tails = [
            f"--- {path.relative_to(self.run.path.parent)}\n{process.tail(path, 30)}"
            for path in sorted(logs)
        ]
        return f"job {self.job}, steps {self.steps()}\n{self.cluster.story()}\n" + "\n".join(tails)


def submission(directory: Path, *overrides: str) -> list[str]:
    """The command of `submit`."""
    return [
        *TRAIN,
        "-m",
        "hydra/launcher=submitit_slurm",
        shell.override("run_dir", directory),
        *QUICK,
        *overrides,
    ]


def submit(
    cluster: Cluster, directory: Path, *overrides: str, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    """A multirun through the launcher, with `directory` as the sweep's."""
    command = submission(directory, *overrides)
    done = subprocess.run(
        command,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=directory.parent,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def submitted(cluster: Cluster, directory: Path, *overrides: str) -> Submitted:
    """One point of a multirun."""
    submit(cluster, directory, *overrides)
    row = json.loads((directory / "jobs.json").read_text())[0]
    return Submitted(cluster, Path(row["run_dir"]), row["job"])


def sbatch(
    cluster: Cluster, directory: Path, template: str, *arguments: str, options: tuple[str, ...] = ()
) -> str:
    """Submit one of slurm/*.sbatch as a person would; the job's number."""
    home = {**cluster.env, "ATROPOS_HPC_HOME": str(ROOT)}
    command = [
        "sbatch",
        "--parsable",
        f"--output={directory}/%x-%j.log",
        *options,
        str(ROOT / "slurm" / template),
        *arguments,
    ]
    done = subprocess.run(
        command, env=home, capture_output=True, text=True, timeout=60, check=False, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def node_of(run: Submitted, role: str) -> str:
    """The first node that a role has got, from the supervisor's log."""
    text = run.log("supervisor").split(f"{role} on ")[1]
    return text.split(",")[0].split(";")[0].split()[0]


def _held(lock: Path) -> bool:
    """Does a process hold it (or is about to)?"""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
