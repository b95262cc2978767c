"""Waits end, and say what was awaited, from whom and for how long."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from manual_clock import Clock

from atropos_hpc.contracts.members import Wait
from atropos_hpc.runtime.http import HttpClient, Request
from atropos_hpc.runtime.waiting import Waiting, WaitTimeout, wait_for


class Shown:
    def __init__(self) -> None:
        self.waits: list[Wait | None] = []

    def show_wait(self, wait: Wait | None) -> None:
        self.waits.append(wait)


def test_a_wait_that_is_over_returns_what_was_found() -> None:
    found = iter([None, None, "it"])
    assert wait_for("it", "someone", lambda: next(found), 10, poll_s=0.001) == "it"


def test_a_wait_in_vain_names_what_and_whom() -> None:
    with pytest.raises(WaitTimeout, match=r"waited 0 s for a sign from nobody, in vain"):
        wait_for("a sign", "nobody", lambda: None, 0.05, poll_s=0.01)


def test_a_wait_is_shown_after_a_second_with_its_deadline_and_removed_at_its_end() -> None:
    shown, clock = Shown(), Clock()
    with Waiting("batch 3", "the trajectory server", 60, shown, clock=clock) as wait:
        wait.check()
        assert shown.waits == []
        clock.now = 2.0
        wait.check()
        wait.check()
        (record,) = shown.waits
        assert record is not None and record.deadline == pytest.approx(record.since + 60)
        assert (record.what, record.from_whom) == ("batch 3", "the trajectory server")
        clock.now = 61.0
        with pytest.raises(WaitTimeout, match="waited 61 s for batch 3"):
            wait.check()
    assert shown.waits[1:] == [None]


def test_a_short_wait_is_never_shown() -> None:
    shown = Shown()
    with Waiting("it", "someone", 60, shown) as wait:
        wait.check()
    assert shown.waits == []


def test_a_request_that_the_server_did_not_receive_in_time_is_sent_again() -> None:
    async def main() -> None:
        statuses = iter([408, 429, 503, 200])

        async def answer(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(status=next(statuses))

        async with RawTestServer(answer) as raw:
            client = HttpClient(lambda: str(raw.make_url("/")), "a-token", patience_s=30)
            assert (await client.send(Request("POST", "/scored_data", b"x"))).status == 200
            await client.close()

    asyncio.run(main())
