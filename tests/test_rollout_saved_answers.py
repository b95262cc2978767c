"""Answers under way when a run stops are continued by the resumed run."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web
from rollout_parts import ANSWER, FakeServer, list_servers, make_run
from stub_vllm import Interrupt, Policy, StubVllm, characters
from test_rollout_continuation import PROMPT, request, undisturbed

from atropos_hpc.contracts.messages import GenerateAnswer, GenerateRequest, SamplingParams
from atropos_hpc.rollout.saved_answers import SavedAnswers, forget_rollout
from atropos_hpc.rollout.server_pool import Pool
from atropos_hpc.runtime.run_dir import RunDir

STALENESS = 2


async def two_turns(pool: Pool) -> list[GenerateAnswer]:
    """A rollout: the second prompt is the first answer; then two samples."""
    assert pool.saved is not None
    with pool.saved.rollout():
        first = await pool.post(request(max_tokens=8), 30)
        ids = PROMPT + first.choices[0].token_ids
        return [first, await pool.post(request(ids, n=2), 30)]


async def stopped(run: RunDir, stub: StubVllm) -> None:
    """Start the rollout, and stop in the middle of its second answer."""
    pool = Pool(run)
    pool.saved = SavedAnswers(run, STALENESS)
    task = asyncio.create_task(two_turns(pool))
    while len(stub.requests) < 2:
        stub.interrupt = ("hang", 24) if len(stub.requests) == 1 else ("", 0)
        await asyncio.sleep(0)
    await stop_after(pool, stub, 8 + 24, task)


async def stop_after(pool: Pool, stub: StubVllm, tokens: int, task: asyncio.Task[Any]) -> None:
    """Stop as a worker does, once the server has generated so many tokens."""
    assert pool.saved is not None
    while stub.generated < tokens:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)  # until the client has what was sent
    async with pool.saved.stopping():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await pool.close()


async def resumed(run: RunDir, served: int) -> tuple[list[GenerateAnswer], StubVllm, Pool]:
    run.new_attempt()
    async with StubVllm(version=f"{served}-2") as stub:
        list_servers(run, {stub.url: served})
        pool = Pool(run)
        pool.saved = SavedAnswers(run, STALENESS)
        answers = await two_turns(pool)
        await pool.close()
        return answers, stub, pool


def on_a_stopped_run(path: Path, test: Any) -> None:
    async def main() -> None:
        run = make_run(path / "run")
        run.new_attempt()
        async with StubVllm(version="5-1") as stub:
            stub.interrupt = ("", 0)
            list_servers(run, {stub.url: 5})
            await stopped(run, stub)
        await test(run)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_resumed_run_continues_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    async def test(run: RunDir) -> None:
        (first, second), stub, pool = await resumed(run, served=6)
        assert first.choices[0].token_ids == undisturbed(tokens=8)
        assert first.choices[0].versions == (5, 5)  # it was there: no request was needed
        assert stub.generated == 2 * 40 - 24
        assert pool.kept == 8 + 24
        for choice in second.choices:
            assert len(choice.token_ids) == 40 and choice.versions == (5, 6)
            assert choice.weight_versions is not None
            assert choice.weight_versions[-1].end == 40
            assert choice.logprobs is not None and len(choice.logprobs.content) == 40
        assert not list(run.partial.iterdir())  # each file is used once

    on_a_stopped_run(tmp_path, test)


def test_saved_answers_that_are_stale_or_of_a_policy_that_is_gone_are_not_used(
    tmp_path: Path,
) -> None:
    for served in (4, 5 + STALENESS + 1):

        async def test(run: RunDir, served: int = served) -> None:
            _, stub, pool = await resumed(run, served)
            assert stub.generated == 8 + 2 * 40 and pool.kept == 0

        on_a_stopped_run(tmp_path / str(served), test)


def test_saved_answers_of_an_older_attempt_are_deleted(tmp_path: Path) -> None:
    async def test(run: RunDir) -> None:
        run.new_attempt()
        _, stub, _ = await resumed(run, served=5)
        assert stub.generated == 8 + 2 * 40
        assert not list(run.partial.iterdir())

    on_a_stopped_run(tmp_path, test)


def test_a_rollout_that_has_sent_its_group_saves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        run = make_run(tmp_path / "run")
        async with StubVllm() as stub:
            list_servers(run, {stub.url: 1})
            pool = Pool(run)
            pool.saved = SavedAnswers(run, STALENESS)
            with pool.saved.rollout():
                await pool.post(request(), 30)
                forget_rollout()
                async with pool.saved.stopping():
                    pass
            assert not run.partial.exists()
            await pool.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_answer_that_was_joined_has_its_text_after_a_stop_too(tmp_path: Path) -> None:
    """The first sample was cut at a stop string across the joint; the second is under way."""
    first = undisturbed()
    stop = characters(first[10:14])
    wanted = request(n=2, stop=[stop])

    class Stub(StubVllm):
        def plan(self, body: dict[str, Any]) -> tuple[Policy, Interrupt]:
            ids = body["token_ids"]
            if ids == PROMPT:
                return self.policy, ("lose", 24)
            return self.policy, ("", 0) if ids[len(PROMPT)] == first[0] else ("hang", 4)

    async def rollout(pool: Pool) -> GenerateAnswer:
        assert pool.saved is not None
        with pool.saved.rollout():
            return await pool.post(wanted, 30, characters)

    async def main() -> None:
        run = make_run(tmp_path / "run")
        run.new_attempt()
        pool = Pool(run)
        pool.saved = SavedAnswers(run, STALENESS)
        async with Stub(version="5-1") as stub:
            list_servers(run, {stub.url: 5})
            task = asyncio.create_task(rollout(pool))
            while len(stub.requests) < 3:
                await asyncio.sleep(0.001)
            await stop_after(pool, stub, 32, task)
        async with StubVllm(version="5-2") as stub:
            list_servers(run, {stub.url: 5})
            pool = Pool(run)
            pool.saved = SavedAnswers(run, STALENESS)
            choices = (await rollout(pool)).choices
            await pool.close()
        assert choices[0].token_ids == first[:14] and choices[0].text == characters(first[:10])
        assert choices[1].text == characters(undisturbed(1))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_log_probs_of_a_prompt_are_there_after_a_stop_too(tmp_path: Path) -> None:
    log_probs = [None, {"6": {"logprob": -0.5}}, {"7": {"logprob": -1.5}}]
    wanted = GenerateRequest(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=1), "tokens")

    async def answer(http: web.Request) -> web.Response:
        return web.json_response(ANSWER | {"prompt_logprobs": log_probs})

    async def main() -> None:
        run = make_run(tmp_path / "run")
        async with FakeServer(answer) as server:
            list_servers(run, {server.url: 1})
            for _ in range(2):
                pool = Pool(run)
                pool.saved = SavedAnswers(run, STALENESS)
                with pool.saved.rollout():
                    found = (await pool.post(wanted, 30)).prompt_logprobs
                    async with pool.saved.stopping():
                        pass
                await pool.close()
                assert found is not None and found[2] is not None
                assert found[2]["7"].logprob == -1.5

    asyncio.run(asyncio.wait_for(main(), 60))
