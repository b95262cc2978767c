"""Divide a batch into micro-batches, and leave out of a pack what its sequences share."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from atropos_hpc.learner.backends import verl_api
from atropos_hpc.learner.backends.verl_api import TensorDict, get_device_name, tensordict_utils
from atropos_hpc.learner.batch import PREFIXES
from atropos_hpc.learner.prefixes import local_prefixes, partition

SHARE = "share_prefixes"  # non-tensor entry of a batch


def prepare_micro_batches(
    data: TensorDict, dp_group: Any = None, **_: Any
) -> tuple[list[TensorDict], list[list[int]]]:
    """Return micro-batches and the indices of their sequences. Collective over `dp_group`.

    Takes the place of verl's function of this name, which divides the sequences of a group.
    """
    if not tensordict_utils.get_non_tensor_data(data, "use_dynamic_bsz", default=True):
        found: tuple[list[TensorDict], list[list[int]]] = verl_api.prepare_micro_batches(
            data, dp_group
        )
        return found
    lengths = data["input_ids"].offsets().diff().cpu().numpy()
    prefixes = data[PREFIXES].cpu().numpy()
    if not tensordict_utils.get_non_tensor_data(data, SHARE, default=False):
        prefixes = prefixes * 0
    ranks = tensordict_utils.get_non_tensor_data(data, "sp_size", default=1)

    def largest_of_ranks(count: int) -> int:
        largest = torch.tensor(count, device=get_device_name())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=dp_group)
        return int(largest)

    limit = data["max_token_len_per_gpu"] * ranks
    parts = partition(lengths, prefixes, limit, largest_of_ranks)
    chosen = []
    for part in parts:
        micro_batch = select(data, part)
        micro_batch[PREFIXES] = torch.from_numpy(local_prefixes(prefixes, part))
        chosen.append(micro_batch)
    return chosen, parts


def select(data: TensorDict, rows: list[int]) -> TensorDict:
    """Return these sequences of a batch, in this order.

    Takes the place of verl's `index_select_tensor_dict`, which cuts every tensor into sequences.
    """
    index = torch.tensor(rows, device=data["input_ids"].device)
    chosen = {}
    for name, value in data.items():
        if isinstance(value, torch.Tensor) and value.is_nested:
            chosen[name] = _rows_of(value, index)
        else:  # what is not of sequences has no shape
            chosen[name] = value[index] if value.shape else value
    return TensorDict(chosen, batch_size=len(rows))


def _rows_of(nested: Any, index: torch.Tensor) -> torch.Tensor:
    offsets = nested.offsets()
    lengths = offsets.diff()[index]
    ends = lengths.cumsum(0)
    shift = offsets[:-1][index] - (ends - lengths)
    tokens = torch.arange(int(lengths.sum()), device=index.device)
    values = nested.values()[tokens + shift.repeat_interleave(lengths)]
    return torch.nested.nested_tensor_from_jagged(
        values,
        torch.cat([ends.new_zeros(1), ends]),
        min_seqlen=int(lengths.min()),
        max_seqlen=int(lengths.max()),  # which padding goes to
    )


@dataclass(frozen=True)
class Pack:
    """Which of a micro-batch's T tokens are computed, and where the state of each is found."""

    computed: torch.Tensor  # [C] int64, indices of tokens
    rows: torch.Tensor  # [T] int64, the row of every token among the computed ones


def pack(micro_batch: TensorDict) -> Pack:
    """Return how to compute the shared prefixes of a micro-batch once.

    `packed_attention` infers from positions alone what a branch attends to. A branch must therefore
    not begin at the position at which the branch before it ends, as it would seem to go on with it:
    it then shares one token less.
    """
    prefixes, offsets = micro_batch[PREFIXES], micro_batch["input_ids"].offsets()
    lengths = offsets.diff()
    goes_on = (prefixes[:-1] > 0) & (prefixes[1:] == lengths[:-1])
    prefixes = torch.cat([prefixes[:1], prefixes[1:] - goes_on.long()])
    position = micro_batch["position_ids"].values()
    own = position >= prefixes.repeat_interleave(lengths)
    index = torch.arange(len(prefixes), device=prefixes.device)
    root = torch.where(prefixes == 0, index, 0).cummax(0).values
    place = own.cumsum(0) - 1
    in_root = place[offsets[:-1][root]].repeat_interleave(lengths) + position
    return Pack(own.nonzero()[:, 0], torch.where(own, place, in_root))
