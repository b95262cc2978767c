"""How the members of a run find each other and are seen alive: small files on the shared filesystem.

A member has one file of its own, members/<name>.json: replaced when its state changes, and touched every few seconds to show that it
lives. Only the leader (the supervisor) looks at that directory; it publishes what it sees as roster.json, which everybody else reads.
So the cost per member is constant, whatever their number: both the leader's rounds and the members' looks at the roster become rarer as
there are more of them (with a thousand, seconds apart). In between, the leader notices by the directory's own time that some state has
changed, and by inode numbers, which a listing has, whose. Life is judged by changes of a file's time, on the reader's own clock: clocks
of nodes differ.

Requests go the other way: `ask` leaves requests/<what>.json, which the member concerned notices and answers in its state.
"""

import fcntl
import json
import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atropos_hpc.runtime.run_dir import RunDir, read_json, write_file, write_json

log = logging.getLogger(__name__)

BEAT_S = 7.0  # between a member's signs of life
DEAD_S = 30.0  # without one; also how long a node may stall on a busy filesystem
ROSTER_BEAT_S = 2.0  # the roster's own, at least that often
ROUND_S = 0.005  # per member, between the leader's rounds over all of them
READ_S = 0.003  # per member, between a reader's looks at the roster
FEW = 20  # members, for whom all this costs nothing: then nobody waits for anything
REPUBLISH = "republish"  # a request: a reader cannot use the newest policy version


class Member:
    """This process's place in the rendezvous. State is a flat dict of JSON values; `waiting` says what it waits for.

    The beat comes from a thread of its own, so it proves that the process lives, not that it gets on: progress is what
    `state`, `waiting` and `since` say.
    """

    def __init__(self, run: RunDir, kind: str, node: str, index: int = 0, **state: Any) -> None:
        self.name = f"{kind}-{node}-{index}"
        self.path = run.members / f"{self.name}.json"
        self._write = threading.Lock()
        self._stop = threading.Event()
        self._told = False  # does the file have the state?
        self.state: dict[str, Any] = {
            "name": self.name, "kind": kind, "node": node, "host": socket.gethostname(), "pid": os.getpid(),
            "started": time.time(), "state": "starting", "waiting": None, **state,
        }  # fmt: skip
        self.update()
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def update(self, **state: Any) -> None:
        """Change the state and write it at once. A full disk is logged, and tried again with the next beat."""
        with self._write:
            self.state.update(state)
            self._told = _tell(self.path, self.state)

    @contextmanager
    def waiting(self, what: str, whom: str) -> Iterator[None]:
        """Tell the others what this member waits for, from whom, since when."""
        self.update(waiting={"what": what, "whom": whom, "since": time.time()})
        try:
            yield
        finally:
            self.update(waiting=None)

    def leave(self, **state: Any) -> None:
        """Stop beating; the file stays, for those who read the story afterwards."""
        self._stop.set()
        self._thread.join()
        self.update(**{"state": "ended", "waiting": None, **state})

    def _keep_beating(self) -> None:
        while not self._stop.wait(jittered(BEAT_S)):
            try:
                if self._told:
                    os.utime(self.path)
                    continue
            except OSError:
                pass
            self.update()


@dataclass
class _Seen:
    """A member's file as the leader has last looked at it."""

    inode: int
    stamp: int  # its time, ns
    since: float  # when that was new, monotonic
    state: dict[str, Any]


