"""Attention within each sequence of a pack, by torch's own kernels: what `model.attention=sdpa` means in the learner.

transformers computes a pack, whose positions restart where a sequence begins, with a mask of [T, T]: its cost grows with the square
of the pack. Here sequences of like length are laid side by side, [B, L], with padding behind them, and attended to causally, without
a mask. No token sees what is behind it, so padding changes nothing, and what is computed for it is dropped. Sequences in one such block
differ in length by less than a factor of two.

Layers that attend within a window only, or to what comes after, keep transformers' way.
"""

import weakref
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "packed_sdpa"  # in transformers' registries


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of a pack stand in blocks of sequences."""

    blocks: list[
        torch.Tensor
    ]  # [B, L] each: the tokens' places in the pack, a sequence's last one again as padding
    places: torch.Tensor  # [T], the place of every token of the pack among the blocks' elements, one block after the other


def layout(position_ids: torch.Tensor) -> Layout:
    """Of a pack's positions, [T], each sequence's 0, 1, 2, ..."""
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


_newest: tuple[weakref.ref[torch.Tensor], Layout] | None = None


_newest_offsets: tuple[weakref.ref[torch.Tensor], tuple[torch.Tensor, int]] | None = None


def _offsets_of(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the pack's cumulative sequence lengths, [S + 1] int32, and its longest sequence."""
    global _newest_offsets
    if _newest_offsets is None or _newest_offsets[0]() is not position_ids:
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        offsets = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
        found = offsets, int(offsets.diff().max())
        _newest_offsets = weakref.ref(position_ids), found
    return _newest_offsets[1]


def _layout_of(position_ids: torch.Tensor) -> Layout:
    """Every layer of a forward pass asks for the same one."""
    global _newest
    if _newest is None or _newest[0]() is not position_ids:
        _newest = weakref.ref(position_ids), layout(position_ids[0])
    return _newest[1]


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
    """transformers' interface: query [1, heads, T, size], key and value [1, key heads, T, size] -> [1, T, heads, size].

    Raises NotImplementedError for a model that doesn't tell its attention layers where each token stands in its sequence.
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
            f"{model} is not told where sequences of a pack begin: use model.attention=flash_attention_2 or eager"
        )
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query, key, value, position_ids, scaling), None
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
    return torch.cat(parts).index_select(0, packed.places)[None], None


@cache
def _varlen_attention() -> tuple[Any, dict[str, Any]]:
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
    """None where `attend` needs no mask: causal, over the whole of each sequence."""
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
    """Make transformers know it. Returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
