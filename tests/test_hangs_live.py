"""A live run with the real parts, in which one member after the other is suspended for good.

Status and log name it within its deadline, it is killed and restarted, and the run goes on to its
end. The deadlines are those of every run, so this takes minutes: ATROPOS_HPC_LONG=1.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_kinds import engines
from run_parts import Started

from atropos_hpc.observe import status
from atropos_hpc.policy.weight_update import ADMIN_TIMEOUT_S
from atropos_hpc.rollout.managed_server import PROBE_EVERY_S, UNHEALTHY_S
from atropos_hpc.runtime.hang_detection import HUNG_S
from atropos_hpc.runtime.membership import BEAT_S, DEAD_S
from atropos_hpc.runtime.run_dir import read_json

pytestmark = [
    pytest.mark.verl,
    pytest.mark.run,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("ATROPOS_HPC_LONG"), reason="takes minutes; ATROPOS_HPC_LONG=1 runs it"
    ),
]
SLACK_S = 20.0  # for polling intervals, on a busy machine


def test_whoever_is_stopped_is_named_ended_and_started_again(tmp_path: Path) -> None:
    started = Started(tmp_path, 1_000_000, "launch.restarts=20")
    try:
        started.step(3)
        for member, reporter in (
            ("environment", "agent-0"),
            ("trainer", "supervisor"),
            ("trajectories", "supervisor"),
            ("agent", "supervisor"),
        ):
            stop_and_follow(started, member, reporter)
        stop_the_engine_and_follow(started)
        started.process.send_signal(signal.SIGTERM)
        assert started.end() == 75, started.story()
        started.assert_nothing_is_left()
        assert started.steps() == list(range(1, len(started.steps()) + 1))
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()


def goes_on(started: Started) -> None:
    at = started.steps()[-1]
    started.until(
        "two more steps", lambda: started.steps()[-1] >= at + 2 or started.steps()[-1] < at, 240
    )
    started.step(len(started.steps()) + 2)


def stop_and_follow(started: Started, kind: str, reporter: str) -> None:
    """Suspend the member of that kind: it is shown as silent once it counts as dead, and killed
    HUNG_S later."""
    name = next(
        m.member.name
        for m in status.read_status(started.run.path).members
        if m.member.name.startswith(kind)
    )
    pid, before = (
        started.pid(kind),
        started.log(reporter).count(f"{name} has sent no heartbeat for too long"),
    )
    os.kill(pid, signal.SIGSTOP)
    since = time.monotonic()

    def shown() -> bool:
        return any(
            m.member.name == name and m.state == "silent"
            for m in status.read_status(started.run.path).members
        )

    within(started, f"{name} in status", shown, since, BEAT_S + DEAD_S)
    silent = f"{name} has sent no heartbeat for too long"
    logged = lambda: started.log(reporter).count(silent) > before  # noqa: E731
    within(started, f"{name} in the log", logged, since, BEAT_S + DEAD_S + HUNG_S)
    started.until(f"the end of {name}", lambda: not Path(f"/proc/{pid}").exists(), 60)
    goes_on(started)


def stop_the_engine_and_follow(started: Started) -> None:
    """Suspend vLLM's engine, behind a server that still answers /health."""
    server = started.pid("server-0-0")
    (engine,) = engines(server)
    agent = started.run.members / "agent-rollout0-0.json"
    served = lambda: read_json(agent)["servers"][0]["version"]  # noqa: E731
    before = served()
    started.until(
        "another version to be served", lambda: served() != before
    )  # while it loads one, it is given ten minutes
    os.kill(engine, signal.SIGSTOP)
    since = time.monotonic()
    said = (
        "server-0-0 has not answered for",
        "server-0-0 is stuck: ",
    )  # in the middle of a push, or not
    logged = lambda: any(each in started.log("agent-0") for each in said)  # noqa: E731
    within(
        started,
        "the server in the log",
        logged,
        since,
        max(UNHEALTHY_S + 2 * PROBE_EVERY_S, ADMIN_TIMEOUT_S),
    )
    started.until("the end of the engine", lambda: not Path(f"/proc/{engine}").exists(), 60)
    goes_on(started)


def within(
    started: Started, what: str, look: Callable[[], bool], since: float, seconds: float
) -> None:
    started.until(what, look, seconds + SLACK_S)
    print(f"{what}: after {time.monotonic() - since:.0f} s, deadline {seconds:.0f} s")