@dataclass
class Leader:
    """The supervisor's side: looks at the members' files and publishes the roster."""

    run: RunDir
    beat: int = 0
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    _files: dict[str, _Seen] = field(default_factory=dict)
    _changed: int = -1  # the directory's time, ns
    _round: float = 0.0  # when the next one is due, monotonic
    _written: float = 0.0

    def look(self, at_once: bool = False) -> dict[str, dict[str, Any]]:
        """Read what has changed, judge who lives, write the roster if anything but that has (or its own beat is due).

        `at_once`: look at all, and write, whatever the crowd: nobody may look again.
        """
        now = time.monotonic()
        if at_once or now >= self._round:
            self._look_at_all(now)
            self._round = now + (
                jittered(ROUND_S * len(self._files)) if len(self._files) > FEW else 0.0
            )
        else:
            self._look_for_changes(now)
        members = {}
        for file in sorted(self._files):
            seen = self._files[file]
            if seen.state:
                alive = seen.state["state"] != "ended" and now - seen.since < DEAD_S
                members[seen.state["name"]] = {**seen.state, "alive": alive}
        changed = members != self.members
        self.members = members
        if (
            at_once
            or (changed and now - self._written > READ_S * self._crowd())
            or now - self._written > ROSTER_BEAT_S
        ):
            self.beat += 1
            self._written = now
            _tell(self.run.roster, {"beat": self.beat, "written": time.time(), "members": members})
        return members

    def _crowd(self) -> int:
        return len(self._files) if len(self._files) > FEW else 0

    def _look_at_all(self, now: float) -> None:
        """A round: every file's time, and the content of those that have changed or been touched."""
        found = {}
        for entry in self._list():
            known = self._files.get(entry.name)
            try:
                status = entry.stat()
            except OSError:
                continue
            if (
                known is not None
                and (known.inode, known.stamp) == (status.st_ino, status.st_mtime_ns)
                and known.state
            ):
                found[entry.name] = known
            else:
                seen = self._read(entry.name, now)
                if (
                    seen is None and known is not None
                ):  # damaged, and touched: its owner lives, and is taken to be as it was
                    seen = replace(known, inode=status.st_ino, stamp=status.st_mtime_ns, since=now)
                found[entry.name] = seen or _Seen(0, 0, now, {})
        self._files = found

    def _look_for_changes(self, now: float) -> None:
        """Between rounds: files that were replaced or are new. (An inode used twice in a row is noticed by the next round.)"""
        changed = self.run.members.stat().st_mtime_ns
        if changed == self._changed:
            return
        self._changed = changed
        for entry in self._list():
            known = self._files.get(entry.name)
            if (known is None or known.inode != entry.inode()) and (
                seen := self._read(entry.name, now)
            ):
                self._files[entry.name] = seen

    def _list(self) -> list["os.DirEntry[str]"]:
        with os.scandir(self.run.members) as entries:
            return [
                entry
                for entry in entries
                if entry.name.endswith(".json") and not entry.name.startswith(".")
            ]

    def _read(self, name: str, now: float) -> _Seen | None:
        """The file, or None while it cannot be read."""
        try:
            with (self.run.members / name).open("rb") as file:
                status = os.fstat(file.fileno())
                return _Seen(status.st_ino, status.st_mtime_ns, now, json.loads(file.read()))
        except (OSError, ValueError) as error:
            log.warning("member file %s: %s", name, error)
            return None

    def ended(self, *names: str) -> None:
        """Mark members whose processes are known to have ended, so that nobody waits DEAD_S for them."""
        for name in names:
            file = f"{name}.json"
            seen = self._read(file, time.monotonic()) or self._files.get(
                file
            )  # where it is damaged: as it was seen last
            if seen is not None and seen.state:
                _tell(self.run.members / file, {**seen.state, "state": "ended", "waiting": None})


def _tell(path: Path, state: dict[str, Any]) -> bool:
    """Write what only tells of this moment. A full disk is logged, and no reason to end; the next beat writes it again."""
    try:
        write_file(path, json.dumps(state, separators=(",", ":")).encode(), durable=False)
    except OSError as error:
        log.warning("cannot write %s: %s", path, error)
        return False
    return True


def jittered(seconds: float) -> float:
    """About as long, so that many who do the same do not do it at the same time."""
    return seconds * random.uniform(0.8, 1.2)


