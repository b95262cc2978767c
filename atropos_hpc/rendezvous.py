"""How the members of a run find each other and are seen alive: small files on the shared filesystem.

A member writes one file of its own, members/<name>.json, and raises its beat every few seconds. Only the leader (the
supervisor) lists that directory; it publishes what it sees as roster.json, which everybody else reads. So the cost per member
is constant, whatever their number. Life is judged by beats that change, on the reader's own clock: clocks of nodes differ.

Requests go the other way: `ask` leaves requests/<what>.json, which the member concerned notices and answers in its state.
"""

import fcntl
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atropos_hpc.run_dir import RunDir, read_json, write_json

log = logging.getLogger(__name__)

BEAT_S = 2.0
REPUBLISH = "republish"  # a request: a reader cannot use the newest policy version
DEAD_S = 30.0  # without a new beat; also how long a node may stall on a busy filesystem


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
        self.state: dict[str, Any] = {
            "name": self.name, "kind": kind, "node": node, "host": socket.gethostname(), "pid": os.getpid(),
            "started": time.time(), "state": "starting", "waiting": None, "beat": 0, **state,
        }  # fmt: skip
        self.update()
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def update(self, **state: Any) -> None:
        """Change the state and write it at once. A full disk is logged, and tried again with the next beat."""
        with self._write:
            self.state.update(state)
            self.state["beat"] += 1
            _tell(self.path, self.state)

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
        while not self._stop.wait(BEAT_S):
            self.update()


@dataclass
class Leader:
    """The supervisor's side: looks at the members' files and publishes the roster."""

    run: RunDir
    beat: int = 0
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)  # name -> (beat, when it changed, monotonic)
    _written: float = 0.0

    def look(self) -> dict[str, dict[str, Any]]:
        """Read the members, judge who lives, write the roster if anything but beats changed (or a beat is due)."""
        now = time.monotonic()
        members: dict[str, dict[str, Any]] = {}
        for name in sorted(os.listdir(self.run.members)):
            if name.startswith(".") or not name.endswith(".json"):
                continue
            try:
                state = read_json(self.run.members / name)
            except (OSError, ValueError) as error:
                log.warning("member file %s: %s", name, error)
                continue
            if not state:
                continue
            beat, since = self._seen.get(state["name"], (-1, now))
            if (state["beat"], state["pid"]) != (beat, self.members.get(state["name"], state)["pid"]):
                since = now
            self._seen[state["name"]] = (state["beat"], since)
            state["alive"] = state["state"] != "ended" and now - since < DEAD_S
            members[state["name"]] = state
        changed = _without_beats(members) != _without_beats(self.members)
        self.members = members
        if changed or now - self._written > BEAT_S:
            self.beat += 1
            self._written = now
            _tell(self.run.roster, {"beat": self.beat, "written": time.time(), "members": members})
        return members

    def ended(self, *names: str) -> None:
        """Mark members whose processes are known to have ended, so that nobody waits DEAD_S for them."""
        for name in names:
            state = read_json(self.run.members / f"{name}.json")
            if state:
                _tell(self.run.members / f"{name}.json", {**state, "state": "ended", "waiting": None})


def _tell(path: Path, state: dict[str, Any]) -> None:
    """Write what only tells of this moment. A full disk is logged, and no reason to end; the next beat writes it again."""
    try:
        write_json(path, state, durable=False)
    except OSError as error:
        log.warning("cannot write %s: %s", path, error)


def _without_beats(members: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in state.items() if k != "beat"} for name, state in members.items()}


class Roster:
    """A reader of roster.json that parses it only when it has been replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._content: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """The newest roster, {} before the first. An unreadable one is passed over: the last good one stays."""
        try:
            with self.path.open("rb") as file:  # opened, not just looked at: NFS then asks the server
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_ino)
                if stamp != self._stamp:
                    self._content = json.loads(file.read())
                    self._stamp = stamp
        except FileNotFoundError:
            self._content = {}
        except (OSError, ValueError) as error:
            log.warning("roster %s: %s; keeping the one known", self.path, error)
        return self._content

    def members(self, kind: str, alive: bool = True) -> list[dict[str, Any]]:
        """The members of one kind, in order of name."""
        members = self.read().get("members", {}).values()
        return [m for m in members if m["kind"] == kind and (m["alive"] or not alive)]

    def servers(self) -> dict[str, int]:
        """URL -> policy version, of every vLLM server that may be asked now."""
        return {s["url"]: s["version"] for agent in self.members("agent") for s in agent.get("servers", []) if s["version"] is not None}

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


def ask(run: RunDir, what: str, **details: Any) -> None:
    """Leave a request, such as "stop", for whom it concerns."""
    write_json(run.requests / f"{what}.json", {"asked": time.time(), **details})


def asked(run: RunDir, what: str) -> dict[str, Any] | None:
    """The request of that name, if somebody has left one. Lists the directory: NFS remembers missing names."""
    return read_json(run.requests / f"{what}.json") if f"{what}.json" in os.listdir(run.requests) else None


def withdraw(run: RunDir, what: str) -> None:
    """Take a request away, once it has been met."""
    (run.requests / f"{what}.json").unlink(missing_ok=True)


def wait_for(what: str, whom: str, look: Callable[[], Any], timeout_s: float, poll_s: float = 0.1, member: Member | None = None) -> Any:
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
