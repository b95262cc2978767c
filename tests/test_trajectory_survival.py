"""What a trajectory server still knows after a restart, a lost segment, a full disk."""

import asyncio
import errno
import itertools
import os
import random

import msgspec
import pytest
from trajectory_parts import environment, group, numbers, registration, with_service

from atropos_hpc.trajectories.client import groups_of
from atropos_hpc.trajectories.journal import Damaged


def test_after_a_restart_everything_is_as_it_was(tmp_path):
    before = {}

    async def story(http):
        await http.start(8, vocab_size=500)
        await http.post("/register-env", environment())
        await http.send(*(group(number, env_id=0) for number in range(7)))
        await http.lease(0)
        await http.post("/ack?batch=0")
        before["lease"] = await http.raw("GET", "/lease?batch=1&rank=0&world=1")
        before["status"] = await http.get("/status")
        before["env"] = await http.get("/status-env", {"env_id": 0})

    async def later(http):
        assert await http.get("/status") == before["status"]
        assert await http.get("/status-env", {"env_id": 0}) == before["env"]
        assert await http.raw("GET", "/lease?batch=1&rank=0&world=1") == before["lease"]
        assert numbers(groups_of(bytearray(before["lease"][1]))) == [2, 3]
        assert numbers(await http.lease(2)) == [4, 5]
        assert (await http.raw("POST", "/scored_data", group(500)))[0] == 422

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_a_group_sent_again_counts_once_also_after_a_restart(tmp_path):
    async def story(http):
        await http.start(8)
        both = await asyncio.gather(
            *(http.post("/scored_data", group(1, env_id=number)) for number in range(2))
        )
        assert both == [{"status": "received"}] * 2
        assert await http.post("/scored_data_list", [group(1), group(2), group(2)]) == {
            "status": "received",
            "groups_processed": 3,
        }
        status = await http.get("/status")
        assert (status["queue_size"], status["repeated"]) == (
            3,
            2,
        )  # two equal ones of one body are two

    async def later(http):
        await http.send(group(1), group(2), group(3))
        await http.post("/scored_data_list", [group(1), group(2), group(2)])
        assert (await http.get("/status"))["queue_size"] == 4

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_acknowledged_segments_go_and_the_state_stays(tmp_path):
    """Segments of some groups each, through many batches, with a restart now and then."""
    taken = []

    async def story(http):
        if (await http.get("/info"))["batch_size"] != 8:
            await http.start(8)
            await http.post("/register-env", environment(member="m"))
        batch = (await http.get("/status"))["next_batch"]
        sent = batch * 2
        for _ in range(10):
            await http.send(group(sent), group(sent + 1))
            sent += 2
            taken.extend(numbers(await http.lease(batch)))
            if batch % 5 == 4:
                await http.post(f"/ack?batch={batch - 2}")
            batch += 1
        status = await http.get("/status")
        assert status["unacknowledged"] == 2 and status["queue_size"] == 0
        assert (await http.post("/register-env", environment(member="m")))["env_id"] == 0

    for _ in range(3):
        with_service(tmp_path, story, segment_bytes=3000)
    assert taken == list(range(60))
    segments = sorted(tmp_path.glob("*.journal"))
    assert len(segments) <= 6 and int(segments[-1].stem) > 8

    async def again(
        http,
    ):  # the groups of segments that are gone are still known when they are sent once more
        await http.send(group(0), group(59))
        status = await http.get("/status")
        assert (status["queue_size"], status["repeated"]) == (0, 2)

    with_service(tmp_path, again)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_is_replayed_to_the_state_it_left(tmp_path, seed):
    """Random requests with small segments: a restart leaves the state as it was."""
    dice = random.Random(seed)
    left = {}

    def what_must_survive(state):
        snapshot = msgspec.structs.replace(state.snapshot(), version=None)  # sent again by leases
        return snapshot, list(state.known), state.live.copy()

    async def story(http):
        state = http.service.state
        if left:
            assert what_must_survive(state) == left["state"]
        live = {
            item.place.segment
            for item in (*state.queue.values(), *itertools.chain(*state.batches.values()))
        }
        there = {int(path.stem) for path in tmp_path.glob("*.journal")}
        assert live <= there and len(there - live) <= 1, (
            "dead segments are unlinked, but for the one that is written to"
        )
        await http.post("/register", registration(8, starting_step=max(0, state.next_batch - 3)))
        for _ in range(40):
            request = dice.random()
            if request < 0.6:
                version = dice.choice([None, state.next_batch, max(0, state.next_batch - 2)])
                await http.send(
                    group(
                        dice.randrange(400),
                        dice.choice([1, 3, 4, 4, 4]),
                        version=version,
                        env_id=dice.choice([None, 0]),
                    )
                )
            elif request < 0.8:
                await http.lease(state.next_batch, oldest=max(0, state.next_batch - 1))
            elif request < 0.9 and state.next_batch:
                await http.post(f"/ack?batch={dice.randrange(state.next_batch)}")
            elif request < 0.95 and state.started:
                await http.post(
                    "/register-env",
                    environment(dice.choice("ab"), member=dice.choice([None, "x", "y"])),
                )
        left["state"] = what_must_survive(state)

    for _ in range(6):
        with_service(tmp_path, story, segment_bytes=2500)


def test_a_lost_segment_is_noticed(tmp_path):
    async def story(http):
        await http.start(100)
        for number in range(20):
            await http.send(group(number))

    with_service(tmp_path, story, segment_bytes=3000)
    sorted(tmp_path.glob("*.journal"))[1].unlink()
    with pytest.raises(Damaged, match="groups that are needed are not there"):
        with_service(tmp_path, story)


def test_reset_forgets_also_after_a_restart(tmp_path):
    async def story(http):
        await http.start(4)
        await http.send(group(1), group(2))
        await http.lease(0)
        await http.raw("GET", "/reset_data")

    async def later(http):
        assert (await http.get("/info"))["batch_size"] == -1
        await http.start(4)
        await http.send(group(1))
        assert numbers(await http.lease(0)) == [1]

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_a_full_disk_is_a_503_and_then_passes(tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def story(http):
        await http.start(4)
        await http.send(group(1))
        assert numbers(await http.lease(0)) == [1]
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", no_space)
            for path, body in (
                ("/scored_data", group(2)),
                ("/register", registration(4)),
                ("/ack?batch=0", None),
            ):
                status, answer = await http.raw("POST", path, body)
                assert status == 503 and b"No space left on device" in answer, path
            assert numbers(await http.lease(0)) == [1]
            assert (await http.get("/status"))["queue_size"] == 0
        await http.send(group(2))
        assert numbers(await http.lease(1)) == [2]

    async def later(http):
        assert numbers(await http.lease(0)) == [1] and numbers(await http.lease(1)) == [2]

    with_service(tmp_path, story)
    with_service(tmp_path, later)
