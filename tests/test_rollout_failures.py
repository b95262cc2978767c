"""What becomes of environments that are broken: the run goes on, or ends with their own error."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from manual_clock import Clock
from rollout_parts import leader, make_run, module

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atropos_hpc.contracts.members import AgentState, EnvironmentState, ServerState  # noqa: E402
from atropos_hpc.contracts.policy import PolicyVersion  # noqa: E402
from atropos_hpc.rollout import env_worker, environment_process, server_pool  # noqa: E402
from atropos_hpc.rollout.rollout_failures import Loss, Losses, Patience  # noqa: E402
from atropos_hpc.rollout.trial import StubServer  # noqa: E402
from atropos_hpc.runtime.membership import Member, RosterReader  # noqa: E402
from atropos_hpc.runtime.process import DONE, GAVE_UP, REFUSED, STUCK  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_json  # noqa: E402
from atropos_hpc.runtime.waiting import wait_for  # noqa: E402

BROKEN = Path(__file__).parent / "broken_envs.py"
MAX_LENGTH = 96
GROUP = 4
ROLLOUT = {"give_up_after_groups": 4, "give_up_after_s": 0.3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from atropos_hpc.environments.make_base import make_tokenizer

    path = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(path)
    return path


def configure(
    path: Path, model: Path, target: str, start_timeout_s: float = 600, **config: Any
) -> RunDir:
    return make_run(
        path,
        model={"path": str(model), "max_length": MAX_LENGTH},
        environment={"target": target, "group_size": GROUP, "concurrency": 4, "config": config},
        rollout=ROLLOUT,
        launch={"start_timeout_s": start_timeout_s},
    )


@contextlib.contextmanager
def stub_server(run: RunDir) -> Iterator[None]:
    """A stub of a vLLM server in a thread, and the node agent's member file that lists it."""
    ready, over = threading.Event(), threading.Event()
    member = Member(run, AgentState(state="serving"), "local")

    async def serve() -> None:
        async with StubServer(14, 1, MAX_LENGTH) as stub:
            version = PolicyVersion(version=0, attempt=1)
            member.update(servers=[ServerState(url=stub.url, version=version)])
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        over.set()
        thread.join()
        member.leave()


