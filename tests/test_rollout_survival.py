"""Two real vLLM servers: conversations find their prefix, tool calls are parsed, and long answers
outlive weight updates and the loss of a server."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import ks_critical, ks_distance, list_servers, make_run, publish

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")

import aiohttp  # noqa: E402
import torch  # noqa: E402
from chat_models import FAMILIES, save_tokenizer  # noqa: E402
from transformers import AutoConfig, Qwen3ForCausalLM  # noqa: E402
from vllm_servers import ROLLOUT, Served, started  # noqa: E402

from atropos_hpc.contracts.messages import (  # noqa: E402
    GenerateAnswer,
    GenerateRequest,
    Generation,
    SamplingParams,
)
from atropos_hpc.contracts.policy import PolicyVersion  # noqa: E402
from atropos_hpc.environments.make_base import make_model  # noqa: E402
from atropos_hpc.policy.weight_update import UpdateOptions, push  # noqa: E402
from atropos_hpc.rollout.server_pool import GENERATE, Pool, pool_of  # noqa: E402
from atropos_hpc.rollout.vllm_client import VllmServer, VllmServerConfig  # noqa: E402
from atropos_hpc.runtime.process import descendants_of  # noqa: E402

ANSWERS, MOST = 100, 300
FAMILY = FAMILIES[1]
END_BIAS = -0.7  # of the logit, so that answers of about MOST tokens are common
BLOCK = 128  # tokens that vLLM caches together on a CPU


@dataclass
class Pair:
    """Two servers of one run, with random weights, and the lengths of undisturbed answers."""

    one: Served
    other: Served
    tokenizer: Any
    lengths: list[int]
    version: int = 0

    def metric(self, name: str) -> float:
        return sum(server.metric(name) for server in self.servers)

    @property
    def servers(self) -> tuple[Served, Served]:
        return self.one, self.other


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    tokenizer = save_tokenizer(FAMILY, root / "base")
    config = make_model(seed=0).config
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.max_position_embeddings = 1024
    # Random weights end an answer about once in 100 tokens.
    Qwen3ForCausalLM(config).save_pretrained(root / "base")
    conf = {"path": str(root / "base"), "max_length": 1024, "dtype": "float32"}
    run = make_run(root / "run", model=conf, rollout=ROLLOUT | {"tool_parser": "hermes"})
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                started(
                    run,
                    root / "base",
                    root / "base",
                    root / f"server-{method}.log",
                    VLLM_WORKER_MULTIPROC_METHOD=method,
                )
            )
            for method in ("fork", "spawn")  # of the engine's process: on a CPU, on a GPU
        ]
        for server in servers:
            server.wait_until_up()
        list_servers(run, {server.url: 0 for server in servers})
        pair = Pair(*servers, tokenizer, lengths=[])
        _, answers = generate(pair)
        pair.lengths = lengths(answers)
        yield pair


def generate(
    pair: Pair, disturb: Callable[[Pool], Awaitable[None]] | None = None
) -> tuple[Pool, list[GenerateAnswer]]:
    """Generate the answers, and disturb the servers once half of the tokens has arrived."""

    async def main() -> tuple[Pool, list[GenerateAnswer]]:
        pool = Pool(pair.one.run)
        prompt = pair.tokenizer.encode("the end")
        bias = {str(pair.tokenizer.eos_token_id): END_BIAS}
        sampling = SamplingParams(temperature=1.0, max_tokens=MOST, logprobs=0, logit_bias=bias)
        request = GenerateRequest(prompt, sampling, "tokens", stream=True)
        tasks = [asyncio.create_task(pool.post(request, 300)) for _ in range(ANSWERS)]
        if disturb is not None:
            while pool.generated < sum(pair.lengths) / 2:
                await asyncio.sleep(0.01)
            await disturb(pool)
        answers = await asyncio.gather(*tasks)
        await pool.close()
        return pool, answers

    return asyncio.run(main())


def choices(answers: list[GenerateAnswer]) -> list[Generation]:
    return [choice for answer in answers for choice in answer.choices]


def lengths(answers: list[GenerateAnswer]) -> list[int]:
    return [len(choice.token_ids) for choice in choices(answers)]


def check(pair: Pair, answers: list[GenerateAnswer]) -> None:
    """Every answer is whole, stamped to its last token, and no length is favoured."""
    end = pair.tokenizer.eos_token_id
    for choice in choices(answers):
        assert choice.finish_reason == "stop" if choice.token_ids[-1] == end else "length"
        assert end not in choice.token_ids[:-1]
        spans = choice.weight_versions
        assert spans and choice.logprobs
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(choice.token_ids) == len(choice.logprobs.content) <= MOST
        assert all(each.logprob <= 0 for each in choice.logprobs.content)
    assert ks_distance(pair.lengths, lengths(answers)) < ks_critical(ANSWERS)


def client(pair: Pair) -> VllmServer:
    name = str(pair.one.base)
    config = VllmServerConfig(
        run_dir=pair.one.run.path,
        model_name=name,
        tokenizer_name=name,
        timeout=300,
        server_type="vllm",
    )
    return VllmServer(config)


def test_the_turns_of_conversations_find_their_prefix_in_a_cache(pair: Pair) -> None:
    conversations, turns = 6, 5

    async def converse(server: VllmServer, number: int) -> list[int]:
        """Return how many tokens of each prompt were there at the end of the turn before."""
        messages: list[Any] = [{"role": "user", "content": f"{number}: the table"}]
        known = [0]
        for _ in range(turns):
            answer = await server.chat_completion(
                messages=messages, max_tokens=130, min_tokens=130, temperature=1.0
            )
            text = answer.choices[0].message.content
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "on"}]
            known.append(len(answer.prompt_token_ids) + len(answer.choices[0].token_ids))
        return known[:-1]

    async def main() -> list[list[int]]:
        server = client(pair)
        found = await asyncio.gather(*(converse(server, i) for i in range(conversations)))
        await pool_of(pair.one.run.path).close()
        return found

    pool_of.cache_clear()
    before = pair.metric("prefix_cache_hits_total")
    busy = [server.metric("generation_tokens_total") for server in pair.servers]
    known = asyncio.run(main())
    hits = pair.metric("prefix_cache_hits_total") - before
    # The last token of a sequence is sampled, but its keys are not computed.
    cached = sum((tokens - 1) // BLOCK * BLOCK for each in known for tokens in each if tokens)
    assert hits == cached > 0.5 * sum(map(sum, known))
    assert all(
        server.metric("generation_tokens_total") > was
        for server, was in zip(pair.servers, busy, strict=True)
    )


def test_vllm_s_own_parser_finds_the_tool_calls_of_an_answer(pair: Pair) -> None:
    call = 'on <tool_call>{"name": "add", "arguments": {"a": [1, 2]}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    encode = pair.tokenizer.encode
    samples = [
        Generation([*encode(text), pair.tokenizer.eos_token_id], finish_reason="stop")
        for text in (call, "the table", "")
    ]

    async def main() -> list[Any]:
        server = client(pair)
        found = await server.tool_calls.parse(encode("the end"), samples, tools, 60)
        await server.pool.close()
        return list(found)

    pool_of.cache_clear()
    first, *others = asyncio.run(main())
    assert others == [None, None]
    assert first.content.strip() == "on"
    (found,) = first.tool_calls
    assert found.id and found.function.name == "add"
    assert json.loads(found.function.arguments) == {"a": [1, 2]}


async def update(pair: Pair, weights: Path, mode: str = "keep") -> None:
    """Publish these weights as the next version, and push it to both servers."""
    pair.version += 1
    run, version = pair.one.run, PolicyVersion(version=pair.version, attempt=1)
    directory = publish(run, weights / "model.safetensors", pair.version)
    async with aiohttp.ClientSession() as session:
        for server in pair.servers:
            options = UpdateOptions(mode=mode)
            await push(session, server.url, run.token(), directory, version, options)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_an_update_costs_no_token_and_favours_no_length(pair: Pair, mode: str) -> None:
    """The new version has the same weights, so that the lengths can be compared."""
    before = pair.metric("generation_tokens_total")
    pool, answers = generate(pair, lambda pool: update(pair, pair.one.base, mode))
    after = pair.metric("generation_tokens_total")
    check(pair, answers)
    over_both = [choice.versions == (pair.version - 1, pair.version) for choice in choices(answers)]
    assert (pool.kept > 0) == (mode == "abort")
    assert any(over_both) == (mode != "wait")
    assert pool.dropped == 0 and after - before == sum(lengths(answers))


@pytest.mark.parametrize("engine", ["forked", "spawned"])
@pytest.mark.parametrize("arrives", ["after the update", "during its pause"])
def test_a_new_version_uses_no_keys_and_values_of_an_older_one(
    pair: Pair, tmp_path: Path, arrives: str, engine: str
) -> None:
    """Running requests keep theirs, so the cache is not cleared."""
    torch.manual_seed(1)
    Qwen3ForCausalLM(AutoConfig.from_pretrained(pair.one.base)).save_pretrained(tmp_path)
    server, prompt = pair.servers[engine == "spawned"], list(range(2, 60)) * 6
    headers = {"Authorization": f"Bearer {server.token}"}

    async def ask(session: aiohttp.ClientSession) -> float:
        """Return the log-prob of the greedy answer."""
        sampling = {"temperature": 0.0, "max_tokens": 1, "logprobs": 0}
        body = {"token_ids": prompt, "sampling_params": sampling}
        async with session.post(server.url + GENERATE, json=body) as answer:
            (position,) = (await answer.json())["choices"][0]["logprobs"]["content"]
            return float(position["logprob"])

    async def main() -> tuple[float, float, float, float]:
        async with aiohttp.ClientSession(headers=headers) as session:

            async def post(route: str, **body: Any) -> None:
                async with session.post(server.url + route, json=body) as answer:
                    assert answer.status == 200, await answer.text()

            old, again = await ask(session), await ask(session)
            if arrives == "after the update":
                await update(pair, tmp_path)
                new = await ask(session)
            else:
                files = publish(pair.one.run, tmp_path / "model.safetensors", pair.version + 100)
                info = {"directory": str(files), "version": f"{pair.version + 100}-1"}
                await post("/start_weight_update")
                await post("/update_weights", update_info=info)
                await post("/pause?mode=keep&clear_cache=false")
                answer = asyncio.create_task(ask(session))
                for _ in range(5):  # the engine answers in order: it has the request by then
                    async with session.get(server.url + "/is_paused") as paused:
                        assert (await paused.json())["is_paused"] and not answer.done()
                await post("/finish_weight_update", weight_version=f"{pair.version + 100}-1")
                await post("/resume")
                new = await answer
            await post("/reset_prefix_cache")
            return old, again, new, await ask(session)

    before = server.metric("prefix_cache_hits_total")
    old, again, new, alone = asyncio.run(main())
    assert again == pytest.approx(old, abs=1e-4)
    assert server.metric("prefix_cache_hits_total") - before == len(prompt) // BLOCK * BLOCK
    assert new == pytest.approx(alone, abs=1e-4) != pytest.approx(old, abs=1e-2)
    asyncio.run(update(pair, pair.one.base))


def test_the_death_of_a_server_costs_a_few_tokens_and_favours_no_length(pair: Pair) -> None:
    """The last test of this file: it kills a server."""
    before = pair.metric("generation_tokens_total")
    killed: list[float] = []
    served: list[Served] = []  # the server that lives

    def running(server: Served) -> float:
        return server.metric("num_requests_running")

    async def kill(pool: Pool) -> None:
        other, server = await asyncio.to_thread(sorted, pair.servers, key=running)
        served.append(other)
        engines = descendants_of(server.pid)
        for engine in engines:  # so that what it generated can be counted
            os.kill(engine, signal.SIGSTOP)
        killed.append(await asyncio.to_thread(server.metric, "generation_tokens_total"))
        for pid in (server.pid, *engines):
            with contextlib.suppress(ProcessLookupError):  # it ends with its parent
                os.kill(pid, signal.SIGKILL)

    pool, answers = generate(pair, kill)
    after = killed[0] + served[0].metric("generation_tokens_total")
    check(pair, answers)
    again = after - before - sum(lengths(answers))
    print(f"of {pool.kept + again:.0f} tokens on the killed server {again:.0f} were lost")
    assert pool.kept > 500
    assert pool.dropped == 0 and 0 <= again <= 0.05 * (pool.kept + again)
