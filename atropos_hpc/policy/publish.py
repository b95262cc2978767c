"""Publish a sharded model as safetensors with the names that transformers gives them, every rank writing a share of whole tensors.

  1. `snapshot`, in the training thread: every rank copies its shards to the host, in the published dtype. No communication.
  2. `write_shards`, in the background, over a gloo group of its own: ranks swap shards, bucket by bucket, so that each receives
     exactly the tensors that it owns (model bytes / ranks, never the model), and writes them as one file.
  3. Every rank learns of all files, or that some rank failed; rank 0 adds transformers' index of them. A failed publish leaves no file.
Of a model with a LoRA adapter only the adapter is published: rank 0 owns all of it, and writes it as PEFT would.
The manifest, and with it the version, is the policy store's business.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.tensor import DTensor, Shard

from atropos_hpc.policy import adapter
from atropos_hpc.policy.store import file_digest
from atropos_hpc.run_dir import sync_directory, write_json

Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"  # by which transformers finds the shards
BUCKET_BYTES = 256 << 20  # that a rank sends at a time: what the background needs on top of the snapshot and the rank's share
_DTYPE_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class PublishFailed(Exception):
    """A rank could not write its share, so there is no new version. Earlier ones stand."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: as it is published, which rank writes it, and how many of its elements each rank holds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int
    counts: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * sum(self.counts)


@dataclass(frozen=True)
class Snapshot:
    """The model at one moment: what stands in it can't change any more. Used up by `write_shards`."""

    entries: list[Entry]  # the same on every rank
    pieces: list[torch.Tensor]  # this rank's elements of each entry, flat, on the host
    renamed: Callable[[Tensors], Tensors]  # from the names in memory to those of the files
    adapter: dict[str, Any] | None = None  # adapter_config.json, where this is one


def snapshot(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, state: Mapping[str, torch.Tensor] | None = None) -> Snapshot:
    """Copy this rank's shards, parameters in `dtype` (an adapter's in float32), buffers as they are.

    `state`: the module's tensors by name, where its own state_dict has no shards. Every rank must call it at the same step.

    Raises NotImplementedError for a parameter that is sharded along another dimension than its first.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    described = adapter.config_of(module)
    tensors = list(_tensors(module, module.state_dict() if state is None else state))
    if described is not None:
        dtype, tensors = torch.float32, [(own, tensor) for name, tensor in tensors if (own := adapter.file_name(name))]
    counts = [_counts(tensor, world, name) for name, tensor in tensors]
    dtypes = [dtype if tensor.is_floating_point() and isinstance(tensor, DTensor) else tensor.dtype for _, tensor in tensors]
    sizes = [kind.itemsize * sum(count) for kind, count in zip(dtypes, counts, strict=True)]
    owners = _owners([name for name, _ in tensors], sizes, world if described is None else 1)
    entries = [
        Entry(name, tuple(tensor.shape), kind, owner, count)
        for (name, tensor), kind, owner, count in zip(tensors, dtypes, owners, counts, strict=True)
    ]
    pieces = []
    for (_, tensor), entry in zip(tensors, entries, strict=True):
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        piece = torch.empty(entry.counts[rank], dtype=entry.dtype)
        if len(piece):
            piece.copy_(local.reshape(-1))
        pieces.append(piece)
    return Snapshot(entries, pieces, _renaming(module) if described is None else lambda own: own, described)


def write_shards(shot: Snapshot, directory: Path, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Write this rank's share of `shot` as model-<rank>-of-<ranks>.safetensors, or rank 0 the adapter's two files.

    Every rank must call it, in the same order.

    Returns the files of all ranks, on every rank: {"file", "bytes", "xxh3", "names"}, all of them durable. Raises PublishFailed,
    on every rank, if any could not write; then no file is left, under this name or a temporary one.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    path = directory / (f"model-{rank + 1:05d}-of-{world:05d}.safetensors" if shot.adapter is None else adapter.FILE)
    tensors = _exchange(shot, group)

    def write_own() -> dict[str, Any] | None:
        named = shot.renamed(tensors)
        if shot.adapter is not None and not named:
            return None
        directory.mkdir(parents=True, exist_ok=True)
        return {**write_safetensors(path, named), "names": list(named)}

    def write_description() -> dict[str, Any] | None:
        if shot.adapter is None or rank:
            return None
        description = directory / adapter.CONFIG
        write_json(description, shot.adapter)
        return {"file": description.name, "bytes": description.stat().st_size, "xxh3": file_digest(description), "names": []}

    def write_index() -> None:
        if shot.adapter is None and rank == 0:
            size = sum(entry.bytes for entry in shot.entries)
            where = {name: file["file"] for file in files for name in file["names"]}
            write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": where})

    try:
        files = [file for file in _on_all(write_own, path, group) + _on_all(write_description, path, group) if file is not None]
        _on_all(write_index, directory / INDEX, group)
    except PublishFailed:
        path.unlink(missing_ok=True)
        raise
    return files


def _on_all(work: Callable[[], Any], path: Path, group: dist.ProcessGroup) -> list[Any]:
    """What `work` gave on every rank, on every rank; or PublishFailed everywhere, if it failed on any: nobody waits in vain."""
    results: list[Any] = [None] * dist.get_world_size(group)
    own: tuple[Any, str | None]
    try:
        own = (work(), None)
    except Exception as error:
        own = (None, f"{path}: {error}")
    dist.all_gather_object(results, own, group=group)
    if errors := [error for _, error in results if error]:
        raise PublishFailed("; ".join(errors))
    return [result for result, _ in results]


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write host tensors under a temporary name, sync, rename. Returns {"file", "bytes", "xxh3"} of what was written.

    Makes no copy of the tensors. Raises OSError (full disk, quota), and then leaves nothing behind.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [size, size + tensor.nbytes]}
        size += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values()]
    blocks: list[Any] = [len(text).to_bytes(8, "little") + text, *raw]
    digest = xxhash.xxh3_64()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for block in blocks:
                view = memoryview(block)
                digest.update(view)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)  # NFS reports a full disk here
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return {"file": path.name, "bytes": 8 + len(text) + size, "xxh3": digest.hexdigest()}


def _tensors(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, as shards, and persistent buffers. Of tied parameters only the first name, as transformers saves them.

    Taken from `state`: state_dict's hook shards again what a forward without backward has left whole; named_parameters would give that.
    """
    first: dict[int, str] = {}
    tied = {name for name, parameter in module.named_parameters(remove_duplicate=False) if first.setdefault(id(parameter), name) != name}
    return ((name, tensor) for name, tensor in state.items() if name not in tied)


