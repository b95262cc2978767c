"""Write a snapshot of a sharded model as safetensors files, one per rank.

1. `ShardWriter.fill` exchanges shards between ranks, bucket by bucket, over a gloo group of its
   own. Each rank receives exactly the tensors that it owns (model bytes / ranks, never the model),
   at their places in the file to be written.
2. `write_full` writes the file, while the rest of it is still coming in. `write_delta` writes what
   has changed since the previous version.
3. All ranks learn of all files, or that some rank failed; a failed publish leaves no file. Rank 0
   adds transformers' index, or the adapter's config.

An adapter is owned by rank 0 and written as PEFT would. The policy store writes the manifest.
Host memory per rank is the snapshot and one shard buffer; two buffers with deltas. Of a single rank
without deltas it is one buffer: the snapshot's pieces become views of it, and the next one is taken
there.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import xxhash

from atropos_hpc.contracts.policy import DeltaEntry, FileEntry
from atropos_hpc.policy import delta, lora
from atropos_hpc.policy.manifest import file_digest
from atropos_hpc.policy.shard_buffer import ShardBuffer, TensorSpec, write_shard, xxh3
from atropos_hpc.policy.snapshot import Entry, Snapshot
from atropos_hpc.runtime.run_dir import write_file, write_json

INDEX = "model.safetensors.index.json"  # transformers finds the shards through it
BUCKET_BYTES = 32 << 20  # sent by a rank at a time; a send and a receive buffer are needed
# With more changed elements than this, a delta saves its readers little and is slow to decode.
MAX_CHANGED_FRACTION = 0.25
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

T = TypeVar("T")
Files = tuple[FileEntry, ...]
Deltas = tuple[DeltaEntry, ...]


class PublishFailed(Exception):
    """A rank could not write its shard, so there is no new version. Earlier ones stand."""


class ShardWriter:
    """This rank's shard of the version being published and, with deltas, of the previous one.

    All ranks call its methods in the same order. `group` must not be used for anything else.
    """

    def __init__(self, group: dist.ProcessGroup, keep_base: bool = False) -> None:
        self.group, self.keep_base = group, keep_base
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.shard = self.base = self._free = self._fused = ShardBuffer([])
        self._snapshot = Snapshot([], [])
        self._send = self._receive = torch.empty(0, dtype=torch.uint8)

    def fill(self, snapshot: Snapshot) -> Iterator[int]:
        """Return an iterator that assembles this rank's shard of the snapshot.

        It yields the number of bytes that are final. Run it to its end before calling anything
        else, or give it to `write_full`.
        """
        self._snapshot = snapshot
        owned = [entry for entry in snapshot.entries if entry.owner == self.rank]
        tensors = [TensorSpec(entry.name, DTYPES[entry.dtype], entry.shape) for entry in owned]
        if snapshot.rename is None:
            self.shard = self._buffer(tensors)
            return self._exchange(self.shard)
        if self._fused.tensors != tensors:
            self._fused = ShardBuffer(tensors)
        deque(self._exchange(self._fused), maxlen=0)
        fused = {
            e.name: torch.from_numpy(self._fused.parts[e.name]).view(e.dtype).reshape(e.shape)
            for e in owned
        }
        renamed = {name: tensor.contiguous() for name, tensor in snapshot.rename(fused).items()}
        self.shard = self._buffer(
            [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in renamed.items()]
        )
        for name, tensor in renamed.items():
            self.shard.parts[name][:] = tensor.reshape(-1).view(torch.uint8).numpy()
        return iter(())

    def write_full(self, directory: Path, filling: Iterable[int] = ()) -> Files:
        """Write this rank's shard, or on rank 0 the adapter. Return the files of all ranks.

        `filling` is what `fill` returned. The files are durable. Raises PublishFailed on every
        rank if any could not write; then no new file is left, under this name or a temporary one.
        A file that was there is this version's, which is public and written again: it stays.
        """
        adapter, path = self._snapshot.adapter, directory / self._file_name()
        public = path.exists()

        def write_own() -> tuple[FileEntry, list[str]] | None:
            if adapter is not None and self.rank:
                deque(filling, maxlen=0)
                return None
            return write_shard(path, self.shard, filling), list(self.shard.parts)

        def write_common() -> FileEntry | None:
            if self.rank:
                return None
            if adapter is None:
                weights = {name: entry.file for entry, names in written for name in names}
                metadata = {"total_size": self._snapshot.bytes}
                write_json(directory / INDEX, {"metadata": metadata, "weight_map": weights})
                return None
            config = directory / lora.CONFIG
            write_json(config, adapter)
            return FileEntry(config.name, config.stat().st_size, file_digest(config))

        try:
            written = [own for own in self.on_all_ranks(write_own, str(path)) if own]
            common = [own for own in self.on_all_ranks(write_common, str(directory)) if own]
        except PublishFailed:
            if not public:
                path.unlink(missing_ok=True)
            raise
        return (*(entry for entry, _ in written), *common)

    def write_delta(self, directory: Path) -> tuple[Files, Deltas] | None:
        """Write the delta from this rank's base shard to its present shard.

        Return the files of the full state, as `write_full` would, and the delta files, of all
        ranks. None means that a delta is not worth it: there is no base, or too much has changed.
        Raises PublishFailed as `write_full` does.
        """
        path = (directory / self._file_name()).with_suffix(".delta")

        def changed_fraction() -> float:
            if self.shard.header != self.base.header:
                return 1.0
            return delta.changed_fraction(self.base.bytes, self.shard.bytes, self.shard.regions)

        def write() -> tuple[FileEntry, DeltaEntry]:
            target = FileEntry(self._file_name(), self.shard.size, xxh3(self.shard.bytes))
            encoded = delta.encode(self.base.bytes, self.shard.bytes, self.shard.regions)
            write_file(path, encoded)
            digest = xxhash.xxh3_64_hexdigest(encoded)
            return target, DeltaEntry(path.name, len(encoded), digest, target.file)

        if self._snapshot.adapter is not None:
            return None
        if max(self.on_all_ranks(changed_fraction, str(path))) > MAX_CHANGED_FRACTION:
            return None
        try:
            written = self.on_all_ranks(write, str(path))
        except PublishFailed:
            path.unlink(missing_ok=True)
            raise
        return tuple(target for target, _ in written), tuple(own for _, own in written)

    def release(self) -> None:
        """Free the shard's memory, with the snapshot's in it. The next `fill` makes it anew."""
        self.shard = self._free = self._fused = ShardBuffer([])
        self._snapshot = Snapshot([], [])

    def set_base(self) -> None:
        """Make the present shard, which is now public, the base of the next delta."""
        if self.keep_base and self.base is not self.shard:
            self._free, self.base = self.base, self.shard

    def on_all_ranks(self, work: Callable[[], T], what: str) -> list[T]:
        """Run `work` on every rank, and return all results on every rank.

        Raises PublishFailed on every rank if it failed on any, so that no rank waits for another.
        """
        results: list[tuple[T | None, str | None]] = [(None, None)] * self.world
        own: tuple[T | None, str | None]
        try:
            own = (work(), None)
        except Exception as error:
            own = (None, f"{what}: {error}")
        dist.all_gather_object(results, own, group=self.group)
        if errors := [error for _, error in results if error]:
            raise PublishFailed("; ".join(errors))
        return [result for result, _ in results]  # type: ignore[misc]

    def _file_name(self) -> str:
        if self._snapshot.adapter is not None:
            return lora.FILE
        return f"model-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"

    def _buffer(self, tensors: list[TensorSpec]) -> ShardBuffer:
        """Return a buffer for the next shard: one of the same layout that is free, or a new one."""
        for buffer in (self._free, self.shard):
            if buffer is not self.base and buffer.tensors == tensors:
                return buffer
        return ShardBuffer(tensors)

    def _exchange(self, into: ShardBuffer) -> Iterator[int]:
        """Bring the tensors that this rank owns to their places: one all-to-all per bucket."""
        for bucket in _buckets(self._snapshot.entries, BUCKET_BYTES * self.world):
            received = self._exchange_bucket(bucket)
            owned = [i for i in bucket if self._snapshot.entries[i].owner == self.rank]
            filled = dict.fromkeys(owned, 0)
            at = 0
            # Pieces arrive rank by rank; a tensor consists of its pieces from all ranks in order.
            for rank in range(self.world):
                for i in owned:
                    entry = self._snapshot.entries[i]
                    size = entry.counts[rank] * entry.dtype.itemsize
                    if rank == self.rank:
                        piece = self._snapshot.pieces[i].view(torch.uint8)
                    else:
                        piece = received[at : at + size]
                        at += size
                    target = into.parts[entry.name][filled[i] : filled[i] + size]
                    if piece.data_ptr() != target.ctypes.data:
                        target[:] = piece.numpy()
                    filled[i] += size
            if self.one_copy:
                for i in owned:
                    entry = self._snapshot.entries[i]
                    self._snapshot.pieces[i] = torch.from_numpy(into.parts[entry.name]).view(
                        entry.dtype
                    )
            if owned:
                yield into.end(self._snapshot.entries[owned[-1]].name)

    @property
    def one_copy(self) -> bool:
        """Whether the snapshot may lie in the shard: a single rank's, which no delta needs.

        Not one in pinned memory, to which a GPU copies faster.
        """
        pinned = any(piece.is_pinned() for piece in self._snapshot.pieces[:1])
        single = self.world == 1 and not self.keep_base
        return single and self._snapshot.rename is None and not pinned

    def _exchange_bucket(self, bucket: list[int]) -> torch.Tensor:
        """Send this rank's pieces of other ranks' tensors. Return what came in, rank by rank."""
        entries = [self._snapshot.entries[i] for i in bucket]

        def size(sender: int, owner: int) -> int:
            if sender == owner:
                return 0
            return sum(e.counts[sender] * e.dtype.itemsize for e in entries if e.owner == owner)

        send_sizes = [size(self.rank, rank) for rank in range(self.world)]
        receive_sizes = [size(rank, self.rank) for rank in range(self.world)]
        self._send, send = _at_least(self._send, sum(send_sizes))
        self._receive, receive = _at_least(self._receive, sum(receive_sizes))
        away = [i for i in bucket if self._snapshot.entries[i].owner != self.rank]
        if away:
            away.sort(key=lambda i: self._snapshot.entries[i].owner)
            pieces = [self._snapshot.pieces[i].view(torch.uint8) for i in away]
            torch.cat(pieces, out=send)
        if self.world > 1:
            dist.all_to_all_single(receive, send, receive_sizes, send_sizes, group=self.group)
        return receive


def _buckets(entries: list[Entry], limit: int) -> Iterator[list[int]]:
    """Yield indices of the entries in order, in buckets of at most `limit` bytes."""
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


def _at_least(buffer: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the buffer, or a larger one, and a view of its first `size` bytes."""
    buffer = buffer if len(buffer) >= size else torch.empty(size, dtype=torch.uint8)
    return buffer, buffer[:size]
