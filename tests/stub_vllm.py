"""A stub of vLLM's token endpoint that streams, and whose requests can be interrupted."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web
from rollout_parts import FakeServer

Policy = Callable[[list[int]], int]  # the ids so far -> the next id
Interrupt = tuple[str, int]
EOS = 1


def characters(ids: Sequence[int]) -> str:
    """A character for each id."""
    return "".join(chr(token + 32) for token in ids)


def counting(ids: list[int]) -> int:
    """A deterministic policy: the next id depends on all ids so far."""
    return 2 + (7 * sum(ids) + len(ids)) % 90


class StubVllm(FakeServer):
    """Streams what `policy` samples, in chunks. `version` labels the tokens from now on.

    `interrupt` is (how, after how many tokens of the next request). "lose" breaks the connection,
    "abort" ends the answer as a weight update does, "hang" sends no more, "error" sends an error.
    """

    def __init__(self, policy: Policy = counting, version: str = "1-1", chunk: int = 4) -> None:
        super().__init__(self.answer)
        self.policy, self.version, self.chunk = policy, version, chunk
        self.eos, self.decode = EOS, characters
        self.interrupt: Interrupt = ("", 0)
        self.requests: list[dict[str, Any]] = []
        self.generated = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        policy, (how, after) = self.plan(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        samples = [_Sample(body, i, self) for i in range(body["sampling_params"].get("n", 1))]
        sent = 0
        while running := [sample for sample in samples if sample.finish is None]:
            for sample in running:
                new = sample.generate(policy, self.chunk, self.version)
                sent += len(new)
                self.generated += len(new)
                if how == "abort" and sent >= after and sample.finish is None:
                    sample.finish = "abort"
                await self._send(response, {"choices": [sample.choice(new)]})
                if how == "error" and sent >= after:
                    await self._send(response, {"error": {"message": "EngineDeadError"}})
                if how == "lose" and sent >= after:
                    assert request.transport is not None
                    request.transport.close()
                if how in ("lose", "hang", "error") and sent >= after:
                    await asyncio.sleep(3600)
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    def plan(self, body: dict[str, Any]) -> tuple[Policy, Interrupt]:
        """What samples the answer to this request, and what interrupts it."""
        interrupt, self.interrupt = self.interrupt, ("", 0)
        return self.policy, interrupt

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        await response.write(data[:40])  # an event may arrive in pieces
        await response.write(data[40:])


class _Sample:
    def __init__(self, body: dict[str, Any], index: int, stub: StubVllm) -> None:
        self.stub = stub
        sampling = body["sampling_params"]
        self.index, self.ids, self.prompt = index, list(body["token_ids"]), len(body["token_ids"])
        self.most, self.least = sampling["max_tokens"], sampling.get("min_tokens", 0)
        self.finish: str | None = None
        self.spans: list[dict[str, Any]] = []

    def generate(self, policy: Policy, chunk: int, version: str) -> list[int]:
        new: list[int] = []
        while len(new) < chunk and self.finish is None:
            at = len(self.ids) - self.prompt
            new.append(
                policy(self.ids) + (0 if at else self.index)
            )  # samples differ from the first on
            self.ids.append(new[-1])
            if not self.spans or self.spans[-1]["version"] != version:
                self.spans.append({"version": version, "start": at, "end": at})
            self.spans[-1]["end"] = at + 1
            if new[-1] == self.stub.eos and at >= self.least:
                self.finish = "stop"
            elif at + 1 >= self.most:
                self.finish = "length"
        return new

    def choice(self, new: list[int]) -> dict[str, Any]:
        return {
            "index": self.index,
            "token_ids": new,
            "text": self.stub.decode(new),
            "finish_reason": self.finish,
            "logprobs": {"content": [{"token_id": t, "logprob": -t / 100} for t in new]},
            "weight_versions": self.spans,
            "sampling_mask": [[t, t + 1] for t in new],
        }
