"""How the members of a run find each other: small files on the shared filesystem.

1. Each member owns one file, members/<name>.json. It replaces the file when its state changes and
   touches it every few seconds as a heartbeat.
2. Only the supervisor reads that directory (`RosterPublisher`). It publishes what it finds as
   roster.json, which everybody else reads (`RosterReader`).
3. Requests go the other way: `post_request` writes requests/<name>.json, and the member concerned
   polls for it.

The cost per member is constant: with more members, both the supervisor's full scans and the
members' reads of the roster become rarer (with a thousand members, seconds apart). Between scans
the supervisor notices a change of state by the directory's mtime, and whose file it was by inode
numbers, which a directory listing contains.

Liveness is judged by changes of a file's mtime, on the reader's own monotonic clock, because the
clocks of nodes differ.
"""

import contextlib
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    MemberState,
    Request,
    Roster,
    TrajectoriesState,
    Wait,
)
from atropos_hpc.runtime.process import peak_memory
from atropos_hpc.runtime.run_dir import RunDir, read_struct, write_file, write_struct

log = logging.getLogger(__name__)
S = TypeVar("S", bound=MemberState)
R = TypeVar("R", bound=Request)

# Not the global generator: heartbeats run in a thread, and the order of an environment's prompts
# follows from the global one.
JITTER = random.Random()
BEAT_S = 7.0  # between a member's heartbeats
DEAD_S = 30.0  # without a heartbeat; a busy filesystem may stall a node for that long
ROSTER_BEAT_S = 2.0  # between writes of the roster, at most
SCAN_S = 0.005  # per member, between the supervisor's full scans
CHANGE_S = 0.01  # between the supervisor's looks for a replaced member file
READ_S = 0.003  # per member, between a reader's looks at the roster
SMALL_RUN = 20  # members up to which scans and reads are not spaced at all

_decode_member = msgspec.json.Decoder(AnyMember).decode
_decode_roster = msgspec.json.Decoder(Roster).decode


class Member(Generic[S]):
    """This process's member file. `state` is the state struct of its kind.

    The heartbeat comes from a thread of its own: it proves that the process lives, not that it
    makes progress. Progress is what `state.state`, `state.waiting` and the counters show.
    """

    def __init__(
        self, run: RunDir, state: S, node: str, index: int = 0, beat_s: float = BEAT_S
    ) -> None:
        self.state = state
        self.name = state.name = f"{state.kind}-{node}-{index}"
        state.node, state.host, state.pid = node, socket.gethostname(), os.getpid()
        state.started = time.time()
        self.path = run.members / f"{self.name}.json"
        self._beat_s = beat_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._current = False  # whether the file has the present state
        self.update()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Set fields of the state and write the file. A full disk is logged; the next heartbeat
        writes again. Raises AttributeError for a field that this kind of member does not have."""
        with self._lock:
            for name, value in changes.items():
                setattr(self.state, name, value)
            self.state.peak_bytes = peak_memory()
            self._current = write_volatile(self.path, self.state)

    def update_if_changed(self, **changes: Any) -> None:
        """`update`, unless all fields have these values already."""
        if any(getattr(self.state, name) != value for name, value in changes.items()):
            self.update(**changes)

    def show_wait(self, wait: Wait | None) -> None:
        """Show what this member waits for; None: for nothing. Keeps `since` of an equal wait."""
        known = self.state.waiting
        if wait is None and known is None:
            return
        if wait and known and (wait.what, wait.from_whom) == (known.what, known.from_whom):
            return
        self.update(waiting=wait)

    def leave(self, **changes: Any) -> None:
        """Stop the heartbeat and mark the member as ended. The file stays, as a record."""
        self.stop_beating()
        self.update(**{"state": "ended", "waiting": None, **changes})

    def stop_beating(self) -> None:
        """Stop the heartbeat without a last word, as a killed process does."""
        self._stop.set()
        self._thread.join()

    def _keep_beating(self) -> None:
        while not self._stop.wait(jittered(self._beat_s)):
            try:
                if self._current:
                    os.utime(self.path)
                    continue
            except OSError:
                pass
            self.update()


@dataclass
class _File:
    """A member's file as the supervisor read it last."""

    inode: int
    mtime_ns: int
    since: float  # when this mtime was first seen, monotonic
    state: AnyMember | None


