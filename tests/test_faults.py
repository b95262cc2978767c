"""A live run with the real parts: access control, and a sample of random faults (see faults.py).

One run serves both tests, because starting a run takes most of the time.
"""

import random
import signal
from pathlib import Path

import pytest
from fault_kinds import ON_ANY_DISK, ON_ITS_OWN, jumping_clock, small_filesystem
from faults import ENDLESS, SETTINGS, Injected, Outcome, Schedule, ended, finish, inject_faults
from listeners import http_servers, listening, processes_showing, wrongly_open
from promises import violations
from run_parts import Started

pytestmark = [pytest.mark.verl, pytest.mark.run, pytest.mark.timeout(900)]


def test_every_port_asks_for_the_token_and_faults_lose_nothing(tmp_path: Path) -> None:
    with small_filesystem(tmp_path / "run") as mounted:
        started = Started(
            tmp_path,
            ENDLESS,
            *SETTINGS,
            "rollout.servers=2",
            "environment.workers=2",
            env=jumping_clock(tmp_path),
        )
        try:
            started.step(2)
            started.until("both servers", lambda: len(http_servers(started.run)) == 3)
            root, token = started.process.pid, started.run.token()
            found = listening(root)
            elsewhere = [socket for socket in found if socket.address not in ("127.0.0.1", "::1")]
            assert not elsewhere, "every port is bound to cluster.host, here 127.0.0.1"
            served = http_servers(started.run)
            assert {(socket.address, socket.port) for socket in served} <= {
                (socket.address, socket.port) for socket in found
            }
            assert (
                all(len(paths) > 10 for paths in served.values())
                and sum(map(len, served.values())) > 60
            )
            assert wrongly_open(started.run) == []
            assert processes_showing(root, token) == []
            assert (
                started.run.path.stat().st_mode & 0o777 == 0o700
                and started.run.secret.stat().st_mode & 0o777 == 0o600
            )

            done: list[Injected] = []
            faults = ON_ANY_DISK | (ON_ITS_OWN if mounted else {})
            inject_faults(started, random.Random(0), Schedule(0.4, (1, 3), faults), done)
            assert done
            steps = finish(started)
            started.assert_nothing_is_left()
            assert violations(started, steps) == [], done
        finally:
            if started.process.poll() is None:
                started.process.send_signal(signal.SIGKILL)
                started.process.wait()


def test_an_end_belongs_to_the_fault_that_asked_for_it() -> None:
    asked, later = (
        Injected("stop", "SIGINT", 1),
        Injected("slow_disk", "6 s", 1, came="ended with 75, resumed"),
    )
    server = Injected("terminate", "trajectories-trainer0-0", 4)
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [asked, later], [])) == [asked]
    rank = Injected("terminate", "trainer-trainer0-0", 5, came="ended with 75, resumed")
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [asked, server, rank, server], [])) == [rank]
    unasked = Injected("kill", "server-0-0", 2, came="ended with 75, resumed")
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [unasked], [])) == [unasked]
