"""Models, updates and publishing for benches of the policy store."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.contracts.policy import DeltaEntry, FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import delta
from atropos_hpc.policy.shard_buffer import ShardBuffer, TensorSpec, write_shard, xxh3
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime.run_dir import write_file
from bench.parts.models import random_qwen3
from bench.result import Result

HIDDEN, INNER, LAYERS, KEY_VALUE, VOCABULARY = 896, 4864, 24, 128, 151936  # Qwen2.5-0.5B


def half_billion(mesh: Any) -> Any:
    """Make a sharded float32 module of these shapes with random weights."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = (
                nn.Linear(HIDDEN, HIDDEN),
                nn.Linear(HIDDEN, HIDDEN, bias=False),
            )
            self.k_proj, self.v_proj = nn.Linear(HIDDEN, KEY_VALUE), nn.Linear(HIDDEN, KEY_VALUE)
            self.gate_proj, self.up_proj = (
                nn.Linear(HIDDEN, INNER, bias=False),
                nn.Linear(HIDDEN, INNER, bias=False),
            )
            self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
            self.input_layernorm, self.post_attention_layernorm = (
                nn.RMSNorm(HIDDEN),
                nn.RMSNorm(HIDDEN),
            )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, HIDDEN), nn.RMSNorm(HIDDEN)
                self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
            for block in self.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self, mesh=mesh)
            self.to_empty(device="cpu")
            for parameter in self.parameters():
                local: Any = parameter.data
                local.to_local().uniform_(-0.05, 0.05)

    return Model()


def on_disk() -> Path:
    """Return a directory on a disk; /tmp may be in memory."""
    Path("runs").mkdir(exist_ok=True)
    return Path("runs").absolute()


def note(result: Result, what: str, **values: float) -> None:
    """Add a row for each value."""
    result.rows += [
        {"what": what, "figure": name, "value": value} for name, value in values.items()
    ]


def small_model() -> Any:
    return random_qwen3(8192, 320, 8, (5, 5))


def training(learning_rate: float) -> Callable[[], ShardBuffer]:
    """Return a function that takes a step and returns the weights to publish."""
    import torch

    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())

    def step() -> ShardBuffer:
        tokens = torch.randint(0, 8192, (4, 32), generator=generator)
        tokens[:, 1::2] = tokens[:, ::2] // 3  # something to learn
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        share = ShardBuffer(
            [TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in parameters.items()]
        )
        for name, tensor in parameters.items():
            share.parts[name][:] = tensor.detach().bfloat16().reshape(-1).view(torch.uint8).numpy()
        return share

    return step


def publish_share(
    store: PolicyStore,
    version: int,
    share: ShardBuffer,
    base: tuple[int, ShardBuffer] | None,
    in_full: bool,
) -> int:
    """Publish from one rank, as the learner does. Returns the bytes of the delta."""
    directory = store.begin(key_of(version))
    file = "model-00001-of-00001.safetensors"
    changes: tuple[DeltaEntry, ...] = ()
    if base is not None:
        coded = delta.encode(base[1].bytes, share.bytes, share.regions)
        write_file(directory / "model-00001-of-00001.delta", coded)
        digest = xxh3(np.frombuffer(coded, np.uint8))
        changes = (DeltaEntry("model-00001-of-00001.delta", len(coded), digest, file),)
    whole = (
        write_shard(directory / file, share)
        if in_full
        else FileEntry(file, share.size, xxh3(share.bytes))
    )
    store.commit(
        Manifest(
            version=key_of(version),
            kind="full" if in_full else "delta",
            files=(whole,),
            base=key_of(base[0]) if base else None,
            deltas=changes,
        )
    )
    return changes[0].bytes if changes else 0


def key_of(version: int) -> PolicyVersion:
    return PolicyVersion(version=version, attempt=1)
