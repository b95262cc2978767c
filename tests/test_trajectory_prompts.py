"""The prompt ledger behind POST /draws: what is handed out again, how often, and what is told."""

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trajectory_parts import Http, environment, group, with_service

from atropos_hpc.contracts.prompts import DrawRequest, Reported
from atropos_hpc.trajectories.prompts import FAILURES, LOSSES, Stream


async def draw(http: Http, worker: str, want: int = 0, **more: Any) -> list[int]:
    member = worker.partition("/")[0]
    body = {"stream": "env", "worker": worker, "member": member, "env_id": 0, "want": want}
    return list((await http.post("/draws", body | {"serial": next(SERIALS)} | more))["numbers"])


SERIALS = iter(range(1, 10_000))


def report(number: int, outcome: str) -> dict[str, Any]:
    return {"reports": [{"number": number, "outcome": outcome}]}


def drawn_group(number: int, text: str = "a") -> dict[str, Any]:
    params = {"group_id": text, "draw": {"stream": "env", "number": number, "item": "x"}}
    return group(number, generation_params=params)


async def counts(http: Http) -> dict[str, Any]:
    found = (await http.get("/status"))["prompts"]["env"]
    return {name: value for name, value in found.items() if value is False or value}


def story(tmp_path: Path, tell: Any, **settings: Any) -> None:
    async def begin(http: Http) -> None:
        await http.start()
        await http.post("/register-env", environment(member="a"))
        await tell(http)

    with_service(tmp_path, begin, **settings)


