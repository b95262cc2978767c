"""The learner's client of the trajectory server: leases in, acknowledgements out.

It runs in a thread of the learner, so it blocks, but never without a deadline. A server that does
not answer is retried for at most `patience_s` seconds: after a crash it is restarted, perhaps on
another port.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from atropos_hpc.contracts.group import UNLIMITED, Group, Limits, read_group
from atropos_hpc.contracts.messages import BatchAnswer, ErrorBody, Registration, ServerStatus
from atropos_hpc.contracts.scored_group import RequestError
from atropos_hpc.contracts.wal_record import scan
from atropos_hpc.runtime.http import Answer, HttpClient, Request
from atropos_hpc.trajectories.decode import decode_json

log = logging.getLogger(__name__)

POLL_S = 0.5  # between two requests to Atropos' own server, which does not wait for groups
LEASE_WAIT_S = 30.0  # that the server is asked to wait at once, so a dead connection is noticed

FindUrl = Callable[[], "str | None"]


class ServerRefused(RuntimeError):
    """The trajectory server answered with an error. `status` is the HTTP status, 4xx."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TrajectoryClient:
    """The run's own trajectory server, as the learner sees it. For one thread at a time.

    `find_url` is called before each attempt; None means that no server listens yet.
    """

    def __init__(self, find_url: FindUrl, token: str, patience_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        # A client lives as long as its process. aiohttp would log its open connections at exit.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._http = HttpClient(find_url, token, patience_s)
        self._registration = Registration(batch_size=1, max_token_len=0)

    def call(
        self, method: str, path: str, body: bytes | None = None, wait_s: float = 0.0
    ) -> Answer:
        """Send a request and wait for its answer. Raises ServerRefused for 4xx, TimeoutError."""
        sending = self._http.send(Request(method, path, body, wait_s=wait_s))
        answer = self._loop.run_until_complete(sending)
        if answer.status >= 400:
            what = f"refused {method} {path} with {answer.status}: {_detail(answer.body)}"
            raise ServerRefused(answer.status, f"trajectory server {answer.url} {what}")
        return answer

    def register(self, registration: Registration) -> None:
        """Register this trainer, again after a restart. The server keeps its queue."""
        self._registration = registration
        self.call("POST", "/register", msgspec.json.encode(registration))

    def lease(
        self, batch: int, rank: int, world: int, oldest: int, version: int, wait_s: float
    ) -> list[Group] | None:
        """Return this rank's groups of the batch, None if it is not there after `wait_s` seconds.

        The answer is the same until the batch is acknowledged. `oldest`: the oldest policy version
        that the batch may hold, if it is formed now. `version`: the learner's own. Raises
        ServerRefused (409: not the next batch, or not registered; 410: acknowledged already) and
        TimeoutError.
        """
        deadline = time.monotonic() + wait_s
        while True:
            wait = min(max(0.0, deadline - time.monotonic()), LEASE_WAIT_S)
            query = f"batch={batch}&rank={rank}&world={world}&oldest={max(0, oldest)}"
            path = f"/lease?{query}&version={version}&wait={wait:.3f}"
            answer = self.call("GET", path, wait_s=wait)
            if answer.status == 200:
                return groups_of(answer.body)
            if time.monotonic() >= deadline:
                return None

    def ack(self, batch: int) -> None:
        """Acknowledge all batches up to this one: they are part of a durable checkpoint."""
        self.call("POST", f"/ack?batch={batch}")

    def status(self) -> ServerStatus:
        """Return how much is where."""
        return msgspec.json.decode(self.call("GET", "/status").body, type=ServerStatus)

    def close(self) -> None:
        self._loop.run_until_complete(self._http.close())
        self._loop.close()


def _detail(body: bytearray) -> str:
    try:
        return msgspec.json.decode(body, type=ErrorBody).detail[:500]
    except msgspec.DecodeError:
        return bytes(body[:200]).decode(errors="replace")


def groups_of(body: bytearray) -> list[Group]:
    """Map the groups of a lease onto `body`. Raises ValueError if it is damaged."""
    groups, end = [], 0
    for start, after, header in scan(body):
        groups.append(read_group(body, start, header))
        end = after
    if end != len(body):
        raise ValueError(f"a lease is damaged at byte {end} of {len(body)}")
    return groups


class UpstreamClient(TrajectoryClient):
    """The same over Atropos' own server, which keeps its state in memory and serves a batch once.

    A batch that is lost on the way, or with a crash of either side, is gone. The server knows one
    trainer, whose first /register counts.
    """

    def __init__(self, find_url: FindUrl, token: str, patience_s: float) -> None:
        super().__init__(find_url, token, patience_s)
        self._held: tuple[int, list[Group]] | None = None  # the last batch, for a repeated lease
        self._next_gid = 0

    def lease(
        self, batch: int, rank: int, world: int, oldest: int, version: int, wait_s: float
    ) -> list[Group] | None:
        """Return the next batch, None if it is not there after `wait_s` seconds.

        Groups that are stale or malformed are logged and left out. Raises ValueError unless `world`
        is 1, because the server serves each batch once.
        """
        if world != 1:
            raise ValueError(
                f"trajectories.server=atropos serves one trainer rank, not {world}: "
                "choose trajectories.server=durable"
            )
        if self._held is not None and self._held[0] == batch:
            return self._held[1]
        deadline = time.monotonic() + wait_s
        while True:
            body = self.call("GET", "/batch").body
            served = msgspec.json.decode(body, type=BatchAnswer).batch or []
            found = (self._group(bytes(value), oldest) for value in served)
            groups = [group for group in found if group is not None]
            if groups:
                self._held = (batch, groups)
                return groups
            if time.monotonic() >= deadline:
                return None
            if not served:
                time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _group(self, body: bytes, oldest: int) -> Group | None:
        known = self._registration
        limits = Limits(known.vocab_size or UNLIMITED, known.max_token_len or UNLIMITED)
        try:
            (record,) = decode_json(body, False, limits)
        except RequestError as error:
            log.error("leaving out a malformed group: %s", error)
            return None
        if 0 <= record.oldest < oldest:
            log.warning("leaving out a group of version %d, older than %d", record.oldest, oldest)
            return None
        record.gid = self._next_gid
        self._next_gid += 1
        return read_group(bytearray(record.to_bytes()))

    def ack(self, batch: int) -> None:
        """Do nothing: the server forgets a batch when it serves it."""

    def status(self) -> ServerStatus:
        """Return the step and the queue of Atropos' server; it counts nothing else."""
        answer = msgspec.json.decode(self.call("GET", "/status").body, type=dict[str, int])
        step, queued = answer["current_step"], answer["queue_size"]
        return ServerStatus(step, queued, queued, 0, step, 0, 0, 0, 0, 0)
