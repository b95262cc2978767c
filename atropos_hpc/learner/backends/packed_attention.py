"""Attention within each sequence of a pack, by torch's kernels: `model.attention=sdpa`.

transformers computes a pack, whose positions restart where a sequence begins, with a mask of [T,
T], so the cost grows with the square of the pack. On CUDA in half precision, torch's FlashAttention
for sequences of different lengths is used here. Elsewhere, sequences of similar length are put into
blocks, [B, L], padded at their ends, with causal attention and no mask. No token sees later ones,
so padding changes nothing; its output is dropped. Lengths in a block differ by less than a factor
of 2.

With Ulysses sequence parallelism, ranks exchange heads for tokens before and after.

Layers with a sliding window, or that are not causal, use transformers' own implementation.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from atropos_hpc.learner.backends import verl_api

T = TypeVar("T")

NAME = "packed_sdpa"  # in transformers' registries


@dataclass(frozen=True)
class Layout:
    """How the T tokens of a pack map to blocks of sequences.

    blocks: [B, L] each, the tokens' indices in the pack; a sequence's last token is its padding
    places: [T], the index of every token of the pack in the concatenation of the blocks
    """

    blocks: list[torch.Tensor]
    places: torch.Tensor


def layout(position_ids: torch.Tensor) -> Layout:
    """Return the layout of a pack with these positions, [T]: 0, 1, 2, ... of each sequence."""
    starts = (position_ids == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([len(position_ids)]))
    kind = torch.log2(lengths.double()).floor()
    blocks, places, before = [], torch.empty_like(position_ids), 0
    for size in kind.unique().tolist():
        of_kind = kind == size
        own, longest = lengths[of_kind, None], int(lengths[of_kind].max())
        column = torch.arange(longest, device=position_ids.device)
        block = starts[of_kind, None] + torch.minimum(column, own - 1)
        real = column < own
        places[block[real]] = before + real.flatten().nonzero()[:, 0]
        blocks.append(block)
        before += block.numel()
    return Layout(blocks, places)


class _PerPack(Generic[T]):
    """A function of a pack's positions that keeps its last result: every layer needs the same."""

    def __init__(self, compute: Callable[[torch.Tensor], T]) -> None:
        self._compute = compute
        self._last: tuple[weakref.ref[torch.Tensor], T] | None = None

    def __call__(self, position_ids: torch.Tensor) -> T:
        if self._last is None or self._last[0]() is not position_ids:
            self._last = weakref.ref(position_ids), self._compute(position_ids)
        return self._last[1]


def _offsets(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return cumulative sequence lengths, [S + 1] int32, and the longest length."""
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    return offsets, int(offsets.diff().max())


def _gathered(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the positions of the whole pack, [1, T], from each rank's part of it."""
    group = verl_api.get_ulysses_sequence_parallel_group()
    parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, position_ids.contiguous(), group=group)
    return torch.cat(parts, dim=1)


_positions_of_group = _PerPack(_gathered)
_layout_of = _PerPack(lambda position_ids: layout(position_ids[0]))
_offsets_of = _PerPack(_offsets)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface.

    query [1, heads, T, size], key and value [1, key heads, T, size] -> [1, T, heads, size]. Raises
    NotImplementedError for a model that does not pass positions to its attention layers.
    """
    if attention_mask is not None or len(query) > 1:
        outcome: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_ids=position_ids,
            **options,
        )
        return outcome
    if position_ids is None or position_ids.dim() != 2:
        model = type(module).__name__
        raise NotImplementedError(
            f"{model} does not pass positions to its attention layers, so the sequences of a pack"
            " cannot be separated: use model.attention=flash_attention_2 or eager"
        )
    group = verl_api.get_ulysses_sequence_parallel_group()
    if group is None or dist.get_world_size(group) == 1:
        return _attend(query, key, value, position_ids, dropout, scaling), None
    # Ulysses (arXiv 2309.14509): exchange a part of every head for all of some heads, and back.
    positions = _positions_of_group(position_ids)
    repeats = max(1, dist.get_world_size(group) // key.shape[1])  # at least one key head per rank
    parts = (query, *(part.repeat_interleave(repeats, dim=1) for part in (key, value)))
    query, key, value = (verl_api.gather_seq_scatter_heads(part, 2, 1) for part in parts)
    whole = _attend(query, key, value, positions, dropout, scaling)
    found: torch.Tensor = verl_api.gather_heads_scatter_seq(whole, head_dim=2, seq_dim=1)
    return found, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attend within each sequence of a pack that this rank holds whole."""
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query, key, value, position_ids, scaling)
    packed, parts = _layout_of(position_ids), []
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, size]
    for block in packed.blocks:
        q, k, v = (
            tensor.index_select(0, block.flatten()).unflatten(0, block.shape).transpose(1, 2)
            for tensor in flat
        )
        part = scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packed.places)[None]


@cache
def _varlen_attention() -> tuple[Any, dict[str, bool]]:
    """Return torch's kernel, and the option that it needs for grouped queries since torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if grouped else {}


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attend on CUDA in half precision: torch's FlashAttention over cumulative sequence lengths."""
    attention, options = _varlen_attention()
    offsets, longest = _offsets_of(position_ids)
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, size]
    found: torch.Tensor = attention(
        *flat, offsets, offsets, longest, longest, scale=scaling, window_size=(-1, 0), **options
    )
    return found[None]


def _mask(
    batch_size: int, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor | None:
    """Return None where `attend` needs no mask: causal attention over whole sequences."""
    limited = (
        options.get("local_size") is not None
        or options.get("use_vmap")
        or "allow_is_bidirectional_skip" in options
    )
    if attention_mask is None and batch_size == 1 and not limited:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size, attention_mask=attention_mask, **options
    )
    return mask


def register() -> str:
    """Register with transformers, and return the name for `attn_implementation`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
