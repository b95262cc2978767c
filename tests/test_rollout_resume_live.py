"""Answers that are interrupted, from the worker to the trained groups, over HTTP."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atroposlib.envs.base import ScoredDataGroup  # noqa: E402
from prompt_coverage import history  # noqa: E402
from prompt_parts import journalled  # noqa: E402
from rollout_parts import ks_critical, ks_distance  # noqa: E402
from stub_vllm import Interrupt, Policy, StubVllm, counting  # noqa: E402
from test_rollout_continuation import MOST, RandomVllm  # noqa: E402
from test_rollout_prompts_live import Live, UnmodifiedEnv  # noqa: E402

ANSWER, THERE = 20, 12  # tokens of an answer, and of all samples of a request at the stop
RUNNING = 4  # rollouts


class GeneratingEnv(UnmodifiedEnv):
    sampling: ClassVar[dict[str, Any]] = {"max_tokens": ANSWER}

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup | None, list[Any]]:
        prompt, answers, log_probs, _ = await self.server.tokens_and_logprobs_completion(
            input_ids=[100 + item], n=2, temperature=1.0, **self.sampling
        )
        group = ScoredDataGroup(
            tokens=[prompt + answer for answer in answers],
            masks=[[-100, *answer] for answer in answers],
            inference_logprobs=[[1.0, *each] for each in log_probs],
            scores=[0.0, 1.0],
        )
        return group, []


class Generating(Live):
    environment = GeneratingEnv

    async def stop_worker(self, index: int) -> None:
        """End it as a stop of the run does."""
        env, task = self.workers.pop(index)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await env.leave()
        env.member.leave()


class Hanging(StubVllm):
    """Sends the first tokens of each answer only, while `hangs`."""

    hangs = True

    def plan(self, body: dict[str, Any]) -> tuple[Policy, Interrupt]:
        return self.policy, ("hang", THERE) if self.hangs else ("", 0)


@pytest.mark.timeout(180)
def test_a_requeued_run_continues_the_answers_that_were_under_way(tmp_path: Path) -> None:
    async def story() -> tuple[Live, Hanging]:
        async with Hanging(version="0-1") as stub:
            live = Generating(tmp_path, stub.url)
            live.run.new_attempt()
            await live.start_server()
            live.start_worker(0)
            while stub.generated < RUNNING * THERE:
                await live.train()
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # until the client has what was sent
            await live.stop_worker(0)
            await live.stop_server()
            saved = list(live.run.partial.iterdir())
            assert len(saved) == RUNNING
            stub.hangs, live.attempt = False, live.attempt + 1
            live.run.new_attempt()
            await live.start_server()
            live.start_worker(0)
            await live.until(RUNNING)
            await live.stop_worker(0)
            await live.stop_server()
            assert not set(saved) & set(live.run.partial.iterdir())
            return live, stub

    live, stub = asyncio.run(story())
    continued = [body for body in stub.requests if len(body["token_ids"]) > 1]
    assert len(continued) == RUNNING * 2  # samples
    groups = [
        group
        for group in journalled(live.run.trajectories)
        if group.generation_params["draw"]["number"] < RUNNING
    ]
    assert len(groups) == RUNNING
    for group in groups:
        rows = group.tokens.reshape(2, 1 + ANSWER).tolist()
        for index, row in enumerate(rows):
            ids = row[:1]
            for at in range(ANSWER):
                ids.append(counting(ids) + (0 if at else index))
            assert row == ids


PROMPTS = 120


class LongEnv(GeneratingEnv):
    sampling: ClassVar = {"max_tokens": MOST}


class RestartingEnv(LongEnv):
    """Asks for what starts anew where it is interrupted."""

    sampling: ClassVar = {**LongEnv.sampling, "structured_outputs": {"json_object": True}}


async def trained_lengths(path: Path, how: str, environment: type[LongEnv] = LongEnv) -> list[int]:
    """The lengths of the answers to the first prompts, in the batches that were trained on."""
    async with contextlib.AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(RandomVllm(how)) for _ in range(2)]
        live = Generating(path, *(stub.url for stub in stubs))
        live.environment, live.longest = environment, 2 * MOST
        live.run.new_attempt()
        await live.start_server()
        for index in range(3):
            live.start_worker(index)
        await live.until(PROMPTS)
        for index in range(3):
            await live.stop_worker(index)
        await live.stop_server()
    past = history(live.run)
    trained = [past.groups[gid] for gids in past.batches.values() for gid in gids]
    first = [group for group in trained if group.generation_params["draw"]["number"] < PROMPTS]
    assert len(first) >= PROMPTS - 1  # one may wait for its batch
    return [int(length) - 1 for group in first for length in group.lengths]


@pytest.mark.timeout(300)
def test_interruptions_do_not_change_the_distribution_of_lengths_of_trained_answers(
    tmp_path: Path,
) -> None:
    async def story() -> dict[str, list[int]]:
        found = {how: await trained_lengths(tmp_path / how, how) for how in ("", "abort", "lose")}
        anew = await trained_lengths(tmp_path / "anew", "abort", RestartingEnv)
        return {**found, "anew": anew}

    found = asyncio.run(story())
    critical = ks_critical(2 * PROMPTS, alpha=0.001)
    distances = {how: ks_distance(found[""], found[how]) for how in ("abort", "lose", "anew")}
    print(distances, critical)
    assert max(distances["abort"], distances["lose"]) < critical < distances["anew"]
