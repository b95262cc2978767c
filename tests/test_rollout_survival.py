"""Long answers over two real vLLM servers outlive weight updates and the loss of a server."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
from rollout_parts import ks_critical, ks_distance, list_servers, make_run, publish

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")

import aiohttp  # noqa: E402
from vllm_servers import PROMPT, ROLLOUT, Served, started  # noqa: E402

from atropos_hpc.contracts.messages import (  # noqa: E402
    GenerateAnswer,
    GenerateRequest,
    Generation,
    SamplingParams,
)
from atropos_hpc.contracts.policy import PolicyVersion  # noqa: E402
from atropos_hpc.environments.addition import EOS, VOCABULARY  # noqa: E402
from atropos_hpc.environments.make_base import make_model, make_tokenizer  # noqa: E402
from atropos_hpc.policy.weight_update import UpdateOptions, push  # noqa: E402
from atropos_hpc.rollout.server_pool import Pool  # noqa: E402
from atropos_hpc.runtime.process import descendants_of  # noqa: E402

ANSWERS, MOST = 100, 300
END = VOCABULARY.index(EOS)
LONG = SamplingParams(temperature=1.0, max_tokens=MOST, logprobs=0, logit_bias={str(END): -2.5})


@dataclass
class Pair:
    """Two servers of one run, with random weights, and the lengths of undisturbed answers."""

    one: Served
    other: Served
    lengths: list[int]
    version: int = 0

    @property
    def servers(self) -> tuple[Served, Served]:
        return self.one, self.other


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    model = make_model(seed=0)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    conf = {"path": str(root / "base"), "max_length": 512, "dtype": "float32"}
    run = make_run(root / "run", model=conf, rollout=ROLLOUT)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                started(run, root / "base", root / "base", root / f"server-{i}.log")
            )
            for i in range(2)
        ]
        for server in servers:
            server.wait_until_up()
        list_servers(run, {server.url: 0 for server in servers})
        _, answers = generate(Pair(*servers, lengths=[]))
        yield Pair(*servers, lengths=lengths(answers))


def generate(
    pair: Pair, disturb: Callable[[Pool], Awaitable[None]] | None = None
) -> tuple[Pool, list[GenerateAnswer]]:
    """Generate the answers, and disturb the servers once a third of the tokens has arrived."""

    async def main() -> tuple[Pool, list[GenerateAnswer]]:
        pool = Pool(pair.one.run)
        request = GenerateRequest(PROMPT, LONG, "tokens", stream=True)
        tasks = [asyncio.create_task(pool.post(request, 300)) for _ in range(ANSWERS)]
        if disturb is not None:
            while pool.generated < sum(pair.lengths) / 3:
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
    for choice in choices(answers):
        assert choice.finish_reason == "stop" if choice.token_ids[-1] == END else "length"
        assert END not in choice.token_ids[:-1]
        spans = choice.weight_versions
        assert spans and choice.logprobs
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(choice.token_ids) == len(choice.logprobs.content) <= MOST
        assert all(each.logprob <= 0 for each in choice.logprobs.content)
    assert ks_distance(pair.lengths, lengths(answers)) < ks_critical(ANSWERS)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_an_update_costs_no_token_and_favours_no_length(pair: Pair, mode: str) -> None:
    """The new version has the same weights, so that the lengths can be compared."""
    pair.version += 1
    run, version = pair.one.run, PolicyVersion(version=pair.version, attempt=1)
    directory = publish(run, pair.one.base / "model.safetensors", pair.version)

    async def update(pool: Pool) -> None:
        async with aiohttp.ClientSession() as session:
            for server in pair.servers:
                options = UpdateOptions(mode=mode)
                await push(session, server.url, run.token(), directory, version, options)

    before = sum(server.metric("generation_tokens_total") for server in pair.servers)
    pool, answers = generate(pair, update)
    after = sum(server.metric("generation_tokens_total") for server in pair.servers)
    check(pair, answers)
    over_both = [choice.versions == (pair.version - 1, pair.version) for choice in choices(answers)]
    assert (pool.kept > 0) == (mode == "abort")
    assert any(over_both) == (mode != "wait")
    assert pool.dropped == 0 and after - before == sum(lengths(answers))


def test_the_death_of_a_server_costs_a_few_tokens_and_favours_no_length(pair: Pair) -> None:
    """The last test of this file: it kills a server."""
    before = sum(server.metric("generation_tokens_total") for server in pair.servers)
    killed: list[float] = []

    async def kill(pool: Pool) -> None:
        for engine in descendants_of(pair.one.pid):  # so that what it generated can be counted
            os.kill(engine, signal.SIGSTOP)
        killed.append(await asyncio.to_thread(pair.one.metric, "generation_tokens_total"))
        os.kill(pair.one.pid, signal.SIGKILL)

    pool, answers = generate(pair, kill)
    after = killed[0] + pair.other.metric("generation_tokens_total")
    check(pair, answers)
    again = after - before - sum(lengths(answers))
    print(f"of {pool.kept + again:.0f} tokens on the killed server {again:.0f} were lost")
    assert pool.kept > 500
    assert pool.dropped == 0 and 0 <= again <= 0.05 * (pool.kept + again)
