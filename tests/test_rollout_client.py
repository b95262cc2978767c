"""The pool of servers, against HTTP servers that die, hang, reject, or leave the roster."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from rollout_parts import ANSWER, FakeServer, die, good, hang, list_servers, make_run, status

from atropos_hpc.contracts.messages import (
    GenerateRequest,
    Generation,
    SamplingParams,
    Usage,
    VersionSpan,
)
from atropos_hpc.rollout.sampling_support import sampled
from atropos_hpc.rollout.server_pool import Pool, TokenRefused, decode_answer
from atropos_hpc.rollout.stamping import Sampled, record, record_generations
from atropos_hpc.runtime.run_dir import RunDir

REQUEST = GenerateRequest([1], SamplingParams(), "tokens")
EXPECTED = decode_answer(json.dumps(ANSWER).encode())
EXPECTED.usage = Usage(1, 1, 2)


def on_a_run(test: Callable[[RunDir], Awaitable[None]]) -> Callable[[Path], None]:
    def on_it(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(make_run(tmp_path / "run")), 60))

    return on_it


@on_a_run
async def test_a_request_moves_when_its_server_dies(run: RunDir) -> None:
    async with FakeServer(die) as bad, FakeServer(good) as fine:
        list_servers(run, {bad.url: 1, fine.url: 1})
        pool = Pool(run)
        assert [await pool.post(REQUEST, 10) for _ in range(6)] == [EXPECTED] * 6
        assert bad.served == 1  # after one failure it is suspect, and the other one is preferred
        assert fine.served == 6
        await pool.close()


@on_a_run
async def test_a_silent_server_is_given_up_when_it_leaves_the_roster(run: RunDir) -> None:
    async with FakeServer(hang) as lost, FakeServer(good) as fine:
        list_servers(run, {lost.url: 1})
        pool = Pool(run)
        request = asyncio.create_task(pool.post(REQUEST, 3600))
        while not lost.served:
            await asyncio.sleep(0.01)
        list_servers(run, {fine.url: 1})
        assert await request == EXPECTED
        assert lost.served == 1
        await pool.close()


@on_a_run
async def test_a_new_version_wakes_up_a_worker_without_quota(run: RunDir) -> None:
    list_servers(run, {"http://a": 1})
    pool = Pool(run)
    pool.watch()
    waiting = asyncio.create_task(pool.await_change(3600))
    await asyncio.sleep(0)
    list_servers(run, {"http://a": 2})
    await waiting
    assert pool.served_version() == 2 and not pool.changed.is_set()
    await pool.close()


@on_a_run
async def test_a_worker_that_is_stopped_when_a_version_arrives_stops(run: RunDir) -> None:
    pool = Pool(run)
    for turns in range(3):  # of the event loop, between the version and the stop
        waiting = asyncio.create_task(pool.await_change(3600))
        await asyncio.sleep(0)
        pool.changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():  # else it had returned by then
            await asyncio.wait([waiting], timeout=30)
            assert waiting.cancelled(), turns
    await pool.close()


@on_a_run
async def test_an_empty_roster_is_waited_for(run: RunDir) -> None:
    pool = Pool(run)
    request = asyncio.create_task(pool.post(REQUEST, 30))
    await asyncio.sleep(0.3)
    assert pool.served_version() is None and not request.done()
    async with FakeServer(good) as fine:
        list_servers(run, {fine.url: 4})
        assert await request == EXPECTED
        assert pool.served_version() == 4
        await pool.close()


@on_a_run
async def test_the_deadline_names_the_last_failure(run: RunDir) -> None:
    with socket.socket() as unused:  # bound, but it does not listen
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        list_servers(run, {url: 1})
        pool = Pool(run)
        with pytest.raises(TimeoutError, match=f"within 1 s; last: {url}"):
            await pool.post(REQUEST, 1)
        await pool.close()


@on_a_run
async def test_503_moves_and_400_is_final(run: RunDir) -> None:
    async with (
        FakeServer(status(503)) as paused,
        FakeServer(good) as fine,
        FakeServer(status(400)) as refuses,
    ):
        list_servers(run, {paused.url: 1, fine.url: 1})
        pool = Pool(run)
        assert await pool.post(REQUEST, 10) == EXPECTED
        list_servers(run, {refuses.url: 1})
        while pool.servers != [refuses.url]:
            await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="rejected the request with 400"):
            await pool.post(REQUEST, 10)
        assert refuses.served == 1
        await pool.close()


@on_a_run
async def test_servers_that_all_refuse_the_token_end_the_request_with_that_error(
    run: RunDir,
) -> None:
    async with FakeServer(status(401)) as one, FakeServer(status(403)) as other:
        list_servers(run, {one.url: 1, other.url: 1})
        pool = Pool(run, refusal_s=0)
        with pytest.raises(TokenRefused, match="every vLLM server refuses this run's token"):
            await pool.post(REQUEST, 3600)
        with pytest.raises(TokenRefused):
            await pool.call("/inference/v1/generate", b"", 3600)
        await pool.close()


@on_a_run
async def test_a_server_that_refuses_the_token_is_left_for_one_that_does_not(run: RunDir) -> None:
    for code in (401, 403):
        async with FakeServer(status(code)) as other_run, FakeServer(good) as own:
            list_servers(run, {other_run.url: 1, own.url: 1})
            pool = Pool(run, refusal_s=0)
            assert [await pool.post(REQUEST, 10) for _ in range(3)] == [EXPECTED] * 3
            assert other_run.served == 1
            await pool.close()


@on_a_run
async def test_a_generation_that_a_policy_update_cut_short_is_made_again(run: RunDir) -> None:
    finish = iter(["abort", "abort", "stop"])

    async def cut_short(request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"choices": [{**ANSWER["choices"][0], "finish_reason": next(finish)}]}
        )

    async with FakeServer(cut_short) as server:
        list_servers(run, {server.url: 1})
        pool = Pool(run)
        assert (await pool.post(REQUEST, 10)).choices[0].finish_reason == "stop"
        assert not +pool.outstanding
        await pool.close()


@on_a_run
async def test_least_outstanding_and_cancel_reaches_the_server(run: RunDir) -> None:
    async with FakeServer(hang) as slow, FakeServer(good) as fast:
        list_servers(run, {slow.url: 1, fast.url: 1})
        pool = Pool(run)
        requests = [asyncio.create_task(pool.post(REQUEST, 30)) for _ in range(2)]
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)  # the fast one's
        while not slow.served:
            await asyncio.sleep(0.01)
        for _ in range(5):
            assert await pool.post(REQUEST, 30) == EXPECTED
        assert slow.served == 1
        for request in requests:
            request.cancel()
        while not slow.aborted:
            await asyncio.sleep(0.01)
        assert not +pool.outstanding
        await pool.close()


@on_a_run
async def test_an_unreadable_roster_keeps_the_servers_known(run: RunDir) -> None:
    async with FakeServer(good) as fine:
        list_servers(run, {fine.url: 1})
        pool = Pool(run)
        assert await pool.post(REQUEST, 5) == EXPECTED
        run.roster.write_text("{ not whole")
        await asyncio.sleep(0.3)
        assert await pool.post(REQUEST, 5) == EXPECTED
        await pool.close()


@on_a_run
async def test_every_request_carries_the_run_s_token_and_the_oldest_version_counts(
    run: RunDir,
) -> None:
    async with FakeServer(good) as one, FakeServer(good) as other:
        list_servers(run, {one.url: 3, other.url: 2})
        pool = Pool(run)
        await pool.post(REQUEST, 5)
        await pool.post(REQUEST, 5)
        assert one.tokens | other.tokens == {f"Bearer {run.token()}"}
        assert pool.served_version() == 2
        await pool.close()


def test_generations_are_recorded_with_their_oldest_and_newest_version() -> None:
    spans = [VersionSpan("default", 0, 1), VersionSpan("12-1", 1, 3)]

    async def elsewhere() -> None:
        made = Generation([3, 4, 5], weight_versions=spans)
        record(sampled([made], [1, 2], SamplingParams(temperature=0.7)))

    async def main() -> list[Sampled]:
        with record_generations() as seen:
            await asyncio.create_task(elsewhere())
            record(sampled([Generation([1])], [1], SamplingParams()))
        record([Sampled((9,), (0, 12))])
        return seen

    assert asyncio.run(main()) == [Sampled((3, 4, 5), (0, 12), 0.7, (1, 2))]


def test_options_without_a_value_are_not_sent() -> None:
    sampling = SamplingParams(temperature=0.5, max_tokens=4, logprobs=0)
    assert msgspec.json.encode(GenerateRequest([1], sampling, "tokens")) == (
        b'{"token_ids":[1],"sampling_params":{"temperature":0.5,"max_tokens":4,"logprobs":0},'
        b'"output_mode":"tokens"}'
    )


@on_a_run
async def test_a_request_that_every_server_fails_on_is_not_sent_for_ever(run: RunDir) -> None:
    """As vLLM's tool parser may fail on what a model has written."""
    async with FakeServer(good) as one, FakeServer(good) as other:
        list_servers(run, {one.url: 1, other.url: 1})
        failures: list[str] = []

        async def fail(request: web.Request) -> web.Response:
            failures.append(request.host)
            return web.json_response({"error": "IndexError"}, status=500)

        one.routes["/parse"] = other.routes["/parse"] = fail
        pool = Pool(run)
        assert (await pool.call("/parse", b"{}", 3600))[0] == 500
        assert len(set(failures)) == 2
        await pool.close()
