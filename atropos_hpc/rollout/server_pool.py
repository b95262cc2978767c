"""The run's vLLM servers as one: load balancing, failover, and the decoding of answers.

The roster says which servers may be used; it is checked ten times a second. A request goes to the
server that holds its prefix, as the turns of a conversation do, or to the one with the fewest
outstanding samples. When that one dies, hangs, leaves the roster, or aborts the request for a
weight update, the samples continue on another from the tokens they have (`partial_answer`); one
deadline covers all moves.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from atropos_hpc.contracts.messages import (
    GenerateAnswer,
    GenerateRequest,
    Generation,
    PromptLogprobs,
    StreamChunk,
)
from atropos_hpc.rollout.partial_answer import Decode, Sample, answer_of
from atropos_hpc.rollout.prefix_homes import PrefixHomes
from atropos_hpc.rollout.saved_answers import SavedAnswers
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.token_check import REFUSING

log = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
CONNECT_S = 5.0  # a server that does not accept a connection within this time is skipped
ROSTER_S = 0.05  # between two checks of the roster, which is parsed only when it has changed
# Connections to one server; further requests wait here, and use no file descriptors there.
CONNECTIONS = 512
ABORT_PAUSE_S = 0.05  # before a request that a weight update aborted is sent again
SUSPECT_S = 5.0  # for how long a server that failed is used only if there is no other
LONGEST_PAUSE_S = 2.0  # between two moves
# A server that holds the prefix is overloaded from this many outstanding samples: factor times the
# fewest that a server has, plus slack.
HOME_FACTOR, HOME_SLACK = 1.5, 16
STREAM, EVENT_END = "text/event-stream", b"\n\n"
RETRIED = {*REFUSING, 408, 429}  # below 500, but another server or a later attempt may succeed
MOST_500 = 3  # answers of 500 to one request, after which it is the request's own fault
REFUSAL_S = 10.0  # a dead server's port may be another run's until the roster drops it

_decoder = msgspec.json.Decoder(GenerateAnswer)
_chunk_decoder = msgspec.json.Decoder(StreamChunk)
_encoder = msgspec.json.Encoder(enc_hook=lambda value: value.item())  # numpy's scalars


def decode_answer(body: bytes) -> GenerateAnswer:
    """Decode vLLM's answer. Raises msgspec.DecodeError."""
    return _decoder.decode(body)


class TokenRefused(Exception):
    """Every vLLM server refuses the run's token."""


@dataclass
class _Call:
    """One call of `Pool.post`."""

    deadline: float  # monotonic
    failure: str  # the last
    prompt_logprobs: PromptLogprobs | None = None


@dataclass
class _Attempt:
    """A request to one server for these samples, in the order of the answer's indices."""

    call: _Call
    request: GenerateRequest
    samples: list[Sample]

    def add(self, choices: list[Generation]) -> int:
        """Add what the server sent, and return how many tokens it was."""
        for choice in choices:
            self.samples[choice.index].add(choice)
        return sum(len(choice.token_ids) for choice in choices)


