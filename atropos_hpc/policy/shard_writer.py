"""Publish a sharded model as safetensors with the names that transformers gives them, every rank writing a share of whole tensors.

  1. `snapshot`, in the training thread: every rank copies its shards to the host, in the published dtype. No communication.
  2. `Shares.fill`, in the background, over a gloo group of its own: ranks swap shards, bucket by bucket, so that each receives exactly the
     tensors that it owns (model bytes / ranks, never the model), at their places in the file that they will be.
  3. `Shares.write_full` writes them as that file, what is in place already while the rest comes in; `Shares.write_delta` what has changed
     since the version before.
  4. Every rank learns of all files, or that some rank failed; rank 0 adds transformers' index of them. A failed publish leaves no file.
Of a model with a LoRA adapter only the adapter is published: rank 0 owns all of it, and writes it as PEFT would.
The manifest, and with it the version, is the policy store's business. In host memory this takes, per rank, the snapshot and one share;
with deltas, two.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from atropos_hpc.policy import delta, lora
from atropos_hpc.policy.shard_buffer import Share, Tensor, write_share, xxh3
from atropos_hpc.policy.store import file_digest
from atropos_hpc.runtime.run_dir import write_file, write_json

Tensors = dict[str, torch.Tensor]

INDEX = "model.safetensors.index.json"  # by which transformers finds the shards
BUCKET_BYTES = (
    32 << 20
)  # that a rank sends at a time: what the background needs on top of the snapshot and the shares, twice
WORTH_SHARE = (
    0.25  # of elements changed: with more, who reads the delta saves little, and decodes longer
)
DTYPES = {
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
    """The model at one moment. It does not change until it is given to the next `snapshot` as `used`."""

    entries: list[Entry]  # the same on every rank
    pieces: list[torch.Tensor]  # this rank's elements of each entry, flat, on the host
    renamed: Callable[[Tensors], Tensors] | None = (
        None  # from the names in memory to those of the files, where they differ
    )
    adapter: dict[str, Any] | None = None  # adapter_config.json, where this is one

    @property
    def bytes(self) -> int:
        """Of the whole model."""
        return sum(entry.bytes for entry in self.entries)


def snapshot(
    module: torch.nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    state: Mapping[str, torch.Tensor] | None = None,
    used: Snapshot | None = None,
) -> Snapshot:
    """Copy this rank's shards, parameters in `dtype` (an adapter's in float32), buffers as they are.

    `state`: the module's tensors by name, where its own state_dict has no shards. `used`: a snapshot that is needed no more; its memory
    is used again, which spares the kernel the making of it. Every rank must call it at the same step.

    Raises NotImplementedError for a parameter that is sharded along another dimension than its first.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    described = lora.config_of(module)
    tensors = list(_tensors(module, module.state_dict() if state is None else state))
    if described is not None:
        dtype, tensors = (
            torch.float32,
            [(own, tensor) for name, tensor in tensors if (own := lora.file_name(name))],
        )
    counts = [_counts(tensor, world, name) for name, tensor in tensors]
    dtypes = [
        dtype if tensor.is_floating_point() and isinstance(tensor, DTensor) else tensor.dtype
        for _, tensor in tensors
    ]
    sizes = [kind.itemsize * sum(count) for kind, count in zip(dtypes, counts, strict=True)]
    owners = _owners([name for name, _ in tensors], sizes, world if described is None else 1)
    entries = [
        Entry(name, tuple(tensor.shape), kind, owner, count)
        for (name, tensor), kind, owner, count in zip(tensors, dtypes, owners, counts, strict=True)
    ]
    again = used.pieces if used is not None and used.entries == entries else None
    pieces = []
    for i, ((_, tensor), entry) in enumerate(zip(tensors, entries, strict=True)):
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        piece = torch.empty(entry.counts[rank], dtype=entry.dtype) if again is None else again[i]
        if len(piece):
            piece.copy_(local.reshape(-1))
        pieces.append(piece)
    return Snapshot(entries, pieces, _renaming(module) if described is None else None, described)


