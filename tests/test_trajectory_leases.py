"""The learner's leases, over real HTTP: numbered, repeatable, shared by ranks, and fresh enough."""

import asyncio
import json

from trajectory_parts import environment, group, numbers, registration, with_service

from atropos_hpc.trajectories.pacing import Timeouts


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
        assert await refused(http, "/lease?batch=4&rank=0&world=1") == (
            409,
            "the next batch is 2, not 4",
        )
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
        assert all(shares) and shares == [
            numbers(await http.lease(0, rank=rank, world=3)) for rank in range(3)
        ]
        assert [len(await http.lease(0, rank=rank, world=5)) for rank in range(5)] == [
            1,
            1,
            1,
            1,
            0,
        ]

    with_service(tmp_path, story)


def test_a_lease_waits_for_the_group_that_completes_it(tmp_path):
    async def story(http):
        await http.start(8)
        await http.send(group(1))
        waiting = [
            asyncio.ensure_future(http.lease(0, rank=rank, world=2, wait=30)) for rank in range(2)
        ]
        await asyncio.sleep(0.05)
        assert not any(one.done() for one in waiting)
        await http.send(group(2))
        assert sorted(numbers([g for share in await asyncio.gather(*waiting) for g in share])) == [
            1,
            2,
        ]

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
        assert (status["stale"], status["queued_groups"], status["next_batch"]) == (1, 1, 1)
        assert await http.lease(1, oldest=3) is None
        assert (await http.get("/status"))["stale"] == 2

    with_service(tmp_path, story)
    with_service(tmp_path, later)


def test_the_oldest_version_of_a_group_counts(tmp_path):
    async def story(http):
        await http.start(2)
        versions = [[5, 6], [1, 6]]
        await http.send(
            group(1, 2, generation_params={"policy_versions": versions}), group(2, 2, version=5)
        )
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


def test_a_batch_of_sizes_that_do_not_add_up_comes_a_little_short(tmp_path):
    async def story(http):
        await http.start(8)
        await http.send(*(group(number, 3) for number in range(3)))
        assert numbers(await http.lease(0, wait=20)) == [0, 1]
        assert await http.lease(1, wait=1) is None

    with_service(tmp_path, story, timeouts=Timeouts(quiet_s=0.3))


def test_a_group_that_no_batch_can_hold_is_refused_and_blocks_nothing(tmp_path):
    """In the queue it would use up the quota, while no batch can be formed: a deadlock."""

    async def story(http):
        await http.start(4)
        env = (await http.post("/register-env", environment()))["env_id"]
        report = {"env_id": env, "in_flight": 0, "served_version": 0}
        status, body = await http.raw("POST", "/scored_data", group(0, sequences=6))
        assert status == 422 and "algorithm.batch_size" in json.loads(body)["detail"]
        await http.send(group(1, sequences=4))
        await http.post("/register", registration(2))  # resumed with smaller batches
        assert (await http.get("/status-env", report))["quota"]["groups"] == 0
        assert await http.lease(0) is None
        assert (await http.get("/status-env", report))["quota"]["groups"] == 1

    with_service(tmp_path, story)
