"""Published files equal the weights at the moment of the call, and transformers loads them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from learner_ranks import (  # noqa: E402
    VOCABULARY,
    make_groups,
    on_ranks,
    settings_of,
    tiny_model,
    write_shards,
)
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.policy import shard_buffer as buffer_module  # noqa: E402
from atropos_hpc.policy import shard_writer as writer_module  # noqa: E402
from atropos_hpc.policy.manifest import file_digest  # noqa: E402
from atropos_hpc.policy.shard_writer import PublishFailed  # noqa: E402
from atropos_hpc.policy.snapshot import snapshot  # noqa: E402


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & tensors.keys(), "each tensor stands in one file"
        tensors |= part
    return tensors


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained_and_published(
    rank: int, world: int, path: Path, directory: Path, dtype: torch.dtype
) -> Any:
    backend = VerlBackend(
        ModelConf(path=str(path), dtype="float32"),
        TrainerConf(learning_rate=0.1),
        AlgorithmConf(kl_coef=0),
        0,
        False,
    )
    batch = make_batch(make_groups()[rank::world], settings_of(), 0)
    batch.set_old_log_probs(backend.log_probs(batch))
    backend.update(batch, 0)
    backend.log_probs(batch)  # a forward alone leaves the root module's parameters whole
    shot = snapshot(backend.module, dtype)
    weights = {name: full(tensor) for name, tensor in backend.module.state_dict().items()}
    with torch.no_grad():  # training goes on
        for tensor in backend.module.state_dict().values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
    return weights, write_shards(shot, directory, dist.new_group(backend="gloo"))


@pytest.mark.parametrize(
    "world, tied, dtype",
    [(1, False, torch.bfloat16), (2, True, torch.float32), (2, False, torch.bfloat16)],
)
def test_transformers_loads_what_was_published(
    tmp_path: Path, world: int, tied: bool, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    model, directory = tiny_model(tmp_path / "model", tied), tmp_path / "policy" / "1-1"
    results = on_ranks(world, trained_and_published, model, directory, dtype)
    weights, files = results[0]
    tensors = stored(directory)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "again")
    assert tensors.keys() == stored(tmp_path / "again").keys(), (
        "the names that save_pretrained gives"
    )
    assert ("lm_head.weight" in tensors) != tied
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, weights[name].to(dtype)), name
    initial = stored(model)
    assert not torch.equal(
        initial["model.embed_tokens.weight"].to(dtype), tensors["model.embed_tokens.weight"]
    ), "the model has learnt"
    shutil.copy(model / "config.json", directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name].to(dtype)), name

    assert all(rank_files == files for _, rank_files in results), "every rank learns of every file"
    index = json.loads((directory / writer_module.INDEX).read_text())["weight_map"]
    assert sorted(index) == sorted(tensors)
    assert len(files) == world and sorted(f.file for f in files) == sorted(
        p.name for p in directory.glob("*.safetensors")
    )
    for file in files:
        path = directory / file.file
        assert path.stat().st_size == file.bytes and file_digest(path) == file.xxh3


class Odd(nn.Module):
    """Shapes that do not divide by the ranks, one that leaves a rank empty, both buffer kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.randn(7, 3))
        self.single = nn.Parameter(torch.randn(1, 5))
        self.vector = nn.Parameter(torch.randn(3))
        self.large = nn.Parameter(torch.randn(40, 10))
        self.register_buffer("counter", torch.tensor([3, 4]))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)


def odd_published(
    rank: int, world: int, directory: Path, mesh: tuple[int, ...], bucket: int
) -> Any:
    writer_module.BUCKET_BYTES = bucket
    torch.manual_seed(0)
    module = Odd()
    fully_shard(
        module,
        mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :]),
    )
    files = write_shards(snapshot(module, torch.float16), directory, dist.new_group(backend="gloo"))
    return {name: full(tensor) for name, tensor in module.state_dict().items()}, [
        file.bytes for file in files
    ]


