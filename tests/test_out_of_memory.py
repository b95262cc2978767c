"""A process that the kernel has killed because its job is out of memory is reported as that."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_hpc.runtime import out_of_memory, sizing
from atropos_hpc.runtime.process import END_TASKS, ProcessSpec
from atropos_hpc.runtime.supervision import Exit, Limits, ManagedProcess, SupervisionEngine

NEEDS = "its job needs more roles.{}.mem"


def first_exit(
    directory: Path, kind: str, program: str, end_by: int, kills: Callable[[], int]
) -> Exit:
    spec = ProcessSpec("member", ("sh", "-c", program), end_by=end_by)
    engine = SupervisionEngine(directory, memory_kills=kills)
    engine.add(ManagedProcess("member", kind, lambda: [spec], Limits(0, 0.0)))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for ended in engine.poll():
            return ended
        time.sleep(0.01)
    raise AssertionError("it goes on")


@pytest.mark.parametrize(
    "kind,role", [("trainer", "trainer"), ("trajectories", "trainer"), ("server", "rollout")]
)
def test_a_kill_in_the_cgroup_names_the_key_of_the_role(
    kind: str, role: str, tmp_path: Path
) -> None:
    counts = iter([3, 4])
    ended = first_exit(tmp_path, kind, "exit 5", signal.SIGTERM, lambda: next(counts))
    assert ended.how == f"ended with exit code 5, out of memory: {NEEDS.format(role)}"


def test_kills_of_before_and_a_peaceful_end_are_not_called_so(tmp_path: Path) -> None:
    ended = first_exit(tmp_path, "server", "kill -9 $$", signal.SIGTERM, lambda: 3)
    assert ended.how == "was killed by SIGKILL"
    counts = iter([3, 4])
    ended = first_exit(tmp_path, "server", "exit 0", signal.SIGTERM, lambda: next(counts))
    assert ended.how == "ended with exit code 0"


@pytest.mark.parametrize(
    "line",
    [
        "srun: error: n0: task 0: Out Of Memory",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=2.0. Some of your processes may"
        " have been killed by the cgroup out-of-memory handler.",  # 22.05
        "[2026-11-27T15:36:32.949] error: Detected 1 oom_kill event in StepId=2.0. Some of the step"
        " tasks have been OOM Killed.",  # 26.05
    ],
)
def test_what_slurm_says_in_an_srun_s_log_counts_for_the_start_that_it_belongs_to(
    line: str, tmp_path: Path
) -> None:
    said = f"echo '{line}'; exit 1"
    ended = first_exit(tmp_path, "agent", said, END_TASKS, lambda: 0)
    assert ended.how.endswith(NEEDS.format("rollout"))
    ended = first_exit(tmp_path, "agent", "exit 1", END_TASKS, lambda: 0)
    assert ended.how == "ended with exit code 1"


def test_kills_are_those_of_the_nearest_cgroup_with_a_memory_controller(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n0::/slurm/step_0/task_0\n")
    (tmp_path / "fs" / "slurm" / "step_0" / "task_0").mkdir(parents=True)
    assert out_of_memory.kills(tmp_path / "fs", own) == 0
    events = tmp_path / "fs" / "slurm" / "step_0" / "memory.events"
    events.write_text("low 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert out_of_memory.kills(tmp_path / "fs", own) == 2
    own.write_text("4:memory:/elsewhere\n")  # version 1
    assert out_of_memory.kills(tmp_path / "fs", own) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_job_s_cgroup_leaves_with_the_cache_of_files(
    version: int, tmp_path: Path
) -> None:
    names, of_files = ("max", "current"), ""
    group, line = tmp_path / "job_7" / "step", "0::/job_7/step\n"
    if version == 1:
        names, of_files = ("limit_in_bytes", "usage_in_bytes"), "total_"
        group, line = tmp_path / "memory/job_7/step", "4:memory:/job_7/step\n1:cpu:/\n0::/\n"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text(line)
    stat = f"{of_files}inactive_file 200\n{of_files}active_file 30\nanon 4000\n"
    (group.parent / "memory.stat").write_text(stat)
    for name, value in zip(names, ("5000", "4900"), strict=True):
        (group.parent / f"memory.{name}").write_text(value + "\n")
    assert sizing.free_memory(tmp_path, tmp_path / "own") == 330
