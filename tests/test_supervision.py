"""The supervision engine, with a clock and processes that the test controls."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.rollout import node_agent
from atropos_hpc.runtime import process
from atropos_hpc.runtime.process import ProcessSpec
from atropos_hpc.runtime.supervision import (
    Exit,
    Lifecycle,
    Limits,
    ManagedProcess,
    NotReady,
    State,
    SupervisionEngine,
)

LIMITS = Limits(restarts=2, backoff_s=1.0, leave_s=10.0)


class FakePopen:
    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, _timeout: float) -> int | None:
        return self.returncode


class FakeChild(process.Child):
    def signal(self, number: int) -> None:
        if number == signal.SIGKILL and self.process.returncode is None:
            self.process.returncode = -number

    @property
    def pid(self) -> int:
        return 0


class Machine:
    """A clock and the processes that were started."""

    def __init__(self, *specs: str) -> None:
        self.now, self.progress, self.complete = 0.0, 0, False
        self.started: list[FakeChild] = []
        self.engine = SupervisionEngine(
            Path("logs"), lambda: self.progress, lambda: self.complete, lambda: self.now, self.start
        )
        self.managed = ManagedProcess("unit", "kind", self.specs, LIMITS)
        self.names, self.not_ready = specs or ("a",), False
        self.engine.add(self.managed)

    def specs(self) -> Sequence[ProcessSpec]:
        if self.not_ready:
            raise NotReady("the old one still exists")
        return [ProcessSpec(name, (name,)) for name in self.names]

    def start(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None,
        cwd: Path | None = None, end_by: int = signal.SIGTERM,
    ) -> process.Child:  # fmt: skip
        popen: Any = FakePopen()
        self.started.append(FakeChild(name, popen, log))
        return self.started[-1]

    def poll(self, seconds: float = 0.0) -> list[Exit]:
        self.now += seconds
        exits = []
        for ended in self.engine.poll():
            exits.append(ended)
            ended.managed.life.restart(self.now)
        return exits


@pytest.fixture(autouse=True)
def no_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "end_orphans", lambda known: [])
    monkeypatch.setattr(process, "descendants_of", lambda pid: [])
    monkeypatch.setattr(process, "request_stacks", lambda pid: False)


def test_restarts_back_off_and_are_counted_until_there_is_progress() -> None:
    machine = Machine()
    machine.poll()
    left = []
    for pause in (1.0, 2.0):
        machine.started[-1].process.returncode = 1
        (ended,) = machine.poll()
        left.append(ended.managed.life.restarts_left)
        assert (ended.code, ended.how) == (1, "ended with exit code 1")
        count = len(machine.started)
        machine.poll(pause - 0.1)
        assert len(machine.started) == count, "not before the pause is over"
        machine.poll(0.2)
        assert len(machine.started) == count + 1
    assert left == [1, 0] and machine.managed.life.restarts == 2
    machine.progress += 1
    machine.started[-1].process.returncode = -9
    (ended,) = machine.poll()
    assert ended.how == "was killed by SIGKILL" and machine.managed.life.restarts == 1


def test_a_process_that_has_run_for_long_counts_as_progress() -> None:
    life = Lifecycle(LIMITS, restarts=2)
    life.start(0.0, None)
    life.end(301.0, None)
    assert life.restarts == 0


def test_a_long_wait_in_vain_does_not_count_as_progress() -> None:
    machine = Machine()
    machine.poll()
    for restarts in (1, 2):
        machine.poll(901)
        machine.started[-1].process.returncode = process.STUCK
        machine.poll()
        assert machine.managed.life.restarts == restarts
        machine.poll(5)


def test_a_hung_process_gets_time_to_dump_its_stacks_and_is_then_killed() -> None:
    machine = Machine()
    machine.poll()
    assert machine.engine.kill_hung(machine.managed, "it hangs")
    assert not machine.engine.kill_hung(machine.managed, "it hangs"), "already under way"
    assert machine.poll(1.9) == [] and machine.started[0].poll() is None
    (ended,) = machine.poll(0.2)
    assert ended.hung and ended.code == -signal.SIGKILL
    machine.poll(1.1)
    assert machine.managed.children and not machine.managed.life.hung


def test_a_killed_process_that_is_not_reaped_yet_is_not_killed_again() -> None:
    machine = Machine()
    machine.poll()
    machine.started[0].signal = lambda number: None  # type: ignore[method-assign]
    assert machine.engine.kill_hung(machine.managed, "it hangs")
    assert machine.poll(2.1) == [] and machine.managed.active
    assert not machine.engine.kill_hung(machine.managed, "it hangs")
    machine.started[0].process.returncode = -signal.SIGKILL
    (ended,) = machine.poll()
    assert ended.hung


def test_a_recycled_process_is_asked_to_end_and_does_not_count_as_hung() -> None:
    machine = Machine()
    machine.poll()
    asked: list[int] = []
    machine.started[0].ask_to_end = lambda: asked.append(1)  # type: ignore[method-assign]
    machine.engine.recycle(machine.managed)
    machine.poll(1.0)
    assert not asked
    machine.poll(1.1)
    assert asked
    machine.started[0].process.returncode = process.STOPPED
    (ended,) = machine.poll()
    assert not ended.hung and ended.code == process.STOPPED


def test_the_first_failure_ends_the_whole_unit() -> None:
    machine = Machine("rank-0", "rank-1")
    machine.poll()
    machine.started[1].process.returncode = 3
    (ended,) = machine.poll()
    assert ended.child.name == "rank-1" and ended.code == 3
    assert machine.started[0].poll() == -signal.SIGKILL


def test_ranks_that_end_with_success_wait_for_one_another_but_not_for_ever() -> None:
    machine = Machine("rank-0", "rank-1")
    machine.poll()
    machine.started[0].process.returncode = 0
    assert machine.poll() == [] and machine.poll(9.0) == []
    (ended,) = machine.poll(2.0)
    assert ended.child.name == "rank-0" and ended.code == 0


def test_once_the_work_is_complete_a_failing_rank_waits_for_the_others_too() -> None:
    machine = Machine("rank-0", "rank-1")
    machine.poll()
    machine.complete = True
    machine.started[1].process.returncode = -6
    assert machine.poll() == []
    machine.started[0].process.returncode = 0
    assert [ended.code for ended in machine.poll()] == [-6]


def test_what_is_not_ready_to_start_is_tried_again() -> None:
    machine = Machine()
    machine.not_ready = True
    machine.poll()
    machine.not_ready = False
    machine.poll(4.0)
    assert not machine.started
    machine.poll(1.1)
    assert machine.started


def test_a_start_that_fails_half_way_is_undone_and_tried_again() -> None:
    machine = Machine("rank-0", "rank-1")
    start, machine.engine.starter = machine.engine.starter, lambda *a, **k: broken(*a, **k)

    def broken(name: str, *rest: Any, **more: Any) -> process.Child:
        if name == "rank-1":
            raise OSError("no space left on device")
        return start(name, *rest, **more)

    with pytest.raises(OSError, match="no space"):
        machine.poll()
    assert machine.started[0].poll() == -signal.SIGKILL and not machine.managed.children
    machine.engine.starter = start
    machine.poll(5.1)
    assert [child.name for child in machine.managed.children] == ["rank-0", "rank-1"]


def test_a_process_about_which_nothing_is_decided_is_dropped() -> None:
    machine = Machine()
    list(machine.engine.poll())
    machine.started[0].process.returncode = 0
    assert len(list(machine.engine.poll())) == 1
    assert machine.managed.life.state is State.DROPPED and not machine.managed.active


def test_the_supervisor_and_the_node_agent_use_the_same_engine() -> None:
    assert Supervisor.__init__.__globals__["SupervisionEngine"] is SupervisionEngine
    assert node_agent.SupervisionEngine is SupervisionEngine
