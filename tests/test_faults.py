"""A live run with the real parts: who gets in, and a sample of random faults (tests/faults.py has them all).

One run serves both, as starting one is what takes time.
"""

import random
import signal
from pathlib import Path

import pytest
from doors import doors, http_doors, tellers, wrongly_open
from fault_kinds import ON_ANY_DISK, ON_ITS_OWN, jumping_clock, small_filesystem
from faults import ENDLESS, SETTINGS, Done, Outcome, Schedule, ended, finish, harass
from promises import violations
from run_parts import Started

pytestmark = [pytest.mark.verl, pytest.mark.run, pytest.mark.timeout(900)]


def test_nobody_gets_in_and_nothing_is_lost(tmp_path: Path) -> None:
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
            started.until("both servers", lambda: len(http_doors(started.run)) == 3)
            root, token = started.process.pid, started.run.token()
            found = doors(root)
            elsewhere = [door for door in found if door.address not in ("127.0.0.1", "::1")]
            assert not elsewhere, "every port is bound to cluster.host, here 127.0.0.1"
            served = http_doors(started.run)
            assert {(door.address, door.port) for door in served} <= {
                (door.address, door.port) for door in found
            }
            assert (
                all(len(paths) > 10 for paths in served.values())
                and sum(map(len, served.values())) > 60
            )
            assert wrongly_open(started.run) == []
            assert tellers(root, token) == []
            assert (
                started.run.path.stat().st_mode & 0o777 == 0o700
                and started.run.secret.stat().st_mode & 0o777 == 0o600
            )

            done: list[Done] = []
            faults = ON_ANY_DISK | (ON_ITS_OWN if mounted else {})
            harass(started, random.Random(0), Schedule(0.4, (1, 3), faults), done)
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
        Done("stop", "SIGINT", 1),
        Done("slow_disk", "6 s", 1, came="ended with 75, resumed"),
    )
    server = Done("terminate", "trajectories-trainer0-0", 4)
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [asked, later], [])) == [asked]
    rank = Done("terminate", "trainer-trainer0-0", 5, came="ended with 75, resumed")
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [asked, server, rank, server], [])) == [rank]
    unasked = Done("kill", "server-0-0", 2, came="ended with 75, resumed")
    assert ended(Outcome(0, 0.3, 30, 256, 0.6, [unasked], [])) == [unasked]
