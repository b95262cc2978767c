"""Copy a sharded model to host memory, in the form in which it is published.

Of a model with a LoRA adapter only the adapter is copied.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from atropos_hpc.policy import lora

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of the model, as it is published.

    `owner` is the rank that writes it; `counts` the number of its elements that each rank holds.
    """

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
    """The model at one moment. It does not change until its memory is given to the next snapshot.

    `entries` are the same on every rank; `pieces` are this rank's elements of each, flat.
    `rename` maps names in memory to names in files, where they differ. `adapter` is the content of
    adapter_config.json, if this is an adapter.
    """

    entries: list[Entry]
    pieces: list[torch.Tensor]
    rename: Callable[[Tensors], Tensors] | None = None
    adapter: dict[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """The size of the whole model."""
        return sum(entry.bytes for entry in self.entries)


def snapshot(
    module: torch.nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    state: Mapping[str, torch.Tensor] | None = None,
    reuse: Snapshot | None = None,
) -> Snapshot:
    """Copy this rank's shards: parameters in `dtype` (an adapter's in float32), buffers unchanged.

    Every rank must call it at the same step. `state` gives the module's tensors by name, where its
    own state_dict has no shards. `reuse` is a snapshot that is no longer needed, whose memory is
    used again. Raises NotImplementedError for a parameter sharded along another dimension than 0.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    adapter = lora.config_of(module)
    tensors = list(_published(module, module.state_dict() if state is None else state))
    if adapter is not None:
        dtype = torch.float32
        tensors = [(file, t) for name, t in tensors if (file := lora.file_name(name))]
    entries = _entries(tensors, dtype, world, writers=world if adapter is None else 1)
    reusable = reuse.pieces if reuse is not None and reuse.entries == entries else None
    pieces = []
    for i, ((_, tensor), entry) in enumerate(zip(tensors, entries, strict=True)):
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        piece = reusable[i] if reusable else _host_memory(entry.counts[rank], entry, local.is_cuda)
        if len(piece):
            # A copy between devices that also casts would cast on the host, and block.
            cast = local.to(entry.dtype) if local.device != piece.device else local
            piece.copy_(cast.reshape(-1), non_blocking=True)
        pieces.append(piece)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # once, for all copies
    return Snapshot(entries, pieces, _renaming(module) if adapter is None else None, adapter)


def _host_memory(count: int, entry: Entry, pinned: bool) -> torch.Tensor:
    """Return memory for `count` elements of the entry, page-locked if the copy is from a GPU.

    torch's own pinned memory would be rounded up to a power of two.
    """
    memory = torch.empty(count, dtype=entry.dtype)
    if pinned and count:
        pin_memory(memory.data_ptr(), memory.nbytes)
        release = weakref.finalize(memory.untyped_storage(), unpin_memory, memory.data_ptr())
        release.atexit = False  # the CUDA context may be gone by then
    return memory


def _entries(
    tensors: list[tuple[str, torch.Tensor]], dtype: torch.dtype, world: int, writers: int
) -> list[Entry]:
    """Describe the tensors, and assign each to one of the first `writers` ranks."""
    counts = [_counts(tensor, world, name) for name, tensor in tensors]
    dtypes = [
        dtype if tensor.is_floating_point() and isinstance(tensor, DTensor) else tensor.dtype
        for _, tensor in tensors
    ]
    sizes = [kind.itemsize * sum(count) for kind, count in zip(dtypes, counts, strict=True)]
    owners = _owners([name for name, _ in tensors], sizes, writers)
    return [
        Entry(name, tuple(tensor.shape), kind, owner, count)
        for (name, tensor), kind, owner, count in zip(tensors, dtypes, owners, counts, strict=True)
    ]


def _published(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, as shards, and persistent buffers.

    Of tied parameters only the first name is published, as transformers saves them. They are taken
    from `state` because state_dict's hook shards again what a forward pass without a backward pass
    has left unsharded; named_parameters would not.
    """
    tied = tied_names(module)
    return ((name, tensor) for name, tensor in state.items() if name not in tied)


def tied_names(module: torch.nn.Module) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    return {name: own for name, own in names.items() if name != own}


def _counts(tensor: torch.Tensor, world: int, name: str) -> tuple[int, ...]:
    """Return how many elements each rank contributes. Of plain tensors, rank 0 contributes all."""
    if not isinstance(tensor, DTensor):
        return (tensor.numel(),) + (0,) * (world - 1)
    mesh, placements = tensor.device_mesh, tensor.placements
    last, outer = placements[-1], placements[:-1]
    by_rows = isinstance(last, Shard) and last.dim == 0
    if not by_rows or not all(placement.is_replicate() for placement in outer):
        raise NotImplementedError(
            f"{name} is placed as {placements}: only parameters sharded along the first dimension,"
            " replicated or not, can be published"
        )
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    # As torch.chunk splits: shards of this many rows, the last ones shorter or empty.
    chunk = -(-tensor.shape[0] // mesh.size(-1))
    counts = [0] * world
    for i, rank in enumerate(_first_replica(mesh)):
        counts[rank] = row * max(0, min(chunk, tensor.shape[0] - i * chunk))
    return tuple(counts)


@lru_cache(maxsize=16)  # computing it is slow, and it is asked for per tensor and version
def _first_replica(mesh: DeviceMesh) -> list[int]:
    """Return the ranks that hold the shards of one replica, in order; only these contribute."""
    ranks: list[int] = mesh.mesh.reshape(-1, mesh.size(-1))[0].tolist()
    return ranks


def _owners(names: list[str], sizes: list[int], ranks: int) -> list[int]:
    """Assign tensors to ranks, the largest first, each to the least loaded rank. Deterministic."""
    load, owners = [0] * ranks, [0] * len(names)
    for i in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


def _renaming(module: torch.nn.Module) -> Callable[[Tensors], Tensors] | None:
    """Return the mapping to the names of the files, if transformers holds weights differently.

    It may hold them under other names, or fused.
    """
    if not getattr(module, "_weight_conversions", None):
        return None
    from transformers.core_model_loading import revert_weight_conversion

    return partial(revert_weight_conversion, cast(Any, module))