@pytest.mark.parametrize("mesh", [(3,), (2, 1), (1, 2)])
@pytest.mark.parametrize("bucket", [1, 1 << 20])
def test_any_shapes_meshes_and_buckets(tmp_path: Path, mesh: tuple[int, ...], bucket: int) -> None:
    world = 1
    for size in mesh:
        world *= size
    weights, _ = on_ranks(world, odd_published, tmp_path, mesh, bucket)[0]
    tensors = stored(tmp_path)
    assert tensors.keys() == weights.keys() == {"odd", "single", "vector", "large", "counter"}
    assert tensors["counter"].tolist() == [3, 4] and tensors["counter"].dtype == torch.int64
    for name in ("odd", "single", "vector", "large"):
        assert torch.equal(tensors[name], weights[name].half())


def published_twice(rank: int, world: int, directory: Path) -> Any:
    module = Odd()
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    writer = writer_module.ShardWriter(dist.new_group(backend="gloo"))
    shot, weights = None, []
    for version in range(3):
        shot = snapshot(module, torch.bfloat16, reuse=shot)
        writer.write_full(directory / str(version), writer.fill(shot))
        weights.append({name: full(tensor) for name, tensor in module.state_dict().items()})
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    begin = writer.shard.buffer.ctypes.data
    return weights, [begin <= p.data_ptr() < begin + writer.shard.size for p in shot.pieces]


def test_a_single_rank_holds_one_copy_of_what_it_publishes(tmp_path: Path) -> None:
    weights, inside = on_ranks(1, published_twice, tmp_path)[0]
    assert all(inside)
    for version, expected in enumerate(weights):
        for name, tensor in stored(tmp_path / str(version)).items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), (version, name)


def copied_twice(rank: int, world: int) -> list[Any]:
    """Return, of a second snapshot into the first one and of a fresh one, where their pieces are,
    and whether these have the same content."""
    torch.manual_seed(0)
    module = Odd()
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    first = snapshot(module, torch.bfloat16)
    places = [piece.data_ptr() for piece in first.pieces]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.to_local().add_(1)  # type: ignore[attr-defined]
    again = snapshot(module, torch.bfloat16, reuse=first)
    fresh = snapshot(module, torch.bfloat16)
    equal = all(map(torch.equal, again.pieces, fresh.pieces))
    reused, new = ([piece.data_ptr() for piece in each.pieces] for each in (again, fresh))
    return [places, reused, new, equal]


def test_a_snapshot_goes_to_the_memory_of_the_one_before() -> None:
    for first, reused, fresh, equal in on_ranks(2, copied_twice):
        assert reused == first and any(first)
        assert not set(filter(None, fresh)) & set(first)
        assert equal


def fails_to_write(rank: int, world: int, directory: Path, public: Path) -> None:
    module = nn.Linear(8, 8)
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    group = dist.new_group(backend="gloo")
    write_shards(snapshot(module), public, group)
    if rank == 1:
        buffer_module.os.fsync = _no_space
    for _ in range(2):  # and it doesn't hang the next one either
        with pytest.raises(PublishFailed, match=r"model-00002-of-00002.*No space left"):
            write_shards(snapshot(module), directory, group)
    with pytest.raises(PublishFailed, match="No space left"):
        write_shards(snapshot(module), public, group)
    dist.barrier()


def _no_space(fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_heard_of_on_all_ranks_and_leaves_what_was_there(tmp_path: Path) -> None:
    """Nothing of a new version, and all files of a public one that is written again."""
    new, public = tmp_path / "new", tmp_path / "public"
    new.mkdir()
    public.mkdir()
    on_ranks(2, fails_to_write, new, public)
    assert os.listdir(new) == []
    assert {tuple(tensor.shape) for tensor in stored(public).values()} == {(8, 8), (8,)}


def experts_published(rank: int, world: int, path: Path, directory: Path) -> None:
    backend = VerlBackend(
        ModelConf(path=str(path), dtype="float32"),
        TrainerConf(),
        AlgorithmConf(kl_coef=0),
        0,
        False,
    )
    write_shards(snapshot(backend.module, torch.float32), directory, dist.new_group(backend="gloo"))


def test_fused_experts_go_back_to_the_names_of_the_files(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    on_ranks(2, experts_published, tmp_path / "model", tmp_path / "policy")
    want, got = stored(tmp_path / "model"), stored(tmp_path / "policy")
    assert any(".experts.3." in name for name in want)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
