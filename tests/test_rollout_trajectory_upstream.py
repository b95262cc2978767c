"""Atropos' own trajectory server as a member of a run, and the learner's client to it."""

import json
import urllib.error
import urllib.request

import pytest
from trajectory_parts import environment, group, make_run, member, numbers, server_process

from atropos_hpc.contracts.messages import Registration
from atropos_hpc.trajectories.client import UpstreamClient

pytest.importorskip("atroposlib")
pytestmark = pytest.mark.vllm


def request(run, method, path, body=None, token=None):
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {token}"} if token else {}
    )
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(member(run)["url"] + path, data, headers, method=method),
            timeout=30,
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, None


def test_batches_of_atropos_own_server_reach_the_learner_as_groups(tmp_path, caplog):
    run = make_run(tmp_path / "run")
    with server_process(run, module="atropos_compat") as process:
        token = run.token()
        assert request(run, "GET", "/status")[0] == 401
        assert request(run, "GET", "/health") == (200, {"status": "ok"})
        client = UpstreamClient(lambda: member(run)["url"], token, patience_s=10.0)
        client.register(Registration(8, max_token_len=64, num_steps=10, vocab_size=1000))
        assert client.lease(0, 0, 1, oldest=0, version=0, wait_s=0) is None
        assert request(run, "POST", "/register-env", environment(), token)[1]["env_id"] == 0
        for number, version in ((1, 3), (2, 0)):
            assert (
                request(run, "POST", "/scored_data", group(number, version=version), token)[0]
                == 200
            )
        assert client.status().queue_size == 2
        groups = client.lease(0, 0, 1, oldest=2, version=2, wait_s=10)
        assert numbers(groups) == [1] and "older than 2" in caplog.text
        assert groups[0].policy_versions == [(3, 4)] * 4
        assert client.lease(0, 0, 1, oldest=2, version=2, wait_s=0) is groups, (
            "the same batch, asked for again"
        )
        assert client.lease(1, 0, 1, oldest=2, version=2, wait_s=0) is None
        client.ack(0)
        with pytest.raises(ValueError, match="serves one trainer rank, not 2"):
            client.lease(1, 0, 2, oldest=0, version=1, wait_s=0)
        process.terminate()
        assert process.wait(20) == 0
    assert member(run)["state"] == "ended"
