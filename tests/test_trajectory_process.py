"""The server as a process of a run, and the learner's client to it: kills, restarts, absences."""

import http.client
import json
import signal
import socket
import threading
import time

import pytest
from trajectory_parts import environment, group, make_run, member, numbers, server_process

from atropos_hpc.contracts.messages import Registration
from atropos_hpc.trajectories.client import ServerRefused, TrajectoryClient
from atropos_hpc.trajectories.server import listen


def client_of(run, patience_s=30.0):
    return TrajectoryClient(lambda: member(run).get("url"), run.token(), patience_s)


def post(run, path, body):
    """One POST, without patience. Raises OSError or HTTPException if it is not answered."""
    url = member(run).get("url")
    if url is None:
        raise ConnectionError("no server yet")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(
            "POST", path, json.dumps(body), {"Authorization": f"Bearer {run.token()}"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return json.loads(response.read())
    finally:
        connection.close()


def deliver(run, value):
    """Send a group as environments do: again and again until it is answered."""
    while True:
        try:
            return post(run, "/scored_data", value)
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)


def register(client, batch_size=8, starting_step=0):
    client.register(
        Registration(
            batch_size,
            max_token_len=64,
            starting_step=starting_step,
            num_steps=100,
            vocab_size=100_000,
        )
    )


def test_a_life_of_a_server(tmp_path):
    run = make_run(tmp_path / "run")
    with server_process(run) as process:
        first = member(run)
        client = client_of(run)
        register(client)
        assert client.lease(0, 0, 1, oldest=0, version=0, wait_s=0) is None
        assert post(run, "/register-env", environment())["env_id"] == 0
        for number in range(3):
            deliver(run, group(number))
        assert numbers(client.lease(0, 0, 1, oldest=0, version=0, wait_s=5)) == [0, 1]
        deadline = time.monotonic() + 20
        while member(run)["queued_groups"] != 1:
            assert time.monotonic() < deadline, "the depth is told in the rendezvous"
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert member(run)["state"] == "ended"
    with server_process(run):
        assert member(run)["url"] == first["url"], "the port is kept"
        assert numbers(client.lease(0, 0, 1, oldest=0, version=0, wait_s=5)) == [0, 1]
        client.ack(0)
        with pytest.raises(ServerRefused) as refused:
            client.lease(0, 0, 1, oldest=0, version=0, wait_s=5)
        assert refused.value.status == 410
        assert client.status().queued_groups == 1
    taken = socket.create_server(("127.0.0.1", int(first["url"].rpartition(":")[2])))
    with server_process(run):
        assert member(run)["url"] != first["url"], "another port, when that one is taken"
        assert client.status().next_batch == 1
    taken.close()


def test_a_damaged_record_of_the_port_keeps_no_server_down(tmp_path):
    run = make_run(tmp_path / "run")
    (run.members / "trajectories-local-0.json").write_text('{"url": "http://127.0')
    with listen(run, "trajectories-local-0", "127.0.0.1") as listening:
        assert listening.getsockname()[1] > 0


def test_term_ends_a_server_at_once_though_leases_wait(tmp_path):
    run = make_run(tmp_path / "run")
    with server_process(run) as process:
        client = client_of(run)
        register(client)
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                client.call("GET", "/lease?batch=0&rank=0&world=1&wait=50", wait_s=50)
            )
        )
        waiting.start()
        time.sleep(0.5)  # it waits now
        process.send_signal(signal.SIGTERM)
        waiting.join(20)
        assert process.wait(20) == 0
        assert [answer.status for answer in answers] == [204]


def test_killed_under_load_nothing_answered_is_lost_or_doubled(tmp_path):
    """Four senders, a learner, and a server that is killed again and again.

    Each group ends in exactly one batch, and batches never change.
    """
    run = make_run(tmp_path / "run")
    senders, each, batch_size = 4, 60, 8
    batches, failures = {}, []

    def send(sender):
        try:
            for index in range(each):
                deliver(run, group(sender * 1000 + index, env_id=None))
        except BaseException as error:
            failures.append(error)

    def learn():
        try:
            client = client_of(run, patience_s=30.0)
            register(client, batch_size)
            for batch in range(senders * each * 4 // batch_size):
                for _ in range(2):  # asked twice, it is the same, whatever lies between
                    while (
                        groups := client.lease(batch, 0, 1, oldest=0, version=batch, wait_s=5)
                    ) is None:
                        pass
                    assert batches.setdefault(batch, numbers(groups)) == numbers(groups)
                if batch % 10 == 9:
                    client.ack(batch - 5)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=send, args=(sender,), daemon=True) for sender in range(senders)
    ]
    threads.append(threading.Thread(target=learn, daemon=True))
    for thread in threads:
        thread.start()
    for progress in (3, 25, 50, 75, 100):
        with server_process(run) as process:
            while len(batches) < progress and not failures:
                time.sleep(0.001)
            process.kill()
    with server_process(run):
        for thread in threads:
            thread.join(60)
    assert not failures, failures
    taken = [number for batch in batches.values() for number in batch]
    assert sorted(taken) == sorted(
        sender * 1000 + index for sender in range(senders) for index in range(each)
    )


def test_an_absent_server_is_waited_for_and_named(tmp_path):
    run = make_run(tmp_path / "run")
    client = client_of(run, patience_s=0.3)
    absent = "for an answer to GET /status from the trajectory server.*not in the roster"
    with pytest.raises(TimeoutError, match=absent):
        client.status()
    closed = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    with pytest.raises(TimeoutError, match=rf"POST /ack\?batch=3.*{url}.*ClientConnectorError"):
        TrajectoryClient(lambda: url, "token", 0.3).ack(3)


def test_a_wrong_token_is_an_answer_not_an_absence(tmp_path):
    run = make_run(tmp_path / "run")
    with server_process(run), pytest.raises(ServerRefused) as refused:
        TrajectoryClient(lambda: member(run)["url"], "wrong", 30.0).status()
    assert refused.value.status == 401


def test_a_damaged_journal_ends_the_server_and_says_where(tmp_path):
    run = make_run(tmp_path / "run")
    with server_process(run):
        register(client_of(run))
        for number in range(3):
            deliver(run, group(number))
    journal = run.trajectories / "00000000.journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with pytest.raises(AssertionError, match="is damaged at byte"), server_process(run):
        pass
    assert "damaged at byte" in member(run)["error"] and member(run)["state"] == "ended"
