"""The run's vLLM servers as one: which are there, which is asked next, and what each generation came from.

The roster says who may be asked; it is looked at ten times a second. A request goes to the server with the fewest outstanding. When that
one dies, hangs, or leaves the roster, the request moves to another; there is one deadline over all moves.
"""

import asyncio
import contextlib
import contextvars
import functools
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
CONNECT_S = 5.0  # a server that does not accept within this time is passed over
ROSTER_S = 0.1  # how often the roster is looked at; it is parsed only when it has changed
CONNECTIONS = 512  # to one server at once; further requests wait here instead of there, and don't use up file descriptors
ABORTED_S = 0.05  # pause before a request is sent again that a policy update has cut short
SUSPECT_S = 5.0  # for how long a server that failed is used only if there is no other


@dataclass(frozen=True)
class Generation:
    """One sampled sequence: its output tokens, the oldest and newest policy version that sampled one of them, and at what temperature."""

    tokens: tuple[int, ...]
    versions: tuple[int, int]
    temperature: float = 1.0


_recording: contextvars.ContextVar[list[Generation] | None] = contextvars.ContextVar(
    "recording", default=None
)


@contextlib.contextmanager
def record_generations() -> Iterator[list[Generation]]:
    """Collect every generation made in this block, and in the tasks that it starts: they inherit the context, and share the list."""
    seen: list[Generation] = []
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def recorded() -> list[Generation]:
    """What the block around the caller has generated so far."""
    return _recording.get() or []


def record(choices: list[dict[str, Any]], temperature: float) -> None:
    """Add the choices of one answer to the block around the caller, if there is one."""
    seen = _recording.get()
    if seen is None:
        return
    for choice in choices:
        versions = [
            policy_version(span["version"]).version for span in choice["weight_versions"] or ()
        ]
        if versions:
            seen.append(
                Generation(tuple(choice["token_ids"]), (min(versions), max(versions)), temperature)
            )


def policy_version(label: str) -> PolicyVersion:
    """Parse vLLM's label of a token. A server that was never given weights says "default"."""
    if label == "default":
        return PolicyVersion(version=0, attempt=0)
    return PolicyVersion.parse(label)


class Pool:
    """The live servers of a run, and how many requests are outstanding at each. Belongs to one event loop."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.outstanding: Counter[str] = Counter()
        self.generated = 0  # tokens, in all
        self._roster = RosterReader(run.roster)
        self._servers = self._roster.servers()  # URL -> version
        self._token = run.token()
        self._suspect_until: dict[str, float] = {}
        self._requests: defaultdict[str, set[asyncio.Task[Any]]] = defaultdict(set)
        self._ties = itertools.count()
        self._watcher: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def servers(self) -> list[str]:
        """The URLs that may be asked now."""
        return list(self._servers)

    def served_version(self) -> int | None:
        """The oldest policy version that a live server serves, or None while there is none."""
        return min(self._servers.values(), default=None)

    def trajectory_server(self) -> str | None:
        """The trajectory server's URL, once it listens. Looks at the roster itself, for callers that are waiting for a change."""
        return self._roster.trajectory_server()

    def watch(self) -> None:
        """Start following the roster, in the running event loop. `post` does so by itself."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            servers = await asyncio.to_thread(self._roster.servers)
            for gone in (
                self._servers.keys() - servers.keys()
            ):  # a lost node does not reset its connections: give up on it here
                for request in self._requests[gone]:
                    request.cancel()
            self._servers = servers
            await asyncio.sleep(ROSTER_S)

    def pick(self) -> str | None:
        """The server with the fewest outstanding requests, or None when the roster is empty. Ties go round."""
        now, turn = time.monotonic(), next(self._ties)
        trusted = [url for url in self._servers if self._suspect_until.get(url, 0) < now]
        candidates = trusted or self.servers
        at = turn % len(candidates) if candidates else 0
        return min(
            candidates[at:] + candidates[:at], key=lambda url: self.outstanding[url], default=None
        )

    async def post(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """POST to /inference/v1/generate on some live server, moving on until one answers.

        Raises TimeoutError after timeout_s, naming the last failure, and ValueError when the request itself is refused.
        """
        self.watch()
        deadline, failure, moves = (
            time.monotonic() + timeout_s,
            f"no server in {self.run.roster}",
            0,
        )
        while (left := deadline - time.monotonic()) > 0:
            server = self.pick()
            if server is None:
                await asyncio.sleep(min(left, ROSTER_S / 4))
                continue
            request = asyncio.create_task(self._post_to(server, body, left))
            self.outstanding[server] += 1
            self._requests[server].add(request)
            try:
                await asyncio.wait(
                    [request]
                )  # raises only when it is we who are cancelled, not the request
                if request.cancelled():
                    failure = f"{server} left the roster"
                else:
                    status, answer = request.result()
                    if status == 200:
                        if not any(
                            choice.get("finish_reason") == "abort" for choice in answer["choices"]
                        ):
                            return answer
                        await asyncio.sleep(ABORTED_S)
                        continue  # cut short by a policy update: not this server's fault, but no answer to train on either
                    if status < 500 and status not in (401, 408, 429):
                        raise ValueError(
                            f"{server}{GENERATE} refused the request with {status}: {str(answer)[:500]}"
                        )
                    failure = f"{server} answered {status}: {str(answer)[:200]}"
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                failure = f"{server}: {error!r}"
            finally:
                request.cancel()
                self.outstanding[server] -= 1
                self._requests[server].discard(request)
            self._suspect_until[server] = time.monotonic() + SUSPECT_S
            moves += 1
            log.warning("generation moves to another server (%d): %s", moves, failure)
            await asyncio.sleep(min(0.05 * 2**moves, 2.0))
        raise TimeoutError(
            f"no vLLM server answered {GENERATE} within {timeout_s:.0f} s; last: {failure}"
        )

    async def _post_to(self, server: str, body: dict[str, Any], left: float) -> tuple[int, Any]:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS)
            )
        timeout = aiohttp.ClientTimeout(total=left, sock_connect=CONNECT_S)
        headers = {"Authorization": f"Bearer {self._token}"}
        async with self._session.post(
            server + GENERATE, json=body, headers=headers, timeout=timeout
        ) as response:
            return response.status, await (
                response.json() if response.status == 200 else response.text()
            )

    async def close(self) -> None:
        if self._watcher:
            self._watcher.cancel()
        if self._session:
            await self._session.close()


@functools.cache
def pool_of(run_dir: Path) -> Pool:
    """This process's pool over the run at `run_dir`."""
    return Pool(RunDir(run_dir))
