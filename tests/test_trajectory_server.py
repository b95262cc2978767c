"""The routes, over real HTTP: Atropos' own, with its shapes, and the learner's leases."""

import asyncio
import base64
import errno
import gzip
import itertools
import json
import os
import random
import zlib

import pytest
from trajectory_parts import TOKEN, environment, group, numbers, registration, with_service

from atropos_hpc.trajectories.client import groups_of
from atropos_hpc.trajectories.journal import Damaged

ROUTES = [
    *(("GET", path) for path in ("/", "/info", "/wandb_info", "/status", "/latest_example", "/status-env", "/reset_data", "/batch")),
    *(("POST", path) for path in ("/register", "/register-env", "/disconnect-env", "/scored_data", "/scored_data_list", "/ack?batch=0")),
    ("GET", "/lease?batch=0&rank=0&world=1"),
    ("GET", "/no-such-route"),
]


def basic(password):
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


# --- who may ask


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Digest {TOKEN}", basic("wrong"), "Basic ???"])
def test_no_route_but_health_answers_without_the_token(tmp_path, header):
    async def story(http):
        for method, path in ROUTES:
            status, body = await http.raw(method, path, b"{}", {"Authorization": header})
            assert status == 401 and b"token is needed" in body, path
        assert (await http.raw("GET", "/health", headers={"Authorization": header}))[0] == 200

    with_service(tmp_path, story)


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN)])
def test_the_token_opens_as_bearer_and_as_basic_password(tmp_path, header):
    async def story(http):
        assert (await http.raw("GET", "/status", headers={"Authorization": header}))[0] == 200

    with_service(tmp_path, story)


# --- Atropos' own protocol


def test_before_a_trainer_registers(tmp_path):
    async def story(http):
        assert await http.get("/") == {"message": "AtroposLib API"}
        assert await http.get("/info") == {"batch_size": -1, "max_token_len": -1}
        assert await http.get("/wandb_info") == {"group": None, "project": None}
        status = await http.get("/status")
        assert (status["current_step"], status["queue_size"]) == (0, 0)
        assert (await http.get("/latest_example"))["tokens"] == []
        batch = await http.get("/batch")
        assert (batch["status"], batch["batch"]) == ("error", [])
        assert await http.post("/register-env", environment()) == {"status": "wait for trainer to start"}
        await http.send(group(1))  # taken, and kept for the trainer that comes
        await http.post("/register", registration(4))
        assert len((await http.get("/batch"))["batch"]) == 1

    with_service(tmp_path, story)


def test_a_trainer_and_an_environment_of_atropos(tmp_path):
    async def story(http):
        assert type((await http.post("/register", registration(8)))["uuid"]) is int
        assert await http.get("/info") == {"batch_size": 8, "max_token_len": 100}
        assert await http.get("/wandb_info") == {"group": "group", "project": "project"}
        assert await http.post("/register-env", environment()) == {"status": "wait for trainer to start"}
        assert await http.get("/batch") == {"batch": None}
        first = await http.post("/register-env", environment())
        assert first == {
            "status": "success",
            "env_id": 0,
            "wandb_name": "env_0",
            "checkpoint_dir": "checkpoints",
            "starting_step": 0,
            "checkpoint_interval": 5,
            "num_steps": 50,
        }
        assert (await http.post("/register-env", environment()))["wandb_name"] == "env_1"
        await http.send(group(1, env_id=0))
        listed = await http.post("/scored_data_list", [group(2, env_id=0), group(3, env_id=1)])
        assert listed == {"status": "received", "groups_processed": 2}
        status = await http.get("/status-env", {"env_id": 0})
        expected = {"current_step": 0, "queue_size": 3, "self_queue_size": 2, "max_group_size": 4, "unallocated_fraction": 1.0}
        assert expected.items() <= status.items() and status["env_weight"] == 0.5
        assert json.loads((await http.raw("GET", "/latest_example"))[1])["tokens"] == group(3)["tokens"]
        batch = (await http.get("/batch"))["batch"]
        assert [{name: value for name, value in one.items() if value is not None} for one in batch] == [
            group(1, env_id=0),
            group(2, env_id=0),
        ]
        assert (await http.get("/status"))["current_step"] == 1
        assert await http.post("/disconnect-env", {"env_id": 1}) == {"status": "success"}
        assert (await http.post("/disconnect-env", {"env_id": 9}))["status"] == "failure"
        assert (await http.get("/status-env", {"env_id": 0}))["env_weight"] == 1.0
        assert (await http.raw("GET", "/status-env", {"env_id": 9}))[0] == 404
        status, text = await http.raw("GET", "/reset_data")
        assert (status, text) == (200, b"Reset successful")
        assert (await http.get("/info"))["batch_size"] == -1
        assert (await http.get("/status"))["queue_size"] == 0

    with_service(tmp_path, story)


