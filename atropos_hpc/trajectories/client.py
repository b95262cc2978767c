"""The learner's side: groups in, acknowledgements out, over the trajectory server's binary leases.

It lives in a thread of the learner, so it blocks, but never without a deadline: a server that is away (it is restarted after a
crash, maybe on another port) is waited for, `patience_s` at most.
"""

import http.client
import json
import logging
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from atropos_hpc.contracts.group import (
    ANY_LENGTH,
    ANY_VOCABULARY,
    Group,
    Refused,
    from_python,
    read_group,
)
from atropos_hpc.trajectories.wal_record import scan

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for one answer, beyond what it was asked to wait
CONNECT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
POLL_S = 0.5  # between two looks at Atropos' own server, which does not wait for us
PATIENT_WAIT_S = 30.0  # what the server is asked to wait at once; so a dead connection is noticed

FindUrl = Callable[[], "str | None"]


class ServerRefused(RuntimeError):
    """The trajectory server answered, and said no. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """One HTTP connection that is opened anew, to wherever the server then is, whenever it breaks."""

    def __init__(self, find_url: FindUrl, token: str, patience_s: float) -> None:
        self._find_url, self._patience_s = find_url, patience_s
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None
        self._url: str | None = None

    def call(
        self, method: str, path: str, body: Any = None, wait_s: float = 0.0
    ) -> tuple[int, bytearray]:
        """(status, body), of an answer below 500. Repeats the request until there is one, so it must bear that.

        Raises TimeoutError after `patience_s` seconds without one, ServerRefused for 4xx.
        """
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                status, answer = self._once(method, path, body, wait_s)
                if status < 400:
                    return status, answer
                why = _detail(answer)
                if status < 500:
                    raise ServerRefused(
                        status,
                        f"trajectory server {self._url} refused {method} {path} ({status}): {why}",
                    )
            except (OSError, http.client.HTTPException) as error:
                self.close()
                why = f"{type(error).__name__}: {error}"
            waited = time.monotonic() - began - wait_s
            if waited > self._patience_s:
                where = self._url or "(none listens)"
                raise TimeoutError(
                    f"trajectory server {where}: waited {max(0, waited):.0f} s for an answer to {method} {path}; last: {why}"
                )
            log.warning(
                "waiting for the trajectory server %s, %s %s, for %.0f s: %s",
                self._url,
                method,
                path,
                max(0, waited),
                why,
            )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: Any, wait_s: float) -> tuple[int, bytearray]:
        if self._connection is None:
            self._url = self._find_url()
            if self._url is None:
                raise ConnectionError("no trajectory server is in the roster")
            parts = urllib.parse.urlsplit(self._url)
            self._connection = http.client.HTTPConnection(
                parts.hostname or "", parts.port or 80, timeout=CONNECT_S
            )
            self._connection.connect()
        self._connection.sock.settimeout(wait_s + TIMEOUT_S)
        self._connection.request(
            method, path, None if body is None else json.dumps(body), self._headers
        )
        response = self._connection.getresponse()
        return response.status, _read(response)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _read(response: http.client.HTTPResponse) -> bytearray:
    """The whole body, into memory that arrays may be written in."""
    if response.length is None:
        return bytearray(response.read())
    body = bytearray(response.length)
    view, at = memoryview(body), 0
    while at < len(body):
        count = response.readinto(view[at:])
        if count == 0:
            raise http.client.IncompleteRead(bytes(view[:at]), len(body) - at)
        at += count
    response.read()  # lets the connection be used again
    return body


def _detail(answer: bytearray) -> str:
    try:
        return str(json.loads(answer)["detail"])[:500]
    except (ValueError, KeyError, TypeError):
        return bytes(answer[:200]).decode(errors="replace")


class TrajectoryClient:
    """The run's own trajectory server, as the learner sees it. Not to be shared between threads.

    `find_url` is asked anew whenever a connection is opened; None from it means that no server listens yet. `patience_s`: how long
    a server may be away.
    """

    def __init__(self, find_url: FindUrl, token: str, patience_s: float) -> None:
        self._connection = Connection(find_url, token, patience_s)
        self._registered: dict[str, Any] = {"vocab_size": 0, "max_token_len": 0}

    def register(
        self,
        batch_size: int,
        max_token_len: int,
        starting_step: int,
        num_steps: int,
        vocab_size: int = 0,
        wandb_group: str = "",
        wandb_project: str = "",
        checkpoint_dir: str = "",
        save_checkpoint_interval: int = 0,
    ) -> None:
        """Say what a batch is, and from which policy version training goes on. May be said again; the queue stays.

        0 as `max_token_len` or `vocab_size`: no limit.
        """
        self._registered = {
            "batch_size": batch_size,
            "max_token_len": max_token_len,
            "starting_step": starting_step,
            "num_steps": num_steps,
            "vocab_size": vocab_size,
            "wandb_group": wandb_group,
            "wandb_project": wandb_project,
            "checkpoint_dir": checkpoint_dir,
            "save_checkpoint_interval": save_checkpoint_interval,
        }
        self._connection.call("POST", "/register", self._registered)

    def lease(
        self, batch: int, rank: int, world: int, oldest: int, version: int, wait_s: float
    ) -> list[Group] | None:
        """This rank's groups of the batch, the same however often it is asked; None: it is not there after `wait_s` seconds.

        `oldest`: the oldest policy version that the batch may hold, if it is formed now. `version`: the learner's own.
        Raises ServerRefused (409: not the next batch, or not registered; 410: acknowledged already) and TimeoutError.
        """
        deadline = time.monotonic() + wait_s
        while True:
            wait = min(max(0.0, deadline - time.monotonic()), PATIENT_WAIT_S)
            query = urllib.parse.urlencode(
                {
                    "batch": batch,
                    "rank": rank,
                    "world": world,
                    "oldest": max(0, oldest),
                    "version": version,
                    "wait": f"{wait:.3f}",
                }
            )
            status, body = self._connection.call("GET", f"/lease?{query}", wait_s=wait)
            if status == 200:
                return groups_of(body)
            if time.monotonic() >= deadline:
                return None

    def ack(self, batch: int) -> None:
        """All batches up to this one are in weights that survive; nobody will go back to before them."""
        self._connection.call("POST", f"/ack?batch={batch}")

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self._connection.call("GET", "/status")[1])
        return status

    def close(self) -> None:
        self._connection.close()


def groups_of(body: bytearray) -> list[Group]:
    """The groups of a lease, as views into `body`. Raises ValueError if it is not whole."""
    groups, end = [], 0
    for start, after, header in scan(body):
        groups.append(read_group(body, start, header))
        end = after
    if end != len(body):
        raise ValueError(f"a lease is damaged at byte {end} of {len(body)}")
    return groups


class UpstreamClient(TrajectoryClient):
    """The same over Atropos' own server, which keeps everything in memory and gives a batch once.

    What `TrajectoryClient` promises beyond that does not hold here: a batch that is lost on the way, or with a crash of either
    side, is gone. It knows one trainer, whose first /register counts.
    """

    def __init__(self, find_url: FindUrl, token: str, patience_s: float) -> None:
        super().__init__(find_url, token, patience_s)
        self._held: tuple[int, list[Group]] | None = (
            None  # the last batch, in case it is asked for again
        )
        self._next_gid = 0

    def lease(
        self, batch: int, rank: int, world: int, oldest: int, version: int, wait_s: float
    ) -> list[Group] | None:
        """The next batch; None: not there after `wait_s` seconds. Groups that are stale or malformed are left out, and logged.

        Raises ValueError unless `world` is 1: that server gives a batch to one asker only.
        """
        if world != 1:
            raise ValueError(
                f"trajectories.server=atropos serves one trainer rank, not {world}: choose trajectories.server=durable"
            )
        if self._held is not None and self._held[0] == batch:
            return self._held[1]
        deadline = time.monotonic() + wait_s
        while True:
            served = json.loads(self._connection.call("GET", "/batch")[1]).get("batch")
            groups = [
                group for value in served or [] if (group := self._group(value, oldest)) is not None
            ]
            if groups:
                self._held = (batch, groups)
                return groups
            if time.monotonic() >= deadline:
                return None
            if not served:
                time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _group(self, value: dict[str, Any], oldest: int) -> Group | None:
        vocabulary = self._registered["vocab_size"] or ANY_VOCABULARY
        try:
            record = from_python(value, vocabulary, self._registered["max_token_len"] or ANY_LENGTH)
        except Refused as error:
            log.error(
                "left out a malformed group of environment %s: %s", value.get("env_id"), error
            )
            return None
        if 0 <= record.oldest < oldest:
            log.warning(
                "left out a group of policy version %d, older than %d", record.oldest, oldest
            )
            return None
        record.gid = self._next_gid
        self._next_gid += 1
        return read_group(bytearray(record.header(0) + record.payload))

    def ack(self, batch: int) -> None:
        """Nothing: that server forgets a batch when it gives it."""
