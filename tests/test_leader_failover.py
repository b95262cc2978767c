"""When a node agent ends by itself: nobody supervises it, whatever the allocation."""

from pathlib import Path

import msgspec
import pytest
from config_parts import composed

from atropos_hpc.contracts.members import AgentState, Roster, SupervisorState
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.rollout.leader_failover import ENDED_S, LeaderFailover
from atropos_hpc.runtime.run_dir import RunDir, write_struct

ALLOCATIONS = ["het", "single", "split"]


class Scene:
    """A run directory with a roster, an agent that watches it, and a clock."""

    def __init__(self, path: Path, allocation: str) -> None:
        self.run, self.now, self.beat = RunDir(path), 0.0, 0
        self.run.create()
        config = composed(f"launch={allocation}", "launch.start_timeout_s=300")
        write_struct(self.run.run_json, RunInfo(config))
        self.run.new_attempt()
        self.own = AgentState(name="agent-rollout0-0", started=10.0, pid=1, alive=True)
        self.failover = LeaderFailover(self.run, clock=lambda: self.now)

    def abandoned(
        self, agent: AgentState | None = None, after_s: float = 1.0, **leader: str
    ) -> str | None:
        """Publish a roster if anything of it is given, wait, and ask."""
        if agent or leader:
            self.beat += 1
            supervisor = SupervisorState(name="supervisor", **leader)  # type: ignore[arg-type]
            members = {"supervisor": supervisor, self.own.name: agent or self.own}
            roster = Roster(beat=self.beat, written=0.0, members=members)
            write_struct(self.run.roster, roster)
            self.failover.abandoned(self.own)
        self.now += after_s
        return self.failover.abandoned(self.own)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_agent_ends_when_its_supervisor_is_silent_in_every_allocation(
    tmp_path: Path, allocation: str
) -> None:
    scene = Scene(tmp_path, allocation)
    assert scene.abandoned(state="running", after_s=290) is None
    assert "silent for 301 s" in (scene.abandoned(after_s=11) or "")


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_agent_ends_soon_after_a_supervisor_that_has_ended_and_waits_for_a_requeued_one(
    tmp_path: Path, allocation: str
) -> None:
    scene = Scene(tmp_path, allocation)
    assert scene.abandoned(state="ended", outcome="requeue", after_s=2 * ENDED_S) is None
    assert scene.abandoned(state="ended", outcome="finish", after_s=ENDED_S - 1) is None
    assert scene.abandoned(after_s=2)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_agent_ends_when_the_next_attempt_has_begun_without_it(
    tmp_path: Path, allocation: str
) -> None:
    scene = Scene(tmp_path, allocation)
    scene.run.new_attempt()
    outlives = allocation == "split"  # its rollout job stays while the trainer's is requeued
    assert (scene.abandoned(state="running") is None) == outlives


def test_an_agent_ends_when_another_one_has_its_place(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "het")
    before = msgspec.structs.replace(scene.own, started=12.0, pid=2)  # and the clock went back
    assert scene.abandoned(before, state="running") is None
    assert scene.abandoned(scene.own, state="running") is None
    after = msgspec.structs.replace(scene.own, started=20.0, pid=3)
    assert "pid 3" in (scene.abandoned(after, state="running") or "")