@dataclass
class RosterPublisher:
    """The supervisor's side: reads the member files and publishes the roster."""

    run: RunDir
    dead_s: float = DEAD_S
    scan_s: float = SCAN_S
    read_s: float = READ_S
    members: dict[str, AnyMember] = field(default_factory=dict)
    beat: int = 0
    _files: dict[str, _File] = field(default_factory=dict)
    _directory_mtime_ns: int = -1
    _next_scan: float = 0.0  # monotonic
    _written: float = 0.0  # monotonic

    def publish(self, at_once: bool = False) -> dict[str, AnyMember]:
        """Read what has changed, judge liveness, and write the roster when it changed or its own
        heartbeat is due. `at_once`: scan and write in any case."""
        now = time.monotonic()
        if at_once or now >= self._next_scan:
            self._scan(now)
            self._next_scan = now + jittered(self.scan_s * self._crowd())
        else:
            self._read_changed(now)
        members = {}
        for name in sorted(self._files):
            file = self._files[name]
            if file.state is not None:
                silent = now - file.since >= self.dead_s
                file.state.alive = file.state.state != "ended" and not silent
                members[file.state.name] = file.state
        changed = members != self.members
        self.members = {name: msgspec.structs.replace(state) for name, state in members.items()}
        since_write = now - self._written
        changed_due = changed and since_write > self.read_s * self._crowd()
        if at_once or changed_due or since_write > ROSTER_BEAT_S:
            self.beat += 1
            self._written = now
            roster = Roster(beat=self.beat, written=time.time(), members=members)
            write_volatile(self.run.roster, roster)
        return self.members

    def await_change(self, timeout_s: float) -> None:
        """Sleep until a member replaces its file, at most so long."""
        deadline = time.monotonic() + timeout_s
        pause_s = timeout_s if self._crowd() or self._directory_mtime_ns < 0 else CHANGE_S
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, pause_s))
            with contextlib.suppress(OSError):  # which `publish` raises
                if pause_s < timeout_s and self._changed_ns() != self._directory_mtime_ns:
                    return time.sleep(pause_s)  # for the rename that follows, and coarse mtimes

    def _crowd(self) -> int:
        """The number of members by which scans and writes are spaced; 0 in a small run."""
        return len(self._files) if len(self._files) > SMALL_RUN else 0

    def _scan(self, now: float) -> None:
        """Look at every file's mtime; read those that were replaced or touched."""
        self._directory_mtime_ns = self._changed_ns()
        found = {}
        for entry in self._list():
            known = self._files.get(entry.name)
            try:
                status = entry.stat()
            except OSError:
                continue
            stamp = (status.st_ino, status.st_mtime_ns)
            if known is not None and known.state and (known.inode, known.mtime_ns) == stamp:
                found[entry.name] = known
                continue
            file = self._read(entry.name, now)
            if file is None and known is not None:
                # Damaged, but touched: its owner lives and is taken to be in the state known.
                file = replace(known, inode=stamp[0], mtime_ns=stamp[1], since=now)
            found[entry.name] = file or _File(0, 0, now, None)
        self._files = found

    def _read_changed(self, now: float) -> None:
        """Between scans: read files that are new or were replaced. (An inode number that is used
        twice in a row is noticed by the next scan.)"""
        changed = self._changed_ns()
        if changed == self._directory_mtime_ns:
            return
        self._directory_mtime_ns = changed
        for entry in self._list():
            known = self._files.get(entry.name)
            new = known is None or known.inode != entry.inode()
            if new and (file := self._read(entry.name, now)):
                self._files[entry.name] = file

    def _changed_ns(self) -> int:
        return self.run.members.stat().st_mtime_ns

    def _list(self) -> list["os.DirEntry[str]"]:
        with os.scandir(self.run.members) as entries:
            return [e for e in entries if e.name.endswith(".json") and not e.name.startswith(".")]

    def _read(self, name: str, now: float) -> _File | None:
        """The file, or None while it cannot be read."""
        try:
            with (self.run.members / name).open("rb") as file:
                status = os.fstat(file.fileno())
                state = _decode_member(file.read())
                return _File(status.st_ino, status.st_mtime_ns, now, state)
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("cannot read member file %s: %s; using the state known before", name, error)
            return None

    def mark_ended(self, *names: str) -> None:
        """Mark members whose processes are known to have ended, so that nobody waits `dead_s`."""
        for name in names:
            file = self._read(f"{name}.json", time.monotonic()) or self._files.get(f"{name}.json")
            if file is not None and file.state is not None:
                ended = msgspec.structs.replace(file.state, state="ended", waiting=None)
                write_volatile(self.run.members / f"{name}.json", ended)


