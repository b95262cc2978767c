"""Bodies: their encodings and limits, and what is said of those that are refused."""

import asyncio
import gzip
import json
import zlib

from trajectory_parts import TOKEN, group, numbers, with_service

from atropos_hpc.trajectories.http_body import CONCURRENT_BODIES


def test_gzipped_bodies(tmp_path):
    async def story(http):
        async def send(body, encoding="gzip"):
            return await http.raw("POST", "/scored_data", body, {"Content-Encoding": encoding})

        whole = gzip.compress(json.dumps(group(1)).encode())
        assert (await send(whole))[0] == 200
        assert (await send(whole[:-5]))[0] == 400
        assert (await send(b"not gzip"))[0] == 400
        assert (await send(whole, "br"))[0] == 415
        assert (await send(json.dumps(group(2)).encode(), "identity"))[0] == 200
        assert (await http.get("/status"))["queue_size"] == 2

    with_service(tmp_path, story)


def test_a_gzip_bomb_stops_at_the_limit(tmp_path):
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(deflate.compress(b" " * 10_000_000) for _ in range(10)) + deflate.flush()

    async def story(http):
        status, answer = await http.raw("POST", "/scored_data", bomb, {"Content-Encoding": "gzip"})
        assert status == 413 and b"inflates to more than 1000000 bytes" in answer

    with_service(tmp_path, story, max_body_bytes=500_000)


def test_a_body_over_the_limit_is_a_413(tmp_path):
    async def story(http):
        status, answer = await http.raw("POST", "/scored_data", b" " * 10_001)
        assert status == 413 and b"max_body_bytes" in answer

        async def in_pieces():
            for _ in range(11):
                yield b" " * 1000

        response = await http.client.post(
            "/scored_data", data=in_pieces(), headers={"Authorization": f"Bearer {TOKEN}"}
        )
        assert response.status == 413

    with_service(tmp_path, story, max_body_bytes=10_000)


def test_refusals_are_json_and_counted_and_leave_nothing_behind(tmp_path):
    async def story(http):
        await http.start(8, max_token_len=10, vocab_size=20)
        for bad, field in [
            (group(1, length=11), "tokens"),
            (group(20), "tokens"),
            (group(1, scores=[float("nan")] * 4), "scores"),
            (group(1, masks=[[3] * 6] * 4), "masks"),
        ]:
            status, answer = await http.raw("POST", "/scored_data", bad)
            assert status == 422 and json.loads(answer)["detail"].startswith(field)
            assert (await http.raw("POST", "/scored_data_list", [group(2), bad]))[0] == 422
        status = await http.get("/status")
        assert (status["queue_size"], status["refused"]) == (0, 8)
        assert (await http.raw("POST", "/status"))[0] == 405

    with_service(tmp_path, story)


def test_more_bodies_at_once_than_memory_allows_are_sent_again_later(tmp_path):
    async def story(http):
        half_sent, go_on = asyncio.Event(), asyncio.Event()

        async def slowly():
            yield b" " * 19_500
            half_sent.set()
            await go_on.wait()
            yield json.dumps(group(1)).encode()

        slow = [
            asyncio.ensure_future(http.raw("POST", "/scored_data", slowly()))
            for _ in range(CONCURRENT_BODIES)
        ]
        await half_sent.wait()
        large = json.dumps(group(2)).encode() + b" " * 15_000
        while (refused := await http.raw("POST", "/scored_data", large))[
            0
        ] == 200:  # until all of them are being read
            pass
        assert refused[0] == 429 and b"send it again later" in refused[1]
        go_on.set()
        assert [status for status, _ in await asyncio.gather(*slow)] == [200] * CONCURRENT_BODIES
        assert (await http.raw("POST", "/scored_data", group(3)))[0] == 200

    with_service(tmp_path, story, max_body_bytes=20_000)


def test_a_full_queue_takes_no_more_until_some_are_trained_on(tmp_path):
    async def story(http):
        await http.start(4)
        await http.send(group(1), group(2))
        status, answer = await http.raw("POST", "/scored_data", group(3))
        assert status == 503 and b"2 groups wait" in answer
        assert numbers(await http.lease(0)) == [1]
        await http.send(group(3))

    with_service(tmp_path, story, max_queued=2)