async def _all(parts: Sequence[Coroutine[None, None, None]]) -> None:
    """Run the parts at the same time; when one fails, cancel the others."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class Pool:
    """The live vLLM servers of a run, and their outstanding requests. Belongs to one event loop."""

    def __init__(self, run: RunDir, refusal_s: float = REFUSAL_S) -> None:
        self.run, self._refusal_s = run, refusal_s
        self.outstanding: Counter[str] = Counter()
        self.homes = PrefixHomes()
        self.saved: SavedAnswers | None = None
        self.generated = 0  # tokens that have arrived
        # Tokens that interrupted samples had: continued from, and generated again.
        self.kept = self.dropped = 0
        self._roster = RosterReader(run.roster)
        self._servers = self._roster.servers()  # URL -> version
        self.changed = asyncio.Event()  # set when servers, versions or rollouts change
        self._headers = {
            "Authorization": f"Bearer {run.token()}",
            "Content-Type": "application/json",
        }
        self._suspect_until: dict[str, float] = {}
        self._refused_since: dict[str, float] = {}  # monotonic
        self._requests: defaultdict[str, set[asyncio.Task[str | None]]] = defaultdict(set)
        self._turn = itertools.count()
        self._watcher: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    def save_answers(self) -> SavedAnswers:
        """Save the answers of rollouts under way at a stop, and continue those saved before."""
        self.saved = SavedAnswers(self.run, self.run.config().staleness.max)
        return self.saved

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
            if servers != self._servers:
                self._servers = servers
                self.changed.set()
            await asyncio.sleep(ROSTER_S)

    async def await_change(self, timeout_s: float) -> None:
        """Wait until `changed` is set, at most so long, and clear it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()
        self.changed.clear()

    def pick(self, home: str | None = None) -> str | None:
        """Return the server with the fewest outstanding samples, None if there is no server.

        Servers with equally many take turns. `home`, which holds the prompt's prefix, goes first,
        unless it has failed recently or is overloaded compared with the others.
        """
        now, turn = time.monotonic(), next(self._turn)
        trusted = [url for url in self._servers if self._suspect_until.get(url, 0) < now]
        candidates = trusted or self.servers
        at = turn % len(candidates) if candidates else 0
        order = candidates[at:] + candidates[:at]
        least = min(order, key=lambda url: self.outstanding[url], default=None)
        if least is not None and home in candidates:
            limit = HOME_FACTOR * self.outstanding[least] + HOME_SLACK
            return home if self.outstanding[home] < limit else least
        return least

    async def post(
        self, request: GenerateRequest, timeout_s: float, decode: Decode | None = None
    ) -> GenerateAnswer:
        """Generate on some live server, moving on until all samples are complete.

        Samples continue on the next server from the tokens that they have. `decode` is needed to
        continue those of requests with stop strings.

        Raises TimeoutError after `timeout_s` with the last failure, ValueError when a server
        rejects the request itself, and TokenRefused.
        """
        self.watch()
        samples = [Sample(request, i, decode) for i in range(request.sampling_params.n)]
        call = _Call(time.monotonic() + timeout_s, f"no server in {self.run.roster}")
        if self.saved is not None and request.sampling_params.prompt_logprobs is None:
            self.saved.restore(request, samples, self.served_version())
            self.saved.note(request, samples)
        try:
            await self._complete_rest(call, request, samples)
        except TimeoutError:
            raise TimeoutError(
                f"no vLLM server answered {GENERATE} within {timeout_s:.0f} s; last: {call.failure}"
            ) from None
        finally:
            self.kept += sum(sample.kept for sample in samples)
            self.dropped += sum(sample.dropped for sample in samples)
        answer = answer_of(samples)
        answer.prompt_logprobs = call.prompt_logprobs
        return answer

    async def call(self, route: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """POST to some live server that answers, and return status and body.

        A server that fails is left for another one, but after MOST_500 answers of 500, that is the
        answer. Raises TimeoutError, TokenRefused.
        """
        self.watch()
        deadline, failure = time.monotonic() + timeout_s, f"no server in {self.run.roster}"
        times_500 = 0
        while (left := deadline - time.monotonic()) > 0:
            if (server := self.pick()) is not None:
                try:
                    async with self._open(server + route, body, left) as response:
                        self._note_refusal(server, response.status)
                        times_500 += response.status == 500
                        final = response.status < 500 and response.status not in RETRIED
                        if final or times_500 == MOST_500:
                            return response.status, await response.read()
                        failure = f"{server} answered {response.status}"
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    failure = f"{server}: {error!r}"
                self._suspect_until[server] = time.monotonic() + SUSPECT_S
            await asyncio.sleep(ROSTER_S)
        raise TimeoutError(
            f"no vLLM server answered {route} within {timeout_s:.0f} s; last: {failure}"
        )

    async def _complete(
        self, call: "_Call", request: GenerateRequest, samples: list[Sample]
    ) -> None:
        """Complete the samples of a request; after an interruption, each by a request of its own.

        Raises TimeoutError at the call's deadline.
        """
        moves, home = 0, self.homes.find(request.token_ids)
        while (left := call.deadline - time.monotonic()) > 0:
            server = self.pick(home)
            if server is None:
                await asyncio.sleep(min(left, ROSTER_S / 4))
                continue
            failure = await self._try(server, _Attempt(call, request, samples), left)
            for sample in samples:
                if sample.finished:
                    tokens = sample.generation.token_ids
                    self.homes.remember([*sample.request.token_ids, *tokens], server)
                else:
                    sample.interrupt()
            unfinished = [sample for sample in samples if not sample.finished]
            if not unfinished:
                return
            if failure is None:  # a weight update aborted the request: the server is fine
                home = server
                await asyncio.sleep(ABORT_PAUSE_S)
            else:
                call.failure, moves = failure, moves + 1
                self._suspect_until[server] = time.monotonic() + SUSPECT_S
                log.warning("moving a generation to another server (move %d): %s", moves, failure)
                await asyncio.sleep(min(0.05 * 2**moves, LONGEST_PAUSE_S))
            if len(samples) == 1:
                request = samples[0].rest()
            elif len(unfinished) < len(samples) or any(sample.joint for sample in unfinished):
                return await self._complete_rest(call, request, samples)
        raise TimeoutError

    async def _complete_rest(
        self, call: "_Call", request: GenerateRequest, samples: list[Sample]
    ) -> None:
        """Complete samples: with one request if nothing is there yet, else each by its own."""
        unfinished = [sample for sample in samples if not sample.finished]
        if len(unfinished) == len(samples) and not any(sample.joint for sample in samples):
            return await self._complete(call, request, samples)
        await _all([self._complete(call, each.rest(), [each]) for each in unfinished])

    async def _try(self, server: str, attempt: "_Attempt", left_s: float) -> str | None:
        """Have this server generate. Return why it did not complete, None if it answered.

        Raises ValueError and TokenRefused as `post`.
        """
        request = asyncio.create_task(self._post_to(server, attempt, left_s))
        self.outstanding[server] += len(attempt.samples)
        self._requests[server].add(request)
        try:
            await asyncio.wait([request])  # raises only if the caller is cancelled
            if request.cancelled():
                return f"{server} left the roster"
            return request.result()
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            return f"{server}: {error!r}"
        finally:
            request.cancel()
            self.outstanding[server] -= len(attempt.samples)
            self._requests[server].discard(request)

    def _note_refusal(self, server: str, status: int) -> None:
        """Raise TokenRefused once every server has refused the run's token for long enough."""
        if status not in REFUSING:
            self._refused_since.pop(server, None)
            return
        now = time.monotonic()
        self._refused_since.setdefault(server, now)
        refused_s = [now - self._refused_since.get(url, now) for url in self._servers]
        if refused_s and min(refused_s) > self._refusal_s:
            raise TokenRefused(
                f"every vLLM server refuses this run's token ({server} answered {status}): they "
                f"were started with another one than {self.run.secret} has"
            )

    def _open(
        self, url: str, body: bytes, timeout_s: float
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
        return self._session.post(url, data=body, timeout=timeout)

    async def _post_to(self, server: str, attempt: "_Attempt", left_s: float) -> str | None:
        body = _encoder.encode(attempt.request)
        async with self._open(server + GENERATE, body, left_s) as response:
            self._note_refusal(server, response.status)
            if response.status == 200 and response.content_type == STREAM:
                return await self._read_stream(server, attempt, response)
            data = await response.read()
            if response.status == 200:
                answer = decode_answer(data)
                attempt.call.prompt_logprobs = answer.prompt_logprobs
                self.generated += attempt.add(answer.choices)
                return None
            text = data[:500].decode(errors="replace")
            if response.status < 500 and response.status not in RETRIED:
                raise ValueError(
                    f"{server}{GENERATE} rejected the request with {response.status}: {text}"
                )
            return f"{server} answered {response.status}: {text}"

    async def _read_stream(
        self, server: str, attempt: "_Attempt", response: aiohttp.ClientResponse
    ) -> str | None:
        """Add the events of a stream to the samples."""
        buffer, ended = bytearray(), False
        async for data in response.content.iter_any():  # to its end: the connection is used again
            buffer += data
            *events, buffer = buffer.split(EVENT_END)
            for event in events:
                payload = event.removeprefix(b"data:").strip()
                if payload == b"[DONE]":
                    ended = True
                    continue
                chunk = _chunk_decoder.decode(payload)
                if bytes(chunk.error) not in (b"", b"null"):
                    text = bytes(chunk.error)[:500].decode(errors="replace")
                    return f"{server} ended its answer with an error: {text}"
                self.generated += attempt.add(chunk.choices)
            if any(sample.cut for sample in attempt.samples):
                return None  # the server does not know, and goes on
        return None if ended else f"{server} ended its answer early"

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
