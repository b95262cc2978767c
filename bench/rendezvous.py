"""Measure what a thousand members cost to find each other and to be seen alive.

Members, supervisor and readers of the roster are the real ones, all in this process. The members
start within SPREAD_S. The supervisor looks every 0.1 s, as in a run. Each member looks at the
roster every 0.1 s until it has seen all the others, then every second, which the roster's reader
makes rarer by itself.

An operation is a call that names a path or asks for a file's attributes, which is what a metadata
server sees: open, rename, stat, listing a directory, touching a file. Reads and writes of open
files come on top, at most two per open. One shortcut: a roster that one reader has parsed is not
parsed again for the next."""

import functools
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from atropos_hpc.contracts.members import AgentState, Roster, ServerState
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.runtime import membership
from atropos_hpc.runtime.membership import Member, RosterPublisher, RosterReader
from atropos_hpc.runtime.run_dir import RunDir
from bench.result import Result

MEMBERS = 1000
SPREAD_S = 3.0
STEADY_S = 30.0
CALLS = {"open", "os.rename", "os.scandir", "os.listdir", "os.utime", "os.remove", "os.mkdir"}


class Counted(RosterPublisher):
    """Count calls for attributes too, which the interpreter's audit hook does not see."""

    stats = 0

    def _scan(self, now: float) -> None:
        super()._scan(now)
        self.stats += len(self._files)

    def _read_changed(self, now: float) -> None:
        super()._read_changed(now)
        self.stats += 1


class Operations:
    """Counts calls on paths below a directory, by this process."""

    def __init__(self, below: Path) -> None:
        self.below, self.count = str(below), 0
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and arguments and str(arguments[0]).startswith(self.below):
            self.count += 1


def main() -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        return measure(RunDir(Path(scratch) / "run"))


def measure(run: RunDir) -> Result:
    run.create()
    decode = functools.lru_cache(maxsize=2)(msgspec.json.Decoder(Roster).decode)
    leader, over, cpu = Counted(run), threading.Event(), [0.0]
    operations = Operations(run.path)

    def lead() -> None:
        while not over.wait(0.1):
            leader.publish()
            cpu[0] = time.thread_time()

    leading = threading.Thread(target=lead, daemon=True)
    leading.start()
    begin = time.monotonic()
    members, rosters = [], [RosterReader(run.roster, decode=decode) for _ in range(MEMBERS)]
    waiting: set[int] = set()
    while len(members) < MEMBERS or waiting:
        due = min(MEMBERS, int((time.monotonic() - begin) / SPREAD_S * MEMBERS) + 1)
        for i in range(len(members), due):
            members.append(Member(run, AgentState(number=i), f"n{i:04}"))
            waiting.add(i)
        waiting = {i for i in waiting if len(rosters[i].members(AgentState)) < MEMBERS}
        time.sleep(0.1)
    joined_s, joined = time.monotonic() - begin, operations.count + leader.stats

    begin, cpu_before, before = time.monotonic(), cpu[0], operations.count + leader.stats
    next_look = [begin + random.random() for _ in range(MEMBERS)]
    while (now := time.monotonic()) - begin < STEADY_S:
        for i in range(MEMBERS):
            if now >= next_look[i]:
                rosters[i].read()
                next_look[i] = now + membership.jittered(1.0)
        time.sleep(0.02)
    elapsed = time.monotonic() - begin
    steady = (operations.count + leader.stats - before) / MEMBERS / elapsed
    share = (cpu[0] - cpu_before) / elapsed
    seen = sum(member.alive for member in leader.members.values())

    begin = time.monotonic()
    members[7].update(
        servers=[ServerState(url="http://a", version=PolicyVersion(version=1, attempt=1))]
    )
    while not rosters[11].servers():
        time.sleep(0.01)
    heard_s = time.monotonic() - begin
    over.set()
    leading.join()
    for member in members:
        member._stop.set()
    size = run.roster.stat().st_size
    row = {
        "members": MEMBERS,
        "operations to join": joined,
        "seconds to join": joined_s,
        "operations per member and second": steady,
        "roster, bytes": size,
        "leader's share of a core": share,
        "a change is heard of after, s": heard_s,
        "alive": seen,
    }
    result = Result([row], details={"load": os.getloadavg()})
    result.at_most("operations until a thousand members have seen each other", joined, 12_000)
    result.at_most("operations per member and second after that", steady, 1.0)
    result.at_least("members that count as alive at the end", seen, MEMBERS)
    return result