class Shares:
    """This rank's share of the version that is being published, and, with deltas, of the one that readers have.

    All ranks call its methods in the same order; `group` is for nothing else meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup, keeps_base: bool = False) -> None:
        self.group, self.keeps_base = group, keeps_base
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.share = self.base = self._free = self._fused = Share([])
        self._shot = Snapshot([], [])
        self._sent, self._received = (
            torch.empty(0, dtype=torch.uint8),
            torch.empty(0, dtype=torch.uint8),
        )

    def fill(self, shot: Snapshot) -> Iterator[int]:
        """Begin to bring this rank's share of the snapshot together. What is returned does so, and yields how many of its bytes stand; it
        is to be run to the end before anything else is called, or given to `write_full`."""
        self._shot = shot
        own = [entry for entry in shot.entries if entry.owner == self.rank]
        tensors = [Tensor(entry.name, DTYPES[entry.dtype], entry.shape) for entry in own]
        if shot.renamed is None:
            self.share = self._memory(tensors)
            return self._exchange(self.share)
        self._fused = self._fused if self._fused.tensors == tensors else Share(tensors)
        deque(self._exchange(self._fused), maxlen=0)
        whole = {
            e.name: torch.from_numpy(self._fused.parts[e.name]).view(e.dtype).reshape(e.shape)
            for e in own
        }
        named = {name: tensor.contiguous() for name, tensor in shot.renamed(whole).items()}
        self.share = self._memory(
            [
                Tensor(name, DTYPES[tensor.dtype], tuple(tensor.shape))
                for name, tensor in named.items()
            ]
        )
        for name, tensor in named.items():
            self.share.parts[name][:] = tensor.reshape(-1).view(torch.uint8).numpy()
        return iter(())

    def write_full(self, directory: Path, filling: Iterable[int] = ()) -> list[dict[str, Any]]:
        """Write this rank's share as model-<rank>-of-<ranks>.safetensors, or rank 0 the adapter's two files.

        Returns the files of all ranks, on every rank: {"file", "bytes", "xxh3", "names"}, all of them durable. Raises PublishFailed, on
        every rank, if any could not write; then no file is left, under this name or a temporary one. `filling`: what `fill` returned.
        """
        described, path = self._shot.adapter, directory / self._file()

        def write_own() -> list[dict[str, Any]]:
            if described is not None and self.rank:
                deque(filling, maxlen=0)
                return []
            return [{**write_share(path, self.share, filling), "names": list(self.share.parts)}]

        def write_beside() -> list[dict[str, Any]]:
            if self.rank:
                return []
            if described is None:
                where = {name: file["file"] for file in files for name in file["names"]}
                write_json(
                    directory / INDEX,
                    {"metadata": {"total_size": self._shot.bytes}, "weight_map": where},
                )
                return []
            beside = directory / lora.CONFIG
            write_json(beside, described)
            return [
                {
                    "file": beside.name,
                    "bytes": beside.stat().st_size,
                    "xxh3": file_digest(beside),
                    "names": [],
                }
            ]

        try:
            files = [file for own in self.on_all(write_own, str(path)) for file in own]
            files += [file for own in self.on_all(write_beside, str(directory)) for file in own]
        except PublishFailed:
            path.unlink(missing_ok=True)
            raise
        return files

    def write_delta(
        self, directory: Path
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
        """Write what changes this rank's share of the base into the present one, as model-<rank>-of-<ranks>.delta.

        Returns (the files of the full state as `write_full` would, the deltas {"file", "bytes", "xxh3", "makes"}) of all ranks, on every
        rank; None if it is not worth it: there is no base, or too much has changed. Raises PublishFailed as `write_full` does.
        """
        path = (directory / self._file()).with_suffix(".delta")

        def changed() -> float:
            if self.share.header != self.base.header:
                return 1.0
            return delta.changed_share(self.base.bytes, self.share.bytes, self.share.runs)

        def write() -> tuple[dict[str, Any], dict[str, Any]]:
            makes = {"file": self._file(), "bytes": self.share.size, "xxh3": xxh3(self.share.bytes)}
            coded = delta.encode(self.base.bytes, self.share.bytes, self.share.runs)
            write_file(path, coded)
            return makes, {
                "file": path.name,
                "bytes": len(coded),
                "xxh3": xxhash.xxh3_64_hexdigest(coded),
                "makes": makes["file"],
            }

        if self._shot.adapter is not None or max(self.on_all(changed, str(path))) > WORTH_SHARE:
            return None
        try:
            written = self.on_all(write, str(path))
        except PublishFailed:
            path.unlink(missing_ok=True)
            raise
        return [made for made, _ in written], [own for _, own in written]

    def readers_have_it(self) -> None:
        """The present share is public: the next delta starts from it."""
        if self.keeps_base and self.base is not self.share:
            self._free, self.base = self.base, self.share

    def on_all(self, work: Callable[[], Any], what: str) -> list[Any]:
        """What `work` gave on every rank, on every rank; or PublishFailed everywhere, if it failed on any: nobody waits in vain."""
        results: list[Any] = [None] * self.world
        own: tuple[Any, str | None]
        try:
            own = (work(), None)
        except Exception as error:
            own = (None, f"{what}: {error}")
        dist.all_gather_object(results, own, group=self.group)
        if errors := [error for _, error in results if error]:
            raise PublishFailed("; ".join(errors))
        return [result for result, _ in results]

    def _file(self) -> str:
        return (
            f"model-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"
            if self._shot.adapter is None
            else lora.FILE
        )

    def _memory(self, tensors: list[Tensor]) -> Share:
        """For the next share: what is neither the base nor of another layout, or new."""
        known = [
            share
            for share in (self._free, self.share)
            if share is not self.base and share.tensors == tensors
        ]
        return known[0] if known else Share(tensors)

    def _exchange(self, into: Share) -> Iterator[int]:
        """Bring the tensors that this rank owns to their places. One all-to-all per bucket, as bytes."""
        shot, rank, world = self._shot, self.rank, self.world
        for bucket in _buckets(shot.entries, BUCKET_BYTES * world):
            entries = [shot.entries[i] for i in bucket]
            away = [
                i
                for i in sorted(bucket, key=lambda i: shot.entries[i].owner)
                if shot.entries[i].owner != rank
            ]  # stable
            owned = [entry for entry in entries if entry.owner == rank]
            send_sizes = [
                sum(e.counts[rank] * e.dtype.itemsize for e in entries if e.owner == r != rank)
                for r in range(world)
            ]
            receive_sizes = [
                sum(e.counts[r] * e.dtype.itemsize for e in owned if r != rank)
                for r in range(world)
            ]
            self._sent, sent = _room(self._sent, sum(send_sizes))
            self._received, received = _room(self._received, sum(receive_sizes))
            if away:
                torch.cat([shot.pieces[i].view(torch.uint8) for i in away], out=sent)
            if world > 1:
                dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=self.group)
            own = {
                i: shot.pieces[i].view(torch.uint8) for i in bucket if shot.entries[i].owner == rank
            }
            # A rank's pieces came one after the other; a tensor wants its pieces of all ranks one after the other.
            filled = dict.fromkeys(own, 0)
            at = 0
            for r in range(world):
                for i in own:
                    size = shot.entries[i].counts[r] * shot.entries[i].dtype.itemsize
                    piece = own[i] if r == rank else received[at : at + size]
                    at += 0 if r == rank else size
                    into.parts[shot.entries[i].name][filled[i] : filled[i] + size] = piece.numpy()
                    filled[i] += size
            if owned:
                yield into.end(owned[-1].name)


def write_shards(shot: Snapshot, directory: Path, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """A snapshot as a full version, once: `Shares.fill` and `Shares.write_full`."""
    shares = Shares(group)
    return shares.write_full(directory, shares.fill(shot))


def _tensors(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, as shards, and persistent buffers. Of tied parameters only the first name, as transformers saves them.

    Taken from `state`: state_dict's hook shards again what a forward without backward has left whole; named_parameters would give that.
    """
    first: dict[int, str] = {}
    tied = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }
    return ((name, tensor) for name, tensor in state.items() if name not in tied)


