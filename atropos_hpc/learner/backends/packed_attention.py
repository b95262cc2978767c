"""Attention within each sequence of a pack, by torch's kernels: `model.attention=sdpa`.

transformers computes a pack, whose positions restart where a sequence begins, with a mask of [T,
T], so the cost grows with the square of the pack. Here, torch's FlashAttention for sequences of
different lengths is used on GPUs that it supports, in half precision. Otherwise, sequences of
similar length are put into blocks, [B, L], padded at their ends, with causal attention and no mask.
No token sees later ones, so padding changes nothing; its output is dropped. Lengths in a block
differ by less than a factor of 2.

A pack may contain branches, which attend to the first tokens of another sequence, too: see
`segments` and `learner.prefixes`.

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
class Segments:
    """The runs of successive positions in a pack, [S] each.

    One that begins at position 0 is a sequence. One that begins at p > 0 is a branch: it goes on
    from the first p tokens of the last sequence before it (`learner.prefixes`).
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    prefixes: torch.Tensor  # p
    roots: torch.Tensor  # where the sequence starts that the segment belongs to


def segments(position_ids: torch.Tensor) -> Segments:
    """Return the segments of a pack with these positions, [T]."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[1:] = position_ids[1:] != position_ids[:-1] + 1
    starts = begins.nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([len(position_ids)]))
    prefixes = position_ids[starts]
    roots = torch.where(prefixes == 0, starts, 0).cummax(0).values
    return Segments(starts, lengths, prefixes, roots)


@dataclass(frozen=True)
class Block:
    """Segments of similar length, and of similar prefix, that are computed together.

    queries: [B, L], indices of tokens; a segment's last token is its padding
    keys: [B, K], likewise: the prefix, its last token repeated as padding, then `queries`
    mask: [1 or B, 1, L, K], or None where attention is causal and has no prefix
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """How the T tokens of a pack map to blocks.

    places: [T], the index of every token of the pack in the concatenation of the blocks' queries
    """

    blocks: list[Block]
    places: torch.Tensor


def layout(position_ids: torch.Tensor) -> Layout:
    """Return the layout of a pack with these positions, [T]."""
    found = segments(position_ids)
    kinds = [
        lengths.double().clamp(min=0.5).log2().floor()
        for lengths in (found.lengths, found.prefixes)
    ]
    kind, places, before = torch.stack(kinds, 1), torch.empty_like(position_ids), 0
    blocks = []
    for own in kind.unique(dim=0):
        chosen = Segments(*(field[(kind == own).all(1)] for field in vars(found).values()))
        column = torch.arange(int(chosen.lengths.max()), device=position_ids.device)
        queries = chosen.starts[:, None] + torch.minimum(column, chosen.lengths[:, None] - 1)
        real = column < chosen.lengths[:, None]
        places[queries[real]] = before + real.flatten().nonzero()[:, 0]
        before += queries.numel()
        blocks.append(_block(chosen, queries))
    return Layout(blocks, places)


def _block(chosen: Segments, queries: torch.Tensor) -> Block:
    if not (longest := int(chosen.prefixes.max())):
        return Block(queries, queries, None)
    column = torch.arange(longest, device=queries.device)
    prefixes = chosen.prefixes[:, None]
    in_root = chosen.roots[:, None] + torch.minimum(column, prefixes - 1)
    valid = column < prefixes
    if bool(valid.all()):
        valid = valid[:1]
    length = queries.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=queries.device).tril()
    parts = [valid[:, None].expand(-1, length, -1), causal.expand(len(valid), -1, -1)]
    return Block(queries, torch.cat([in_root, queries], 1), torch.cat(parts, 2)[:, None])


class _PerPack(Generic[T]):
    """A function of a pack's positions that keeps its last result: every layer needs the same."""

    def __init__(self, compute: Callable[[torch.Tensor], T]) -> None:
        self._compute = compute
        self._last: tuple[weakref.ref[torch.Tensor], T] | None = None

    def __call__(self, position_ids: torch.Tensor) -> T:
        if self._last is None or self._last[0]() is not position_ids:
            self._last = weakref.ref(position_ids), self._compute(position_ids)
        return self._last[1]