def read_members(run: RunDir) -> list[AnyMember]:
    """Read every member file that can be read, in order of name. For rare looks: the roster is what
    members read all the time."""
    found = []
    for path in sorted(run.members.glob("[!.]*.json")):
        try:
            found.append(_decode_member(path.read_bytes()))
        except (OSError, msgspec.MsgspecError):  # replaced meanwhile, or damaged
            continue
    return found


def write_volatile(path: Path, value: msgspec.Struct) -> bool:
    """Write a file that describes the present only, without fsync. Returns whether that worked: a
    full disk is logged and is no reason to end."""
    try:
        write_file(path, msgspec.json.encode(value), durable=False)
    except OSError as error:
        log.warning("cannot write %s: %s; the next heartbeat writes it", path, error)
        return False
    return True


def jittered(seconds: float) -> float:
    """A random 80 to 120 % of `seconds`, so that members do not act in lockstep."""
    return seconds * JITTER.uniform(0.8, 1.2)


class RosterReader:
    """Reads roster.json, and parses it only when it was replaced."""

    def __init__(
        self,
        path: Path,
        read_s: float = READ_S,
        clock: Callable[[], float] = time.monotonic,
        decode: Callable[[bytes], Roster] = _decode_roster,
    ) -> None:
        self.path, self._read_s, self._clock, self._decode = path, read_s, clock, decode
        self._stamp: tuple[int, int] | None = None
        self._content = Roster()
        self._next = 0.0  # when to look again

    def read(self) -> Roster:
        """Return the newest roster; an empty one before the first. An unreadable one is skipped:
        the last good one stays valid. In a large run the file is opened only now and then."""
        now = self._clock()
        if now < self._next:
            return self._content
        try:
            # Opened, not only stat'ed: opening makes NFS ask the server.
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_ino)
                if stamp != self._stamp:
                    self._content = self._decode(file.read() or b"{}")
                    self._stamp = stamp
        except FileNotFoundError:
            self._content = Roster()
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("cannot read roster %s: %s; using the previous one", self.path, error)
        if (crowd := len(self._content.members)) > SMALL_RUN:
            self._next = now + jittered(self._read_s * crowd)
        return self._content

    def members(self, kind: type[S], alive: bool = True) -> list[S]:
        """The members of one kind, in order of name. `alive`: only those that are alive."""
        members = self.read().members.values()
        return [m for m in members if isinstance(m, kind) and (m.alive or not alive)]

    def servers(self) -> dict[str, int]:
        """URL -> number of the policy version, of every vLLM server that accepts requests now."""
        return {
            server.url: server.version.version
            for agent in self.members(AgentState)
            for server in agent.servers
            if server.version is not None
        }

    def trajectory_server(self) -> str | None:
        """The trajectory server's URL, once it listens."""
        return next((m.url for m in self.members(TrajectoriesState) if m.url), None)


class RosterWatch:
    """Measures for how long the supervisor has not written the roster."""

    def __init__(self, reader: RosterReader, clock: Callable[[], float] = time.monotonic) -> None:
        self.reader, self._clock = reader, clock
        self._beat, self._changed = -1, clock()

    def silent_s(self) -> float:
        """Seconds since the roster's beat was last seen to change."""
        now, beat = self._clock(), self.reader.read().beat
        if beat != self._beat:
            self._beat, self._changed = beat, now
        return now - self._changed


# --- requests


def post_request(run: RunDir, request: Request) -> None:
    """Leave a request for the member that polls for it."""
    request.asked = time.time()
    write_struct(run.requests / f"{request.name}.json", request)


def pending_request(run: RunDir, kind: type[R]) -> R | None:
    """The request of that kind, if one was posted. Lists the directory, because NFS caches names
    that were missing. Raises Unreadable when the file is damaged."""
    name = f"{kind.name}.json"
    return read_struct(run.requests / name, kind) if name in os.listdir(run.requests) else None


def withdraw_request(run: RunDir, kind: type[Request]) -> None:
    """Remove a request once it was met."""
    (run.requests / f"{kind.name}.json").unlink(missing_ok=True)
