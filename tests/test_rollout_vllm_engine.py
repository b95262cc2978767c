"""What the weight-transfer engine does in each of vLLM's workers."""

import re
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


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
