"""Answers continue from their tokens when their server is lost or a weight update aborts them.

The policy of the stub servers is deterministic: a continued answer must equal an undisturbed one.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import ks_critical, ks_distance, list_servers, make_run
from stub_vllm import EOS, Interrupt, Policy, StubVllm, characters, counting

from atropos_hpc.contracts.messages import GenerateRequest, SamplingParams, VersionSpan
from atropos_hpc.rollout.server_pool import Pool

PROMPT = [5, 6, 7]


def request(prompt: list[int] = PROMPT, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 40, "logprobs": 0} | sampling)
    return GenerateRequest(prompt, params, "text", stream=True)


def undisturbed(index: int = 0, tokens: int = 40) -> list[int]:
    ids = list(PROMPT)
    for at in range(tokens):
        ids.append(counting(ids) + (0 if at else index))
    return ids[len(PROMPT) :]


def on_two_servers(
    test: Callable[[Pool, StubVllm, StubVllm], Awaitable[None]],
) -> Callable[[Path], None]:
    """Run a test with the pool of a run whose roster lists two stub servers."""

    async def main(path: Path) -> None:
        run = make_run(path / "run")
        async with StubVllm() as one, StubVllm(version="2-1") as other:
            list_servers(run, {one.url: 1, other.url: 2})
            pool = Pool(run)
            await test(pool, one, other)
            await pool.close()

    def on_it(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(main(tmp_path), 60))

    return on_it


@pytest.mark.parametrize("how", ["lose", "error", "abort"])
def test_an_interrupted_answer_continues_from_its_tokens(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    @on_two_servers
    async def test(pool: Pool, one: StubVllm, other: StubVllm) -> None:
        one.interrupt = (how, 13)
        (choice,) = (await pool.post(request(), 30, characters)).choices
        assert choice.token_ids == undisturbed()
        assert choice.sampled_log_probs == [-token / 100 for token in undisturbed()]
        assert choice.sampling_mask == [[token, token + 1] for token in undisturbed()]
        assert choice.text == characters(undisturbed())
        (second,) = one.requests[1:] if how == "abort" else other.requests
        have = len(second["token_ids"]) - len(PROMPT)
        assert 13 <= have == pool.kept
        assert second["sampling_params"]["max_tokens"] == 40 - have
        assert one.generated + other.generated == 40 and pool.dropped == 0
        assert not +pool.outstanding

    test(tmp_path)
    assert ("EngineDeadError" in caplog.text) == (how == "error")


@on_two_servers
async def test_an_answer_leaves_a_lost_server_with_its_tokens_and_their_versions(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    """A lost node does not reset its connections."""
    one.interrupt, other.version = ("hang", 20), "7-1"
    list_servers(pool.run, {one.url: 1})
    answer = asyncio.create_task(pool.post(request(), 3600))
    while one.generated < 20:
        await asyncio.sleep(0.001)
    list_servers(pool.run, {other.url: 7})
    (choice,) = (await answer).choices
    assert choice.token_ids == undisturbed()
    assert choice.weight_versions == [VersionSpan("1-1", 0, 20), VersionSpan("7-1", 20, 40)]
    assert choice.versions == (1, 7)
    assert one.generated + other.generated == 40


@on_two_servers
async def test_each_sample_of_a_request_continues_by_itself(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    one.interrupt = other.interrupt = ("lose", 50)
    choices = (await pool.post(request(n=6, seed=3), 30)).choices
    assert [choice.index for choice in choices] == list(range(6))
    assert [choice.token_ids for choice in choices] == [undisturbed(i) for i in range(6)]
    assert one.generated + other.generated == 6 * 40
    # Each draws other numbers than the beginning of its own answer and of the other samples did.
    seeds = [body["sampling_params"]["seed"] for body in one.requests + other.requests]
    assert len(set(seeds)) == len(seeds) > 6
    assert not set(seeds) & set(range(4, 9))


@on_two_servers
async def test_what_depends_on_the_answer_s_own_tokens_starts_anew(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    for option in (
        {"structured_outputs": {"json_object": True}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ["x"]},
    ):
        for server in (one, other):
            server.interrupt, server.requests, server.generated = ("lose", 12), [], 0
        (choice,) = (await pool.post(request(**option), 30)).choices
        assert choice.token_ids == undisturbed()
        bodies = one.requests + other.requests
        assert [body["token_ids"] for body in bodies] == [PROMPT] * len(bodies)
    assert pool.kept == 0 and pool.dropped > 0


@on_two_servers
async def test_a_stop_string_across_the_joint_ends_the_answer(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    """The stub never stops at strings, as a server would not that saw only half of one."""
    for server in (one, other):
        server.interrupt = ("lose", 12)
    tokens = undisturbed()
    stop = characters(tokens[10:14])
    (choice,) = (await pool.post(request(stop=["never", stop]), 30, characters)).choices
    assert choice.token_ids == tokens[:14]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.text == characters(tokens[:10])
    assert choice.sampling_mask is not None
    assert len(choice.sampled_log_probs) == len(choice.sampling_mask) == 14
    assert choice.weight_versions is not None and choice.weight_versions[-1].end == 14


@on_two_servers
async def test_a_conversation_stays_on_the_server_that_has_its_prefix(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    homes = []
    for conversation in range(4):
        ids = [conversation] * 20
        for turn in range(5):
            turn_request = GenerateRequest(
                ids, SamplingParams(max_tokens=20), "tokens", stream=True
            )
            before = one.served
            (choice,) = (await pool.post(turn_request, 30)).choices
            homes.append(one.served > before)
            ids = [*ids, *choice.token_ids, turn, turn]
    turns = [homes[i : i + 5] for i in range(0, 20, 5)]
    assert all(len(set(each)) == 1 for each in turns)  # each on one server
    assert len({each[0] for each in turns}) == 2  # but not all on the same


@on_two_servers
async def test_a_conversation_leaves_a_server_that_is_overloaded_or_gone(
    pool: Pool, one: StubVllm, other: StubVllm
) -> None:
    assert pool.pick(one.url) == one.url
    pool.outstanding[one.url] = 100
    assert pool.pick(one.url) == other.url
    pool.outstanding[other.url] = 90
    assert pool.pick(one.url) == one.url
    pool._servers = {other.url: 1}
    assert pool.pick(one.url) == other.url


# --- no bias against long answers

SAMPLES, MEAN, MOST = 400, 60, 150


class RandomVllm(StubVllm):
    """Ends answers at random, and interrupts each request at a moment that is independent of it."""

    def __init__(self, how: str) -> None:
        super().__init__(chunk=16)
        self.how, self.attempts = how, Counter[int]()

    def plan(self, body: dict[str, Any]) -> tuple[Policy, Interrupt]:
        answer = body["token_ids"][0]
        self.attempts[answer] += 1
        source = random.Random(f"{answer} {self.attempts[answer]} {self.how}")
        interrupt = (self.how, source.randrange(20, MOST))
        return lambda ids: EOS if source.random() < 1 / MEAN else 2, interrupt


async def lengths(path: Path, how: str, **sampling: Any) -> list[int]:
    """The lengths of answers."""
    run = make_run(path)
    pool = Pool(run)
    async with RandomVllm(how) as server:
        list_servers(run, {server.url: 1})
        requests = [request([i], max_tokens=MOST, **sampling) for i in range(SAMPLES)]
        answers = await asyncio.gather(*(pool.post(each, 60) for each in requests))
    await pool.close()
    return [len(answer.choices[0].token_ids) for answer in answers]


def test_interruptions_do_not_change_the_distribution_of_lengths(tmp_path: Path) -> None:
    undisturbed = asyncio.run(lengths(tmp_path / "undisturbed", ""))
    continued = asyncio.run(lengths(tmp_path / "continued", "abort"))
    # The same interruptions of answers that start anew: what the test would find.
    restarted = asyncio.run(lengths(tmp_path / "restarted", "abort", presence_penalty=0.1))
    critical = ks_critical(SAMPLES)
    assert ks_distance(undisturbed, continued) < critical < ks_distance(undisturbed, restarted)