class Roster:
    """A reader of roster.json that parses it only when it has been replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._content: dict[str, Any] = {}
        self._next = 0.0  # when to look again, monotonic

    def read(self) -> dict[str, Any]:
        """The newest roster, {} before the first. An unreadable one is passed over: the last good one stays.

        In a crowd it is looked at now and then only.
        """
        now = time.monotonic()
        if now < self._next:
            return self._content
        try:
            with self.path.open(
                "rb"
            ) as file:  # opened, not just looked at: NFS then asks the server
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_ino)
                if stamp != self._stamp:
                    self._content = json.loads(file.read())
                    self._stamp = stamp
        except FileNotFoundError:
            self._content = {}
        except (OSError, ValueError) as error:
            log.warning("roster %s: %s; keeping the one known", self.path, error)
        if (crowd := len(self._content.get("members", ()))) > FEW:
            self._next = now + jittered(READ_S * crowd)
        return self._content

    def members(self, kind: str, alive: bool = True) -> list[dict[str, Any]]:
        """The members of one kind, in order of name."""
        members = self.read().get("members", {}).values()
        return [m for m in members if m["kind"] == kind and (m["alive"] or not alive)]

    def servers(self) -> dict[str, int]:
        """URL -> policy version, of every vLLM server that may be asked now."""
        return {
            s["url"]: s["version"]
            for agent in self.members("agent")
            for s in agent.get("servers", [])
            if s["version"] is not None
        }

    def trajectory_server(self) -> str | None:
        """The trajectory server's URL, once it listens."""
        return next((m["url"] for m in self.members("trajectories") if m.get("url")), None)


HOST = "ATROPOS_HPC_HOST"  # this node's address, as Slurm knows it; set by the supervisor for what it starts
_SIOCGIFADDR = 0x8915


def own_host(host: str | None) -> str:
    """The address that this process listens on and tells the others. `host` is cluster.host: an address, the name of a network
    interface of this node, or None: the address that Slurm has for this node, and on one machine 127.0.0.1.

    Raises OSError when the interface has no IPv4 address.
    """
    if host is None:
        return os.environ.get(HOST) or "127.0.0.1"
    if not Path("/sys/class/net", host).exists():
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", host.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def keep_to_interface(host: str | None) -> None:
    """Where cluster.host names a network interface, have torch's and vLLM's own connections use it, and listen on no other."""
    if host is not None and Path("/sys/class/net", host).exists():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", host)


def ask(run: RunDir, what: str, **details: Any) -> None:
    """Leave a request, such as "stop", for whom it concerns."""
    write_json(run.requests / f"{what}.json", {"asked": time.time(), **details})


def asked(run: RunDir, what: str) -> dict[str, Any] | None:
    """The request of that name, if somebody has left one. Lists the directory: NFS remembers missing names."""
    return (
        read_json(run.requests / f"{what}.json")
        if f"{what}.json" in os.listdir(run.requests)
        else None
    )


def withdraw(run: RunDir, what: str) -> None:
    """Take a request away, once it has been met."""
    (run.requests / f"{what}.json").unlink(missing_ok=True)


def wait_for(
    what: str,
    whom: str,
    look: Callable[[], Any],
    timeout_s: float,
    poll_s: float = 0.1,
    member: Member | None = None,
) -> Any:
    """Poll `look` until it gives something true, and return that.

    Raises TimeoutError after `timeout_s` seconds, saying what was awaited, from whom, for how long. With `member`, a wait of more
    than a second is shown in the roster.
    """
    start = time.monotonic()
    shown = False
    try:
        while not (found := look()):
            waited = time.monotonic() - start
            if waited > timeout_s:
                raise TimeoutError(f"waited {waited:.0f} s for {what} from {whom}, in vain")
            if member is not None and waited > 1 and not shown:
                shown = True
                member.update(waiting={"what": what, "whom": whom, "since": time.time() - waited})
            time.sleep(poll_s)
        return found
    finally:
        if shown and member is not None:
            member.update(waiting=None)
