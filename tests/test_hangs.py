"""A process that hangs dumps its stack traces to its log and is killed.

The supervisor's log says who waits for whom.
"""

import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from manual_clock import Clock

from atropos_hpc.config import Config, LaunchConf
from atropos_hpc.contracts.members import (
    EnvironmentState,
    TrainerState,
    Wait,
)
from atropos_hpc.launch.steps import Step
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.runtime import membership, process
from atropos_hpc.runtime.hang_detection import ProgressWatch, SilenceWatch, describe_waits
from atropos_hpc.runtime.process import ProcessSpec
from atropos_hpc.runtime.restart_policy import Action
from atropos_hpc.runtime.run_dir import RunDir

# A member that is at step 3, and then does one of these
HANGS = {
    "gets no further": "time.sleep(600)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "waited in vain": "wait_for_the_other(); sys.exit(process.STUCK)",
}


def member_program(run: RunDir, kind: str, then: str) -> list[str]:
    state = "TrainerState" if kind == "trainer" else "AgentState"
    program = f"""
        import os, signal, sys, time
        from pathlib import Path
        from atropos_hpc.contracts.members import AgentState, TrainerState
        from atropos_hpc.runtime import process
        from atropos_hpc.runtime.membership import Member
        from atropos_hpc.runtime.run_dir import RunDir
        def wait_for_the_other():
            while not (member.path.parent / "agent-n-0.json").exists():
                time.sleep(0.1)
            time.sleep(3)
        def here_it_hangs():
            {then}
        process.die_with_parent(signal.SIGKILL)
        process.dump_stacks_on_request()
        state = {state}(state="training")
        if {kind == "trainer"}:
            state.step = 3
        member = Member(RunDir(Path({str(run.path)!r})), state, "n", beat_s=0.1)
        time.sleep({2 if kind == "trainer" else 0})  # until the others are where they stay
        here_it_hangs()
    """
    return [sys.executable, "-c", textwrap.dedent(program)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    run.new_attempt()
    return run


@pytest.mark.parametrize("how", HANGS)
def test_a_learner_that_hangs_is_named_dumped_and_ended(
    run: RunDir, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    commands = {
        "agent": member_program(run, "agent", "time.sleep(600)"),
        "trainer": member_program(run, "trainer", HANGS[how]),
    }
    steps = [
        Step(name, name, (ProcessSpec(name, tuple(command), {"ATROPOS_HPC_NODE": "n"}),))
        for name, command in commands.items()
    ]
    conf = LaunchConf(
        restarts=0,
        start_timeout_s=30,
        step_timeout_s=2 if how == "gets no further" else 600,
        grace_s=1,
    )
    waiting = membership.Member(run, EnvironmentState(), "n", beat_s=0.1)
    waiting.show_wait(Wait("a vLLM server", "the node agents", time.time()))
    supervisor = Supervisor(
        run, Config(run_dir=str(run.path), launch=conf), steps, lambda members: None
    )
    supervisor.roster.dead_s, supervisor.silence.hung_s = 1.5, 1.0
    end = supervisor.supervise()
    waiting.leave()
    assert end is Action.FAIL
    assert (
        "environment-n-0 has waited" in caplog.text
        and "for a vLLM server from the node agents" in caplog.text
    )
    if how == "waited in vain":
        assert "here_it_hangs" in (run.logs / "agent.log").read_text(), (
            "those that were waited for tell their stacks"
        )
        return
    named = {
        "gets no further": "state training, step 3",
        "is stopped": "no heartbeat for too long",
    }[how]
    assert (
        f"trainer-n-0 has {'been in ' if how == 'gets no further' else 'sent '}{named}"
        in caplog.text
    )
    if how == "gets no further":
        assert "here_it_hangs" in (run.logs / "trainer.log").read_text()


def test_only_who_listens_is_asked_for_stacks(tmp_path: Path) -> None:
    deaf = process.start(
        "deaf", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log"
    )
    time.sleep(0.5)
    assert not process.request_stacks(deaf.pid) and deaf.poll() is None
    assert os.getpid() not in process.descendants_of(
        os.getpid()
    ) and deaf.pid in process.descendants_of(os.getpid())
    process.end([deaf], 1)
    assert not process.request_stacks(deaf.pid)


def member(name: str = "trainer-n-0", **more: Any) -> TrainerState:
    return TrainerState(**{"name": name, "pid": 1, "state": "training", "step": 3, **more})


def test_a_member_hangs_when_it_is_silent_without_a_break() -> None:
    clock = Clock()
    silence = SilenceWatch(hung_s=90, clock=clock)
    for shown in (
        [member(alive=False)],
        [member()],
        [member(alive=False)],
        [member(alive=False, state="ended")],
    ):
        assert silence.hung(shown) == []
        clock.now += 91
    silence.hung([member(alive=False)])
    clock.now += 91
    assert silence.hung([member(alive=False, pid=2)]) == [], "it has been started again"
    clock.now += 91
    assert len(silence.hung([member(alive=False, pid=2)])) == 1


def test_a_wait_is_no_hang_for_it_has_a_deadline_of_its_own() -> None:
    clock = Clock()
    progress = ProgressWatch(start_timeout_s=600, step_timeout_s=50, clock=clock)
    wait = Wait("batch 3", "the trajectory server", 0.0)
    for seen in (
        [member()],
        [member(step=4)],
        [member(step=4, waiting=wait)],
        [member(step=4, state="loading")],
        [member(step=4)],
        [],
    ):
        assert progress.stalled_s(seen) is None
        clock.now += 51
    progress.stalled_s([member()])
    clock.now += 51
    assert progress.stalled_s([member()]) == 51


def test_a_description_of_waits_names_who_waits_for_whom() -> None:
    wait = Wait("batch 3", "the trajectory server", 40.0)
    shown = [
        member(waiting=wait),
        member("agent-n-0"),
        member("server", alive=False),
        member("old", alive=False, state="ended", waiting=wait),
    ]
    assert describe_waits(shown, 100.0) == [
        "trainer-n-0 has waited 60 s for batch 3 from the trajectory server",
        "server sends no heartbeat",
    ]
