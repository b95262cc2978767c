"""A real vLLM server that serves LoRA adapters beside the base."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")
from vllm_servers import PROMPT, Served, serving, tensor_parallel  # noqa: E402

from atropos_hpc.contracts.policy import FileEntry, Manifest  # noqa: E402
from atropos_hpc.policy import lora  # noqa: E402
from atropos_hpc.policy.manifest import file_digest  # noqa: E402
from atropos_hpc.policy.store import PolicyStore  # noqa: E402
from atropos_hpc.policy.weight_update import PushError  # noqa: E402


@pytest.fixture(scope="module")
def served_adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("vllm-adapter"), rank=4) as server:
        yield server


def publish_adapter(server: Served, scale: float) -> dict[str, Any]:
    """Publish and push an adapter; returns its tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    base = load_file(server.base / "model.safetensors")
    tensors = {}
    torch.manual_seed(0)
    for name in base:
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            rows, columns = base[name].shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns) / 4
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4) / 4 * scale
    server.version += 1
    store = PolicyStore(server.run.policy)
    directory = store.begin(server.key)
    save_file(tensors, directory / lora.FILE)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (directory / lora.CONFIG).write_text(
        json.dumps(config | {"target_modules": ["q_proj", "down_proj"]})
    )
    files = []
    for name in (lora.FILE, lora.CONFIG):
        path = directory / name
        files.append(FileEntry(name, path.stat().st_size, file_digest(path)))
    store.commit(Manifest(version=server.key, kind="adapter", files=tuple(files)))
    server.push_directory(directory)
    return tensors


def merged_log_probs(server: Served, tensors: dict[str, Any], tokens: list[int]) -> list[float]:
    """Log-probs of an answer to PROMPT under the base with the adapter merged, by transformers."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = load_file(server.base / "model.safetensors")
    (weights,) = lora.merge([base], tensors, {"r": 4, "lora_alpha": 8})
    model = AutoModelForCausalLM.from_pretrained(server.base, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    ids = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
    logits[:, model.config.eos_token_id] = -torch.inf  # min_tokens keeps it from being sampled
    every = logits.log_softmax(-1)
    return every.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_adapters_are_served_beside_the_base_and_replaced_in_place(served_adapter: Served) -> None:
    seen = []
    for scale in (1.0, -2.0, 0.5):
        tensors = publish_adapter(served_adapter, scale)
        tokens, log_probs, version = served_adapter.greedy()
        assert version == str(served_adapter.key)
        expected = merged_log_probs(served_adapter, tensors, tokens)
        assert log_probs == pytest.approx(expected, abs=1e-4)
        seen.append(log_probs)
    assert seen[0] != pytest.approx(seen[1], abs=1e-3) != pytest.approx(seen[2], abs=1e-3)


def test_workers_on_two_devices_serve_the_same_adapters(
    served_adapter: Served, tmp_path: Path
) -> None:
    with tensor_parallel(served_adapter, tmp_path / "run") as parallel:
        for scale in (1.0, -2.0):
            for server in (served_adapter, parallel):
                publish_adapter(server, scale)
            alone, together = served_adapter.greedy(), parallel.greedy()
            assert together[0] == alone[0] and together[2] == str(parallel.key)
            assert together[1] == pytest.approx(alone[1], abs=1e-5)


def test_a_damaged_adapter_leaves_the_old_one_in_use(served_adapter: Served) -> None:
    publish_adapter(served_adapter, 1.0)
    before, store = served_adapter.greedy(), PolicyStore(served_adapter.run.policy)
    good = store.directory(served_adapter.key)
    bad = served_adapter.run.path / "damaged"
    shutil.copytree(good, bad)
    (bad / lora.FILE).write_bytes((bad / lora.FILE).read_bytes()[:-1] + b"\x7f")
    with pytest.raises(PushError, match="xxh3"):
        served_adapter.push_directory(bad)
    assert served_adapter.greedy() == before
