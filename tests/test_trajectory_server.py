"""The routes, over real HTTP: who may ask, and Atropos' own protocol with its shapes."""

import base64
import json

import pytest
from trajectory_parts import TOKEN, environment, group, numbers, registration, with_service

ROUTES = [
    *(
        ("GET", path)
        for path in (
            "/",
            "/info",
            "/wandb_info",
            "/status",
            "/latest_example",
            "/status-env",
            "/reset_data",
            "/batch",
        )
    ),
    *(
        ("POST", path)
        for path in (
            "/register",
            "/register-env",
            "/disconnect-env",
            "/scored_data",
            "/scored_data_list",
            "/ack?batch=0",
        )
    ),
    ("GET", "/lease?batch=0&rank=0&world=1"),
    ("GET", "/no-such-route"),
]


def basic(password):
    return "Basic " + base64.b64encode(f"user:{password}".encode()).decode()


# --- who may ask


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Digest {TOKEN}",
        basic("wrong"),
        "Basic ???",
    ],
)
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
        assert await http.post("/register-env", environment()) == {
            "status": "wait for trainer to start"
        }
        await http.send(group(1))  # taken, and kept for the trainer that comes
        await http.post("/register", registration(4))
        assert len((await http.get("/batch"))["batch"]) == 1

    with_service(tmp_path, story)


def test_a_trainer_and_an_environment_of_atropos(tmp_path):
    async def story(http):
        assert type((await http.post("/register", registration(8)))["uuid"]) is int
        assert await http.get("/info") == {"batch_size": 8, "max_token_len": 100}
        assert await http.get("/wandb_info") == {"group": "group", "project": "project"}
        assert await http.post("/register-env", environment()) == {
            "status": "wait for trainer to start"
        }
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
        expected = {
            "current_step": 0,
            "queue_size": 3,
            "self_queue_size": 2,
            "max_group_size": 4,
            "unallocated_fraction": 1.0,
        }
        assert expected.items() <= status.items() and status["env_weight"] == 0.5
        assert (
            json.loads((await http.raw("GET", "/latest_example"))[1])["tokens"]
            == group(3)["tokens"]
        )
        batch = (await http.get("/batch"))["batch"]
        assert [
            {name: value for name, value in one.items() if value is not None} for one in batch
        ] == [group(1, env_id=0), group(2, env_id=0)]
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
        report = {"in_flight": 4, "served_version": 0}
        assert (await http.get("/status-env", {"env_id": 0}))["quota"] is None
        await http.get("/status-env", {"env_id": 1} | report)
        status = await http.get("/status-env", {"env_id": 0} | report | {"in_flight": 0})
        assert status["batch_size"] == 8
        assert status["quota"] == {"groups": 1, "oldest_version": 0}

    with_service(tmp_path, story)
    with_service(tmp_path, later)