def test_asking_for_the_next_batch_acknowledges_the_one_before(tmp_path):
    async def take(http):
        batch = (await http.get("/batch"))["batch"]
        return batch and batch[0]["tokens"][0][0]

    async def story(http):
        await http.post("/register", registration(4))
        await http.send(*(group(number) for number in range(1, 4)))
        assert await take(http) == 1
        assert await take(http) == 2

    async def later(http):  # whether batch 1 reached the trainer is not known: it is given again
        assert await take(http) == 2
        assert await take(http) == 3
        assert await take(http) is None

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_registering_again_updates_and_keeps_the_queue(tmp_path):
    async def story(http):
        await http.start(8)
        await http.send(group(1))
        await http.post("/register", registration(4))
        assert (await http.get("/info"))["batch_size"] == 4
        assert numbers(await http.lease(0)) == [1]
        status, body = await http.raw("POST", "/register", registration(0))
        assert status == 422 and b"batch_size" in body
        status, body = await http.raw("POST", "/register", {"batch_size": "many"})
        assert status == 422 and b"batch_size" in body

    with_service(tmp_path, story)


def test_a_member_that_registers_again_keeps_its_id(tmp_path):
    async def story(http):
        await http.start()
        assert (await http.post("/register-env", environment("a", member="m1")))["env_id"] == 0
        assert (await http.post("/register-env", environment("a", member="m2")))["env_id"] == 1
        again = await http.post("/register-env", environment("a", member="m1", weight=3.0))
        assert (again["env_id"], again["wandb_name"]) == (0, "a_0")
        assert (await http.get("/status-env", {"env_id": 0}))["env_weight"] == 0.75

    async def later(http):
        assert (await http.post("/register-env", environment("a", member="m2")))["env_id"] == 1
        assert (await http.post("/register-env", environment("a")))["env_id"] == 2
        await http.get("/status-env", {"env_id": 1, "in_flight": 12})
        status = await http.get("/status-env", {"env_id": 0, "in_flight": 3})
        assert (status["others_in_flight"], status["batch_size"], status["formed"], status["queued_sequences"]) == (12, 8, 0, 0)

    with_service(tmp_path, story)
    with_service(tmp_path, later)


# --- leases


def test_leases_are_numbered_and_repeatable_and_end_with_the_ack(tmp_path):
    async def refused(http, path, method="GET"):
        status, body = await http.raw(method, path)
        return status, json.loads(body)["detail"]

    async def story(http):
        assert (await refused(http, "/lease?batch=0&rank=0&world=1"))[0] == 409
        await http.start(8)
        await http.send(*(group(number) for number in range(5)))
        first = await http.lease(0)
        assert numbers(first) == [0, 1] and [g.gid for g in first] == [0, 1]
        assert numbers(await http.lease(1)) == [2, 3]
        assert await http.lease(2) is None
        assert numbers(await http.lease(0)) == [0, 1]
        assert await refused(http, "/lease?batch=4&rank=0&world=1") == (409, "the next batch is 2, not 4")
        assert (await refused(http, "/lease?batch=x&rank=0&world=1"))[0] == 422
        assert (await refused(http, "/lease?batch=0&rank=1&world=1"))[0] == 422
        assert (await refused(http, "/ack?batch=2", "POST"))[0] == 409
        for _ in range(2):
            assert (await http.post("/ack?batch=0"))["status"] == "ok"
        assert (await refused(http, "/lease?batch=0&rank=0&world=1"))[0] == 410
        assert numbers(await http.lease(1)) == [2, 3]

    with_service(tmp_path, story)


def test_ranks_share_a_batch_without_overlap(tmp_path):
    async def story(http):
        await http.start(16)
        await http.send(*(group(number, length=6 + number) for number in range(4)))
        shares = [numbers(await http.lease(0, rank=rank, world=3)) for rank in range(3)]
        assert sorted(number for share in shares for number in share) == [0, 1, 2, 3]
        assert all(shares) and shares == [numbers(await http.lease(0, rank=rank, world=3)) for rank in range(3)]
        assert [len(await http.lease(0, rank=rank, world=5)) for rank in range(5)] == [1, 1, 1, 1, 0]

    with_service(tmp_path, story)


def test_a_lease_waits_for_the_group_that_completes_it(tmp_path):
    async def story(http):
        await http.start(8)
        await http.send(group(1))
        waiting = [asyncio.ensure_future(http.lease(0, rank=rank, world=2, wait=30)) for rank in range(2)]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in waiting)
        await http.send(group(2))
        assert sorted(numbers([g for share in await asyncio.gather(*waiting) for g in share])) == [1, 2]

    with_service(tmp_path, story)


