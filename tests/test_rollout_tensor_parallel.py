"""A real vLLM server of two devices, beside one of one device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_parts import publish_delta

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")

from vllm_servers import PROMPT, REQUESTS, Served, serving, tensor_parallel  # noqa: E402

from atropos_hpc.policy.follower import Follower  # noqa: E402
from atropos_hpc.policy.store import PolicyStore  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """Servers of one device and of two."""
    root = tmp_path_factory.mktemp("tensor-parallel")
    with serving(root) as alone, tensor_parallel(alone, root / "parallel") as parallel:
        yield alone, parallel


def test_full_versions_and_deltas_are_served_as_by_one_device(
    pair: tuple[Served, Served], tmp_path: Path
) -> None:
    """The follower makes the deltas' versions from its copy in memory."""
    followers = [Follower(PolicyStore(s.run.policy), tmp_path, "a test") for s in pair]
    seen = []
    for kind, weights in (("full", "other"), ("full", "base"), ("delta", "other")):
        answers = []
        for server, follower in zip(pair, followers, strict=True):
            new = {"base": server.base, "other": server.other}[weights]
            if kind == "full":
                server.push(new)
                follower.poll()
            else:
                server.version += 1
                files = (server.base / "model.safetensors", new / "model.safetensors")
                publish_delta(server.run, *files, server.version)
                newest = follower.poll()
                assert newest is not None and newest.version == server.key, follower.failure
                server.push_directory(newest.directory)
            answers.append(server.greedy())
        alone, together = answers
        assert together[0] == alone[0] and together[2] == alone[2] == str(pair[1].key)
        assert together[1] == pytest.approx(alone[1], abs=1e-5)
        seen.append(alone[1])
    assert seen[0] != pytest.approx(seen[1], abs=1e-3)
    assert seen[0] == pytest.approx(seen[2], abs=1e-6)
    for follower in followers:
        follower.close()


def test_requests_under_way_keep_their_prefix_over_an_update(pair: tuple[Served, Served]) -> None:
    found = pair[1].update_under_load(pair[1].other, keep_kv=True)
    assert found.lengths == {24} and found.preempted == 0
    assert found.prompt_tokens == REQUESTS * len(PROMPT), "no prompt token was computed again"
