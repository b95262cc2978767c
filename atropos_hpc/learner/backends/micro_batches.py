"""Divide a batch into micro-batches, put their outputs together, and leave out of a pack what its
sequences share.

verl does the first two sequence by sequence: a third of the time of a step of 256 short sequences.
"""

from dataclasses import dataclass
from itertools import chain
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
    layouts: dict[int, _Rows] = {}  # by the identity of the offsets, which tensors share
    for name, value in data.items():
        if isinstance(value, torch.Tensor) and value.is_nested:
            offsets = value.offsets()  # type: ignore[attr-defined]
            if id(offsets) not in layouts:
                layouts[id(offsets)] = _rows_of(offsets, index)
            chosen[name] = layouts[id(offsets)].take(value)
        else:  # what is not of sequences has no shape
            chosen[name] = value[index] if value.shape else value
    return TensorDict(chosen, batch_size=len(rows))


@dataclass(frozen=True)
class _Rows:
    """Some rows of jagged tensors that have the same offsets."""

    tokens: torch.Tensor  # indices into the values
    offsets: torch.Tensor
    shortest: int
    longest: int  # which padding goes to

    def take(self, nested: Any) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(
            nested.values()[self.tokens],
            self.offsets,
            min_seqlen=self.shortest,
            max_seqlen=self.longest,
        )


def _rows_of(offsets: torch.Tensor, index: torch.Tensor) -> _Rows:
    lengths = offsets.diff()[index]
    ends = lengths.cumsum(0)
    shift = offsets[:-1][index] - (ends - lengths)
    tokens = torch.arange(int(ends[-1]), device=index.device) + shift.repeat_interleave(lengths)
    own = torch.cat([ends.new_zeros(1), ends])
    return _Rows(tokens, own, int(lengths.min()), int(lengths.max()))


def collect_outputs(
    output_lst: list[dict[str, Any]], indices: list[list[int]] | None, data: TensorDict
) -> dict[str, Any]:
    """Return the model's outputs, jagged [B, tokens], in the order of the batch.

    Takes the place of verl's `postprocess_batch_func`. Losses and metrics are `LossMetrics`'.
    """
    whole, order = {}, None
    if indices is not None:
        order = torch.tensor(list(chain.from_iterable(indices))).argsort()
    for name in output_lst[0].get("model_output", {}):
        parts = [output["model_output"][name] for output in output_lst]
        ends = torch.cat([part.offsets().diff() for part in parts]).cumsum(0)
        values = torch.cat([part.values() for part in parts])
        nested: Any = torch.nested.nested_tensor_from_jagged(
            values, torch.cat([ends.new_zeros(1), ends])
        )
        if order is not None:
            nested = _rows_of(nested.offsets(), order.to(ends.device)).take(nested)
        whole[name] = nested
    return {"model_output": whole, "metrics": {}}


def response_rows(batch: TensorDict) -> torch.Tensor:
    """Return, for each response token, the row of the pack that predicts it, [R] int64."""
    ends, mask = batch["input_ids"].offsets()[1:], batch["response_mask"]
    lengths, tokens = mask.offsets().diff(), mask.values().shape[0]
    # token start + j of a sequence is predicted by the row before it: start + j - 1
    before = ends - lengths - 1 - mask.offsets()[:-1]
    first = torch.repeat_interleave(before, lengths, output_size=tokens)  # known: no device sync
    return first + torch.arange(tokens, device=first.device)


def padded_responses(tensor: Any, data: TensorDict) -> torch.Tensor:
    """Return outputs of a pack's rows for the response tokens, [B, longest response], with zeros.

    `tensor`: [T], or jagged [B, tokens]. Takes the place of verl's `no_padding_2_padding`.
    """
    values: torch.Tensor = tensor.values() if tensor.is_nested else tensor
    found = values[response_rows(data)]
    lengths = data["response_mask"].offsets().diff()
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    return found.new_zeros(real.shape).masked_scatter(real, found)


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