def test_stale_groups_are_dropped_when_a_batch_is_formed_and_not_later(tmp_path):
    async def story(http):
        await http.start(8)
        await http.send(group(1, version=0), group(2, version=3), group(3), group(4, version=2))
        formed = await http.lease(0, oldest=2)
        assert numbers(formed) == [2, 3]
        assert formed[0].policy_versions == [(3, 4)] * 4 and formed[1].policy_versions == [None] * 4
        status = await http.get("/status")
        assert (status["stale"], status["stale_sequences"], status["queued_groups"]) == (1, 4, 1)
        assert numbers(await http.lease(0, oldest=99)) == [2, 3]

    async def later(http):
        status = await http.get("/status")
        assert (status["stale"], status["queued_groups"], status["formed"]) == (1, 1, 1)
        assert await http.lease(1, oldest=3) is None
        assert (await http.get("/status"))["stale"] == 2

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_the_oldest_version_of_a_group_counts(tmp_path):
    async def story(http):
        await http.start(2)
        versions = [[5, 6], [1, 6]]
        await http.send(group(1, 2, generation_params={"policy_versions": versions}), group(2, 2, version=5))
        assert numbers(await http.lease(0, oldest=2)) == [2]

    with_service(tmp_path, story)


def test_a_resumed_learner_begins_at_its_step_with_an_empty_journal(tmp_path):
    async def story(http):
        await http.start(4, starting_step=7)
        await http.send(group(1))
        assert (await http.raw("GET", "/lease?batch=0&rank=0&world=1"))[0] == 410
        assert numbers(await http.lease(7)) == [1]
        assert (await http.get("/status"))["current_step"] == 8

    with_service(tmp_path, story)


def test_the_queue_counts_until_the_learner_has_moved_on(tmp_path):
    async def story(http):
        await http.start(4)
        await http.post("/register-env", environment())
        await http.send(group(1, env_id=0), group(2, env_id=0))
        await http.lease(0)
        assert (await http.get("/status-env", {"env_id": 0}))["queue_size"] == 2
        await http.lease(1, version=0)  # ahead of need
        assert (await http.get("/status-env", {"env_id": 0}))["queue_size"] == 2
        await http.lease(1, version=1)
        assert (await http.get("/status-env", {"env_id": 0}))["queue_size"] == 1

    with_service(tmp_path, story)


# --- what survives


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
        both = await asyncio.gather(*(http.post("/scored_data", group(1, env_id=number)) for number in range(2)))
        assert both == [{"status": "received"}] * 2
        assert await http.post("/scored_data_list", [group(1), group(2), group(2)]) == {"status": "received", "groups_processed": 3}
        status = await http.get("/status")
        assert (status["queue_size"], status["repeated"]) == (3, 2)  # two equal ones of one body are two

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
        batch = (await http.get("/status"))["formed"]
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

    async def again(http):  # the groups of segments that are gone are still known when they are sent once more
        await http.send(group(0), group(59))
        status = await http.get("/status")
        assert (status["queue_size"], status["repeated"]) == (0, 2)

    with_service(tmp_path, again)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_is_replayed_to_the_state_it_left(tmp_path, seed):
    """Random requests, with small segments and restarts between: memory after a replay is memory before it."""
    dice = random.Random(seed)
    state = {}

    def what_must_survive(ledger):
        return ledger.snapshot() | {"version": None, "known": list(ledger.known), "live": ledger.live}  # the version is told again

    async def story(http):
        ledger = http.service.ledger
        if state:
            assert what_must_survive(ledger) == state["left"]
        live = {item.place.segment for item in (*ledger.queue.values(), *itertools.chain(*ledger.batches.values()))}
        there = {int(path.stem) for path in tmp_path.glob("*.journal")}
        assert live <= there and len(there - live) <= 1, "dead segments are unlinked, but for the one that is written to"
        await http.post("/register", registration(8, starting_step=max(0, ledger.formed - 3)))
        for _ in range(40):
            request = dice.random()
            if request < 0.6:
                version = dice.choice([None, ledger.formed, max(0, ledger.formed - 2)])
                await http.send(group(dice.randrange(400), dice.choice([1, 3, 4, 4, 4]), version=version, env_id=dice.choice([None, 0])))
            elif request < 0.8:
                await http.lease(ledger.formed, oldest=max(0, ledger.formed - 1))
            elif request < 0.9 and ledger.formed:
                await http.post(f"/ack?batch={dice.randrange(ledger.formed)}")
            elif request < 0.95 and ledger.started:
                await http.post("/register-env", environment(dice.choice("ab"), member=dice.choice([None, "x", "y"])))
        state["left"] = what_must_survive(ledger)

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
            for path, body in (("/scored_data", group(2)), ("/register", registration(4)), ("/ack?batch=0", None)):
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


# --- bodies


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

        response = await http.client.post("/scored_data", data=in_pieces(), headers={"Authorization": f"Bearer {TOKEN}"})
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
