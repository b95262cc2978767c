"""The contract that the stand-in of both roles shares with the real ones.

Tests of the Slurm path run tests/slurm_stand_in.py in place of the learner and the node agent. Each
test here runs once against the stand-in and once against the real program, so what those tests rely
on is true of both: command lines, exit codes, member files, and the files of the run directory.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from run_files import step_metrics
from test_learner_run import GROUPS, STEPS, group, new_run, post, trajectory_server

from atropos_hpc.contracts.members import AgentState, AnyMember, Done, StopRequest, TrainerState
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member, post_request, withdraw_request
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_struct
from atropos_hpc.runtime.waiting import wait_for

STAND_IN = [sys.executable, str(Path(__file__).parent / "slurm_stand_in.py")]
REAL = [sys.executable]
AGENTS = [pytest.param(STAND_IN, id="stand-in"), pytest.param(REAL, id="real")]
VARIABLES = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "ATROPOS_HPC_HOST": "127.0.0.1",
    "ATROPOS_HPC_NODE": "n0",
}
DEADLINE_S = 180.0


@pytest.fixture
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model directory; the stand-in never opens it."""
    path = tmp_path / "model"
    path.mkdir()
    if "real" in request.node.name:
        import torch

        from atropos_hpc.environments.make_base import make_model, make_tokenizer

        torch.manual_seed(0)
        make_model(0).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return path


@contextmanager
def surroundings(run: RunDir) -> Iterator[None]:
    """A trajectory server with every group of the run, an agent, and a roster that names them."""
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(STEPS * GROUPS)])
        agent = Member(run, AgentState(state="serving"), "n1")
        try:
            yield
        finally:
            agent.leave()


def start(program: list[str], run: RunDir, name: str, *words: str) -> process.Child:
    variables = {**VARIABLES, "ATROPOS_HPC_STEP": name}
    command = [*program, "-m", *words]
    return process.start(name, command, run.logs / f"{name}.log", variables)


def code_of(child: process.Child, run: RunDir) -> int:
    try:
        return child.process.wait(DEADLINE_S)
    finally:
        process.end([child], 1)
        print(process.tail(run.logs / f"{child.name}.log", 40))


def steps_of(run: RunDir) -> list[int]:
    return [line.step for line in step_metrics(run)]


def member_of(run: RunDir, name: str) -> AnyMember:
    return msgspec.json.decode((run.members / f"{name}.json").read_bytes(), type=AnyMember)


Stop = Callable[[process.Child, RunDir], None]
STOPS: dict[str, Stop] = {
    "a request": lambda child, run: post_request(run, StopRequest(by="test")),
    "TERM": lambda child, run: child.signal(signal.SIGTERM),
    "USR2": lambda child, run: child.signal(signal.SIGUSR2),
}


@pytest.mark.parametrize(
    ("program", "how"),
    [
        *(pytest.param(STAND_IN, how, id=f"stand-in-{how}") for how in STOPS),
        pytest.param(REAL, "TERM", id="real-TERM", marks=pytest.mark.verl),
    ],
)
def test_a_learner_saves_when_stopped_and_resumes(
    tmp_path: Path, model: Path, program: list[str], how: str
) -> None:
    run = new_run(tmp_path / "run", model)
    words = ("atropos_hpc.learner", "--run-dir", str(run.path))
    with surroundings(run):
        first = start(program, run, "first", *words)
        wait_for("step 2", "the learner", lambda: len(steps_of(run)) >= 2, DEADLINE_S)
        STOPS[how](first, run)
        assert code_of(first, run) == process.STOPPED
        saved = read_json(run.checkpoints / "latest.json")["step"]
        assert saved == steps_of(run)[-1] and read_struct(run.done, Done) is None
        member = member_of(run, "trainer-n0-0")
        assert isinstance(member, TrainerState)
        assert (member.state, member.rank, member.step_id) == ("ended", 0, "first")

        withdraw_request(run, StopRequest)
        second = start(program, run, "second", *words)
        assert code_of(second, run) == process.DONE
    assert f"starts at step {saved}" in (run.logs / "second.log").read_text()
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert read_struct(run.done, Done) == Done(version=STEPS)
    assert read_json(run.checkpoints / "latest.json")["step"] == STEPS
    assert {line.attempt for line in step_metrics(run)} == {run.attempt()}


@pytest.mark.parametrize("program", AGENTS)
def test_an_agent_leaves_at_term(tmp_path: Path, program: list[str]) -> None:
    """The real agent's servers cannot start here, where vLLM is missing; it stays all the same."""
    run = new_run(tmp_path / "run", tmp_path)
    path = run.members / "agent-n0-0.json"
    words = ("atropos_hpc.rollout.node_agent", "--run-dir", str(run.path), "--index", "0")
    with surroundings(run):
        child = start(program, run, "agent", *words)
        wait_for("its member file", "the agent", path.exists, DEADLINE_S)
        time.sleep(0.5)  # its handler of TERM
        assert isinstance(member_of(run, "agent-n0-0"), AgentState)
        child.signal(signal.SIGTERM)
        assert code_of(child, run) == process.STOPPED
    member = member_of(run, "agent-n0-0")
    assert member.state == "ended" and json.loads(path.read_text())["servers"] == []