@dataclass(frozen=True)
class Varlen:
    """The arguments of the kernel for sequences of different lengths."""

    keys: torch.Tensor | None  # [K], indices of the tokens whose keys are used; None: all, in order
    query_offsets: torch.Tensor  # [S + 1] int32, cumulative lengths
    key_offsets: torch.Tensor
    longest_query: int
    longest_key: int


def varlen(position_ids: torch.Tensor) -> Varlen:
    """Return the arguments for a pack with these positions, [T]."""
    found = segments(position_ids)
    lengths = found.lengths + found.prefixes
    queries, keys = (torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in (found.lengths, lengths))
    index = None
    if bool(found.prefixes.any()):
        column = torch.arange(int(lengths.max()), device=position_ids.device)
        prefixes = found.prefixes[:, None]
        rows = torch.where(
            column < prefixes,
            found.roots[:, None] + column,
            found.starts[:, None] + column - prefixes,
        )
        index = rows[column < lengths[:, None]]
    longest = int(found.lengths.max()), int(lengths.max())
    return Varlen(index, queries.int(), keys.int(), *longest)


def _gathered(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the positions of the whole pack, [1, T], from each rank's part of it."""
    group = verl_api.get_ulysses_sequence_parallel_group()
    parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, position_ids.contiguous(), group=group)
    return torch.cat(parts, dim=1)


_positions_of_group = _PerPack(_gathered)
_layout_of = _PerPack(lambda position_ids: layout(position_ids[0]))
_varlen_of = _PerPack(lambda position_ids: varlen(position_ids[0]))


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
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    if takes_varlen(query.dtype, query.shape[-1], dropout, capability):
        return _varlen(query, key, value, position_ids, scaling)
    if query.is_cuda:  # the kernels that need little memory in float32 take no grouped queries
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    packed, parts = _layout_of(position_ids), []
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, size]
    for block in packed.blocks:
        q, k, v = (
            tensor.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for tensor, index in zip(flat, (block.queries, block.keys, block.keys), strict=True)
        )
        part = scaled_dot_product_attention(
            q, k, v, attn_mask=block.mask, dropout_p=dropout, is_causal=block.mask is None,
            scale=scaling, enable_gqa=True,
        )  # fmt: skip
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packed.places)[None]


def takes_varlen(
    dtype: torch.dtype, size: int, dropout: float, capability: tuple[int, int] | None
) -> bool:
    """Whether `_varlen` can compute heads of that size on a device of that CUDA capability.

    The conditions are those of FlashAttention 2 in torch 2.11 to 2.13; it ignores dropout.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    fits = half and size % 8 == 0 and size <= 256 and not dropout
    return fits and capability is not None and capability >= (8, 0)


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
    packed = _varlen_of(position_ids)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packed.keys is not None:
        k, v = k.index_select(0, packed.keys), v.index_select(0, packed.keys)
    # Causality is aligned at the ends of queries and keys, so a branch sees its whole prefix.
    found: torch.Tensor = attention(
        q, k, v, packed.query_offsets, packed.key_offsets, packed.longest_query, packed.longest_key,
        scale=scaling, window_size=(-1, 0), **options,
    )  # fmt: skip
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


def supports_prefixes(model: torch.nn.Module) -> bool:
    """Whether tokens of a model see earlier ones only by full attention in `attend`."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = set(getattr(config, "layer_types", None) or ("full_attention",))
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", 1)
    # State space models and linear attention convolve over neighbouring tokens.
    convolves = any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
    own = config._attn_implementation == NAME
    return own and layers == {"full_attention"} and not windowed and not convolves


def register() -> str:
    """Register with transformers, and return the name for `attn_implementation`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