def _counts(tensor: torch.Tensor, world: int, name: str) -> tuple[int, ...]:
    """How many elements each rank contributes. Plain tensors (buffers) are the same everywhere: rank 0's are taken."""
    if not isinstance(tensor, DTensor):
        return (tensor.numel(),) + (0,) * (world - 1)
    mesh, placements = tensor.device_mesh, tensor.placements
    last = placements[-1]
    if not isinstance(last, Shard) or last.dim != 0 or not all(placement.is_replicate() for placement in placements[:-1]):
        raise NotImplementedError(
            f"{name} is placed as {placements}: only shards along the first dimension, replicated or not, are published"
        )
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    chunk = -(-tensor.shape[0] // mesh.size(-1))  # as torch.chunk: pieces of that many rows, the last ones shorter or empty
    counts = [0] * world
    for i, rank in enumerate(mesh.mesh.reshape(-1, mesh.size(-1))[0].tolist()):  # the first replica speaks for all
        counts[rank] = row * max(0, min(chunk, tensor.shape[0] - i * chunk))
    return tuple(counts)


def _owners(names: list[str], sizes: list[int], world: int) -> list[int]:
    """Who writes which tensor: the largest first, each to the rank with the least so far. The same on every rank."""
    load, owners = [0] * world, [0] * len(names)
    for i in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


def _buckets(entries: list[Entry], limit: int) -> Iterator[list[int]]:
    """Indices of the entries in order, cut where more than `limit` bytes would come together."""
    bucket: list[int] = []
    filled = 0
    for i, entry in enumerate(entries):
        if bucket and filled + entry.bytes > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(i)
        filled += entry.bytes
    if bucket:
        yield bucket


def _exchange(shot: Snapshot, group: dist.ProcessGroup) -> Tensors:
    """The whole tensors that this rank owns. One all-to-all per bucket, as bytes; frees the snapshot's pieces on the way."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine: Tensors = {}
    for bucket in _buckets(shot.entries, BUCKET_BYTES * world):
        entries = [shot.entries[i] for i in bucket]
        send = [shot.pieces[i].view(torch.uint8) for i in sorted(bucket, key=lambda i: shot.entries[i].owner)]  # stable
        owned = [entry for entry in entries if entry.owner == rank]
        send_sizes = [sum(e.counts[rank] * e.dtype.itemsize for e in entries if e.owner == r) for r in range(world)]
        receive_sizes = [sum(e.counts[r] * e.dtype.itemsize for e in owned) for r in range(world)]
        received = torch.empty(sum(receive_sizes), dtype=torch.uint8)
        dist.all_to_all_single(received, torch.cat(send), receive_sizes, send_sizes, group=group)
        for i in bucket:
            shot.pieces[i] = torch.empty(0)
        # A rank's pieces came one after the other; a tensor wants its pieces of all ranks one after the other.
        pieces = iter(received.split([e.counts[r] * e.dtype.itemsize for r in range(world) for e in owned]))
        by_rank = [[next(pieces) for _ in owned] for _ in range(world)]
        for k, entry in enumerate(owned):
            mine[entry.name] = torch.cat([by_rank[r][k] for r in range(world)]).view(entry.dtype).reshape(entry.shape)
    return mine


def _renaming(module: torch.nn.Module) -> Callable[[Tensors], Tensors]:
    """transformers may hold weights under other names, or fused, than in the files it loads and saves; then the way back."""
    if not getattr(module, "_weight_conversions", None):
        return lambda tensors: tensors
    from transformers.core_model_loading import revert_weight_conversion

    return partial(revert_weight_conversion, cast(Any, module))