def request(url: str, run: RunDir, method: str, path: str, body: Any = None) -> None:
    headers = {"Authorization": f"Bearer {run.token()}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url + path, data, headers, method=method)
    with urllib.request.urlopen(call, timeout=30) as answer:
        assert answer.status in (200, 204)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[RunDir]:
    """A run with a trajectory server, a stub of a vLLM server, and a trainer that wants a lot."""
    path = tmp_path_factory.mktemp("run") / "run"
    run = configure(path, model, "nowhere:Nothing")
    log = tmp_path_factory.mktemp("logs") / "trajectories.log"
    server = module("atropos_hpc.trajectories.server", "--run-dir", str(run.path), log=log)
    with leader(run), stub_server(run), server:
        url = RosterReader(run.roster).trajectory_server
        url = wait_for("the URL", "the trajectory server", url, 60)
        trainer = {"batch_size": 4096, "max_token_len": MAX_LENGTH, "num_steps": 9}
        request(url, run, "POST", "/register", trainer)
        request(url, run, "GET", "/lease?batch=0&rank=0&world=1")
        yield run


class HastyAsyncio:
    """asyncio for BaseEnv, whose env_manager sleeps 5 s for other programs to start."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.1))


@dataclass
class Ended:
    """A worker that has ended."""

    code: int
    state: EnvironmentState

    @property
    def error(self) -> str:
        assert self.state.error is not None
        return self.state.error


@pytest.fixture
def worker(cluster: RunDir, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a worker with the environment of that name until `until` holds, or it ends by itself."""
    monkeypatch.setattr("atroposlib.envs.base.asyncio", HastyAsyncio())

    def run_worker(
        name: str, until: Callable[[EnvironmentState], bool] = lambda _: False, **config: Any
    ) -> Ended:
        target = name if ":" in name else f"{BROKEN}:{name}"
        configure(cluster.path, model, target, **config)
        server_pool.pool_of.cache_clear()  # it belongs to one event loop
        member = Member(cluster, EnvironmentState(), "local", 0)

        async def work() -> None:
            task = asyncio.create_task(env_worker.work(cluster, member, 0, "environment"))
            for _ in range(600):
                done, _pending = await asyncio.wait([task], timeout=0.1)
                if done:
                    return await task
                if until(member.state):
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                    return None
            raise AssertionError(f"the worker neither ended nor got on: {member.state}")

        ended = Ended(environment_process.run_member(member, work), member.state)
        watches = [each for each in threading.enumerate() if each.name == "stall watch"]
        for each in watches:  # whatever has ended the work, nothing ends this process later
            each.join(2)
        assert not any(each.is_alive() for each in watches)
        return ended

    return run_worker


def last_line(directory: Path, ended: Ended) -> str:
    """The console's last line of a run, by the real command, whose worker ends like that."""
    stand_in = Path(__file__).with_name("ending_stand_in.py")
    command = [sys.executable, str(stand_in), str(directory), str(ended.code), ended.error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("RaisesAtOnce", {}, ["LookupError: no such tool", "in collect_trajectories"]),
        ("ReturnsNone", {}, ["returned None"]),
        ("ReturnsNoPair", {}, ["returned NoneType, not (group, backlog)"]),
        ("CatchesItsErrors", {}, ["returned None", f"model.max_length={MAX_LENGTH}"]),
        ("LongPrompts", {}, ["each time", "120 tokens", f"model.max_length={MAX_LENGTH}"]),
        ("WrongScores", {}, ["refused", "scores: 5 for 4 sequences"]),
        ("WrongSize", {}, ["3 sequences, not group_size=4"]),
        ("NaNScores", {}, ["refused", "scores: NaN or Inf"]),
        ("SystemTurn", {}, ["System role not supported", "in collect_trajectories"]),
        ("Hangs", {"worker_timeout": 1}, ["more than 1 s", "worker_timeout", "in collect_traj"]),
        ("Exits", {}, ["it called sys.exit(0)", "in collect_trajectories"]),
    ],
)
def test_a_worker_whose_rollouts_all_fail_gives_up_with_the_environment_s_name_and_the_cause(
    worker: Callable[..., Ended], tmp_path: Path, name: str, config: dict[str, Any], says: list[str]
) -> None:
    ended = worker(name, **config)
    assert ended.code == GAVE_UP
    assert "the run failed: " in (line := last_line(tmp_path, ended)) and line.endswith(ended.error)
    for text in ("environment (", f"broken_envs.py:{name})", *says):
        assert text in ended.error
    if ended.state.reasons[0].kind in (Loss.FAILED, Loss.NOTHING):
        assert f"{BROKEN}:" in ended.error.partition(f"{name})")[2]  # the line of its code
    assert ended.state.unsent or ended.state.refused
    assert ended.state.reasons[0].text in ended.error
    assert not ended.state.sent


@pytest.mark.parametrize(
    ("name", "lost"), [("RaisesSometimes", Loss.FAILED), ("EqualScores", Loss.EQUAL_SCORES)]
)
def test_a_worker_goes_on_while_some_rollouts_succeed_or_only_lack_signal_and_counts_the_others(
    worker: Callable[..., Ended], name: str, lost: Loss
) -> None:
    def enough(state: EnvironmentState) -> bool:
        return (state.unsent or 0) > 20 and (bool(state.sent) or lost is Loss.EQUAL_SCORES)

    ended = worker(name, enough)
    assert (ended.code, ended.state.error) == (DONE, None)
    assert ended.state.unsent_by == {lost: ended.state.unsent}
    assert ended.state.reasons[0].kind == lost and ended.state.reasons[0].count > 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def losses(clock: Clock) -> Losses:
    return Losses("environment (e:E)", Patience(groups=4, seconds=60), clock=clock)


def test_a_worker_gives_up_after_enough_failures_in_a_row_and_after_enough_time(
    losses: Losses, clock: Clock
) -> None:
    for _ in range(100):
        losses.lose(Loss.FAILED, "an outage")
    assert losses.verdict() is None  # of a service that may be back soon
    clock.now = 61
    assert "100 rollouts" in (losses.verdict() or "")
    losses.accept(1)
    assert losses.verdict() is None
    for clock.now in (62, 100, 130):
        losses.lose(Loss.FAILED, "slow")
    assert losses.verdict() is None  # three of four
    losses.lose(Loss.REFUSED, "scores: NaN or Inf")
    verdict = losses.verdict()
    assert verdict is not None
    for text in ("environment (e:E)", "last 4 rollouts", "1 of 4 times", "scores: NaN or Inf"):
        assert text in verdict