def _counts(tensor: torch.Tensor, world: int, name: str) -> tuple[int, ...]:
    """How many elements each rank contributes. Plain tensors (buffers) are the same everywhere: rank 0's are taken."""
    if not isinstance(tensor, DTensor):
        return (tensor.numel(),) + (0,) * (world - 1)
    mesh, placements = tensor.device_mesh, tensor.placements
    last = placements[-1]
    if (
        not isinstance(last, Shard)
        or last.dim != 0
        or not all(placement.is_replicate() for placement in placements[:-1])
    ):
        raise NotImplementedError(
            f"{name} is placed as {placements}: only shards along the first dimension, replicated or not, are published"
        )
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    chunk = -(
        -tensor.shape[0] // mesh.size(-1)
    )  # as torch.chunk: pieces of that many rows, the last ones shorter or empty
    counts = [0] * world
    for i, rank in enumerate(_first_replica(mesh)):
        counts[rank] = row * max(0, min(chunk, tensor.shape[0] - i * chunk))
    return tuple(counts)


@lru_cache(
    maxsize=16
)  # a mesh takes its time to say so, and is asked for every tensor of every version
def _first_replica(mesh: DeviceMesh) -> list[int]:
    """The ranks that hold one replica's shards, in order: it speaks for all."""
    ranks: list[int] = mesh.mesh.reshape(-1, mesh.size(-1))[0].tolist()
    return ranks


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


def _room(buffer: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the buffer, or a larger one in its place; that many bytes of it)."""
    buffer = buffer if len(buffer) >= size else torch.empty(size, dtype=torch.uint8)
    return buffer, buffer[:size]


def _renaming(module: torch.nn.Module) -> Callable[[Tensors], Tensors] | None:
    """transformers may hold weights under other names, or fused, than in the files it loads and saves; then the way back."""
    if not getattr(module, "_weight_conversions", None):
        return None
    from transformers.core_model_loading import revert_weight_conversion

    return partial(revert_weight_conversion, cast(Any, module))
