"""The run's vLLM servers as one: load balancing, failover, and the decoding of answers.

The roster says which servers may be used; it is checked ten times a second. A request goes to the
server with the fewest outstanding requests. When that one dies, hangs, or leaves the roster, the
request moves to another; one deadline covers all moves.
"""

import asyncio
import functools
import itertools
import logging
import time
from collections import Counter, defaultdict
from pathlib import Path

import aiohttp
import msgspec

from atropos_hpc.contracts.messages import GenerateAnswer, GenerateRequest
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
CONNECT_S = 5.0  # a server that does not accept a connection within this time is skipped
ROSTER_S = 0.1  # between two checks of the roster, which is parsed only when it has changed
# Connections to one server; further requests wait here, and use no file descriptors there.
CONNECTIONS = 512
ABORT_PAUSE_S = 0.05  # before a request that a weight update aborted is sent again
SUSPECT_S = 5.0  # for how long a server that failed is used only if there is no other
LONGEST_PAUSE_S = 2.0  # between two moves
RETRIED = {401, 408, 429}  # below 500, but another server or a later attempt may succeed

_decoder = msgspec.json.Decoder(GenerateAnswer)
_encoder = msgspec.json.Encoder(enc_hook=lambda value: value.item())  # numpy's scalars


def decode_answer(body: bytes) -> GenerateAnswer:
    """Decode vLLM's answer. Raises msgspec.DecodeError."""
    return _decoder.decode(body)


class Pool:
    """The live vLLM servers of a run, and their outstanding requests. Belongs to one event loop."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.outstanding: Counter[str] = Counter()
        self.generated = 0  # tokens, in total
        self._roster = RosterReader(run.roster)
        self._servers = self._roster.servers()  # URL -> version
        self._headers = {
            "Authorization": f"Bearer {run.token()}",
            "Content-Type": "application/json",
        }
        self._suspect_until: dict[str, float] = {}
        self._requests: defaultdict[str, set[asyncio.Task[tuple[int, bytes]]]] = defaultdict(set)
        self._turn = itertools.count()
        self._watcher: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def servers(self) -> list[str]:
        """Return the URLs of the servers that may be used now."""
        return list(self._servers)

    def served_version(self) -> int | None:
        """Return the oldest policy version that a live server serves; None if there is none."""
        return min(self._servers.values(), default=None)

    def trajectory_server(self) -> str | None:
        """Return the trajectory server's URL once it listens. Reads the roster."""
        return self._roster.trajectory_server()

    def watch(self) -> None:
        """Start following the roster in the running event loop. `post` does so by itself."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            servers = await asyncio.to_thread(self._roster.servers)
            # A lost node does not reset its connections: give its requests up here.
            for gone in self._servers.keys() - servers.keys():
                for request in self._requests[gone]:
                    request.cancel()
            self._servers = servers
            await asyncio.sleep(ROSTER_S)

    def pick(self) -> str | None:
        """Return the server with the fewest outstanding requests, None if there is no server.

        Servers with equally many take turns.
        """
        now, turn = time.monotonic(), next(self._turn)
        trusted = [url for url in self._servers if self._suspect_until.get(url, 0) < now]
        candidates = trusted or self.servers
        at = turn % len(candidates) if candidates else 0
        order = candidates[at:] + candidates[:at]
        return min(order, key=lambda url: self.outstanding[url], default=None)

    async def post(self, request: GenerateRequest, timeout_s: float) -> GenerateAnswer:
        """Generate on some live server, moving on until one answers.

        Raises TimeoutError after `timeout_s` with the last failure, and ValueError when a server
        rejects the request itself.
        """
        self.watch()
        body = _encoder.encode(request)
        deadline, moves = time.monotonic() + timeout_s, 0
        failure = f"no server in {self.run.roster}"
        while (left := deadline - time.monotonic()) > 0:
            server = self.pick()
            if server is None:
                await asyncio.sleep(min(left, ROSTER_S / 4))
                continue
            answer = await self._try(server, body, left)
            if isinstance(answer, GenerateAnswer):
                if all(choice.finish_reason != "abort" for choice in answer.choices):
                    return answer
                # A weight update cut it short: the server is fine, but the answer is not usable.
                await asyncio.sleep(ABORT_PAUSE_S)
                continue
            failure, moves = answer, moves + 1
            self._suspect_until[server] = time.monotonic() + SUSPECT_S
            log.warning("moving a generation to another server (move %d): %s", moves, failure)
            await asyncio.sleep(min(0.05 * 2**moves, LONGEST_PAUSE_S))
        raise TimeoutError(
            f"no vLLM server answered {GENERATE} within {timeout_s:.0f} s; last: {failure}"
        )

    async def _try(self, server: str, body: bytes, left_s: float) -> GenerateAnswer | str:
        """Return the answer of this server, or why there is none. Raises ValueError as `post`."""
        request = asyncio.create_task(self._post_to(server, body, left_s))
        self.outstanding[server] += 1
        self._requests[server].add(request)
        try:
            await asyncio.wait([request])  # raises only if the caller is cancelled
            if request.cancelled():
                return f"{server} left the roster"
            status, answer = request.result()
            if status == 200:
                return decode_answer(answer)
            text = answer[:500].decode(errors="replace")
            if status < 500 and status not in RETRIED:
                raise ValueError(f"{server}{GENERATE} rejected the request with {status}: {text}")
            return f"{server} answered {status}: {text}"
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            return f"{server}: {error!r}"
        finally:
            request.cancel()
            self.outstanding[server] -= 1
            self._requests[server].discard(request)

    async def _post_to(self, server: str, body: bytes, left_s: float) -> tuple[int, bytes]:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=left_s, sock_connect=CONNECT_S)
        async with self._session.post(server + GENERATE, data=body, timeout=timeout) as response:
            return response.status, await response.read()

    async def close(self) -> None:
        """Stop following the roster and close the connections."""
        if self._watcher:
            self._watcher.cancel()
        if self._session:
            await self._session.close()


@functools.cache
def pool_of(run_dir: Path) -> Pool:
    """Return this process's pool of the run at `run_dir`."""
    return Pool(RunDir(run_dir))
