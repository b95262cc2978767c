"""What the weight-transfer engine does in each of vLLM's workers."""

import re
from collections import deque
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")


from atropos_hpc.policy import vllm_engine  # noqa: E402


def test_workers_map_a_verified_version_and_do_not_hash_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    from atropos_hpc.contracts.policy import FileEntry, Manifest, PolicyVersion
    from atropos_hpc.policy.manifest import file_digest, write_manifest

    version, name = PolicyVersion(version=1, attempt=1), "model-00001-of-00001.safetensors"
    save_file({"w": torch.arange(16 << 20, dtype=torch.float32)}, tmp_path / name)
    size = (tmp_path / name).stat().st_size
    entry = FileEntry(name, size, file_digest(tmp_path / name))
    write_manifest(tmp_path, Manifest(version=version, kind="full", files=(entry,)))
    hashed: list[int] = []
    digest = vllm_engine.xxhash.xxh3_64_hexdigest
    monkeypatch.setattr(
        vllm_engine.xxhash,
        "xxh3_64_hexdigest",
        lambda data: hashed.append(len(data)) or digest(data),
    )
    before = anonymous_bytes()
    (shard,) = vllm_engine.read_version(tmp_path, version, verified=True)
    assert float(shard["w"].sum()) > 0 and size not in hashed
    (again,) = vllm_engine.read_version(tmp_path, version)
    assert torch.equal(again["w"], shard["w"]) and hashed.count(size) == 1
    assert anonymous_bytes() - before < size / 4


def test_a_call_that_fails_leaves_no_reply_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    from atropos_hpc.rollout.vllm_api import read_every_reply

    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", MultiprocExecutor.collective_rpc)
    read_every_reply()
    sent, replies = deque[str](), [deque[str](), deque[str]()]

    class Replies:
        """What a worker answers; it refuses the call "bad"."""

        def __init__(self, queue: "deque[str]") -> None:
            self.queue = queue

        def dequeue(self, timeout: float | None = None) -> tuple[object, str]:
            call = self.queue.popleft()
            status = WorkerProc.ResponseStatus
            return (status.FAILURE if call == "bad" else status.SUCCESS), call

    class Calls:
        def enqueue(self, request: tuple[str, object, object, int | None]) -> None:
            sent.append(request[0])
            for rank, queue in enumerate(replies):
                if request[3] in (None, rank):
                    queue.append(request[0])

    executor = object.__new__(MultiprocExecutor)
    executor.is_failed, executor.futures_queue = False, deque()
    executor.rpc_broadcast_mq, executor.response_mqs = Calls(), [*map(Replies, replies)]
    with pytest.raises(RuntimeError, match="Worker failed with error 'bad'"):
        executor.collective_rpc("bad")
    assert executor.collective_rpc("good") == ["good", "good"]
    assert executor.collective_rpc("step", unique_reply_rank=1) == "step"
    assert list(sent) == ["bad", "good", "step"] and not any(replies)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