def test_a_prompt_that_always_fails_is_given_up_and_one_that_kills_too(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        for _ in range(FAILURES):
            assert await draw(http, "a/1", 1) == [0]
            await draw(http, "a/1", **report(0, "failed"))
        assert await draw(http, "a/1", 1) == [1]
        for number in range(2, LOSSES + 1):  # a process that replaces another of its member
            assert await draw(http, f"a/{number}", 1) == [1]
        assert await draw(http, "a/last", 1) == [2]
        found = await counts(http)
        assert found == {**{"drawn": 3, "outstanding": 1, "failed": 1, "lost": 1, "ordered": True}}

    story(tmp_path, tell)


def test_equal_scores_count_as_drawn_and_a_refusal_is_tried_again(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        assert await draw(http, "a/1", 2) == [0, 1]
        await draw(http, "a/1", held=[1], **report(0, "no_signal"))
        assert await draw(http, "a/1", 1, **report(1, "refused")) == [2]
        assert await draw(http, "b/1", 1) == [1]

    story(tmp_path, tell)


def test_an_answer_that_was_lost_is_given_again_and_a_requeue_returns_draws(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        assert await draw(http, "a/1", 2) == [0, 1]
        assert await draw(http, "a/1", 2) == [0, 1], "the worker does not hold them"
        assert await draw(http, "a/1", 1, held=[0, 1]) == [2]

    async def later(http: Http) -> None:
        assert await draw(http, "a/1", 1, held=[0, 1, 2]) == [3]
        assert await draw(http, "b/1", 5, attempt=2) == [0, 1, 2, 3, 4]
        assert await draw(http, "a/1", 1, held=[0]) == [], "a worker of the attempt before"

    story(tmp_path, tell)
    with_service(tmp_path, later)


def test_the_first_group_of_a_draw_counts_and_a_worker_believed_lost_goes_on(
    tmp_path: Path,
) -> None:
    async def tell(http: Http) -> None:
        assert await draw(http, "a/1", 2) == [0, 1]
        assert await draw(http, "a/2", 1) == [0]
        await http.send(drawn_group(0, "of the first process"))
        await http.send(drawn_group(0, "of the second process"))
        status = await http.get("/status")
        assert (status["queued_groups"], status["repeated"]) == (1, 1)
        assert await draw(http, "a/2", 1, held=[0, 1]) == [2], "1 was returned, and is held again"
        assert (await counts(http))["outstanding"] == 2

    async def later(http: Http) -> None:
        found = await counts(http)
        assert (found["accepted"], found["drawn"], found["outstanding"]) == (1, 3, 2)

    story(tmp_path, tell)
    with_service(tmp_path, later)


def test_several_groups_of_one_draw_are_kept_when_they_come_together(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        await draw(http, "a/1", 1)
        both = [drawn_group(0, "one"), drawn_group(0, "two")]
        for _ in range(2):
            await http.post("/scored_data_list", both)
        status = await http.get("/status")
        assert (status["queued_groups"], status["repeated"]) == (2, 2)
        assert (await counts(http))["accepted"] == 1

    story(tmp_path, tell)


def test_a_dropped_group_counts_as_drawn(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        await draw(http, "a/1", 1)
        value = drawn_group(0)
        value["generation_params"]["policy_versions"] = [[0, 0]] * 4
        await http.send(value)
        assert await http.lease(0, oldest=5) is None
        assert (await counts(http))["stale"] == 1
        assert await draw(http, "a/1", 1) == [1]

    async def later(http: Http) -> None:
        assert (await counts(http))["stale"] == 1

    story(tmp_path, tell)
    with_service(tmp_path, later)


def test_an_order_that_is_not_deterministic_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def tell(http: Http) -> None:
        await draw(http, "a/1", 1, seen=[{"number": 0, "item": "x"}])
        with caplog.at_level(logging.WARNING):
            for item in ("x", "y", "z"):
                await draw(http, "b/1", 1, seen=[{"number": 0, "item": item}])
        assert (await counts(http))["ordered"] is False
        assert len([r for r in caplog.records if "not deterministic" in r.getMessage()]) == 1
        body = {"stream": "other", "worker": "c/1", "member": "c", "env_id": 0}
        await http.post("/draws", body)
        assert (await http.get("/status"))["prompts"]["other"]["ordered"] is True

    story(tmp_path, tell)


def test_the_ledger_survives_the_retirement_of_its_segments(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        for number in range(40):
            assert await draw(http, "a/1", 1, length=16) == [number]
            await http.send(drawn_group(number))
            if number % 2:
                assert await http.lease(number // 2) is not None
                await http.post(f"/ack?batch={number // 2}")

    async def later(http: Http) -> None:
        assert len(list(tmp_path.glob("*.journal"))) < 5
        found = await counts(http)
        assert (found["drawn"], found["accepted"], found["epoch"]) == (40, 40, 2)
        assert await draw(http, "a/1", 1) == [40]

    story(tmp_path, tell, segment_bytes=2000)
    with_service(tmp_path, later, segment_bytes=2000)


def test_a_malformed_request_is_refused(tmp_path: Path) -> None:
    async def tell(http: Http) -> None:
        for wrong in ({"want": -1}, {"stream": ""}, {"reports": [{"number": 0, "outcome": "?"}]}):
            body = {"stream": "env", "worker": "a/1", "member": "a", "env_id": 0} | wrong
            status, answer = await http.raw("POST", "/draws", body)
            assert status == 422, json.loads(answer)

    story(tmp_path, tell)


class Unscanned(dict[int, str]):
    """A dict that is looked up only."""

    def __iter__(self) -> Any:
        raise AssertionError("a request scans the draws of all workers")

    keys = values = items = __iter__  # type: ignore[assignment]


def test_a_request_does_not_scan_the_draws_of_other_workers() -> None:
    def request(**values: Any) -> DrawRequest:
        return DrawRequest(stream="env", worker="a", member="a", env_id=0, **values)

    stream = Stream(next_number=5, outstanding={0: "a", 1: "b", 3: "a", 4: "b"}, returned={2})
    stream = msgspec.json.decode(msgspec.json.encode(stream), type=Stream)  # as by a restart
    stream.outstanding = Unscanned(stream.outstanding)
    again = request(serial=1, want=2, held=[3], reports=[Reported(0, "no_signal")])
    numbers = stream.choose(again, set())
    stream.request(again, numbers)
    assert (numbers, stream.held_by("a"), stream.lowest) == ([2, 5], {2, 3, 5}, 1)
    stream.accept(1)
    stream.give_back(["a"], as_lost=False)
    assert (stream.held_by("a"), stream.returned, stream.lowest) == (set(), {2, 3, 5}, 2)