def test_equal_scores_are_no_failure_and_what_an_environment_filters_takes_more_patience(
    losses: Losses, clock: Clock
) -> None:
    for clock.now in range(0, 1000, 10):
        losses.lose(Loss.EQUAL_SCORES, "all scores of the group are equal")
    assert losses.verdict() is None and losses.unsent == 100
    for clock.now in range(1000, 1310, 10):
        losses.lose(Loss.NOTHING, "returned None")
    assert losses.verdict() is None
    losses.lose(Loss.NOTHING, "returned None")
    assert "last 32 rollouts" in (losses.verdict() or "")


def test_failing_rollouts_start_ever_more_slowly(losses: Losses, clock: Clock) -> None:
    assert not losses.pausing()
    losses.lose(Loss.FAILED, "bad")
    clock.now += 1
    assert not losses.pausing()
    for _ in range(200):
        losses.lose(Loss.FAILED, "bad")
    clock.now += 3.9
    assert losses.pausing()
    clock.now += 1.1
    assert not losses.pausing()


def test_boolean_scores_are_numbers(worker: Callable[..., Ended]) -> None:
    ended = worker("BooleanScores", lambda state: (state.sent or 0) > 2)
    assert (ended.code, ended.state.refused, ended.state.unsent) == (DONE, 0, 0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NumbersForAnswers", "AttributeError: 'int' object has no attribute 'strip'"),
        ("NoPrompt", "FileNotFoundError: /data/train.jsonl"),
        ("ExitsInATask", "it called sys.exit('no key')"),
    ],
)
def test_an_error_outside_of_rollouts_ends_the_worker_with_that_error_and_line(
    worker: Callable[..., Ended], tmp_path: Path, name: str, says: str
) -> None:
    ended = worker(name)
    assert (
        ended.code == environment_process.CRASHED
    )  # the restart policy restarts it, up to its limit
    assert f"broken_envs.py:{name})" in ended.error and says in ended.error
    assert f"({BROKEN}:" in ended.error
    assert "the run failed: " in (line := last_line(tmp_path, ended)) and line.endswith(ended.error)


def test_a_class_that_cannot_be_imported_on_its_node_is_refused_with_file_and_line(
    worker: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "node_env.py"
    path.write_text("import os\nimport sandbox_of_the_login_node\n")
    ended = worker(f"{path}:Env")
    assert ended.code == REFUSED
    for text in ("environment.target", "No module named 'sandbox_of_the_login_node'", f"{path}:2"):
        assert text in ended.error
    assert "the run failed: " in (line := last_line(tmp_path, ended)) and line.endswith(ended.error)


def test_a_worker_that_blocks_its_process_is_ended_with_the_line_at_which_it_is(
    cluster: RunDir, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hanging_env.py"
    path.write_text("import time\n\ntime.sleep(3600)\n")
    blocks, imports = f"{BROKEN}:Blocks", f"{path}:Env"
    run = configure(cluster.path, model, blocks, start_timeout_s=10)
    hanging = {"more_environments": {"other": {"target": imports, "group_size": GROUP}}}
    write_json(run.run_json, {"config": read_json(run.run_json)["config"] | hanging})
    name, log = "atropos_hpc.rollout.env_worker", tmp_path / "log"
    first = ("--run-dir", str(run.path), "--index", "5")
    second = (
        "--run-dir",
        str(run.path),
        "--index",
        "6",
        "--environment",
        "more_environments.other",
    )
    with module(name, *first, log=log) as one, module(name, *second, log=log) as other:
        assert [one.wait(120), other.wait(120)] == [STUCK, STUCK], log.read_text()
    said = [read_json(run.members / f"environment-local-{i}.json")["error"] for i in (5, 6)]
    for text in (blocks, "main loop", f"{BROKEN}:", "in collect_trajectories"):
        assert text in said[0]
    for text in ("more_environments.other", imports, "the import has not ended", f"{path}:3"):
        assert text in said[1]
