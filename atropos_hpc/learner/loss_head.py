"""Log-probs and entropies from hidden states, without logits of shape [tokens, vocabulary].

The output layer of a language model is its largest activation: 32k tokens times a vocabulary of
152k are 5e9 logits. `LossHead` takes the place of the output layer's `forward`. It computes logits
for a few hundred tokens at a time, reduces them to two numbers per token, and computes them again
in the backward pass, where the gradient with respect to logits has a closed form. Logits always
come from the layer's own `forward`, so FSDP2's unsharded weights, tied embeddings, biases and
adapters need no special case.

With z = logits / temperature, p = softmax(z), H = -sum p log p:

    d log p[label] / d z = onehot(label) - p          d H / d z = -p (log p + H)

A token that was sampled from a part of the vocabulary (its support) has -inf for all other z, or
rather a number whose exponential is 0, so that 0 times it is 0: p and H are those of the truncated
policy.

Weight gradients of the chunks are accumulated in float32, whatever the dtype of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from atropos_hpc.runtime.error_text import describe_error

log = logging.getLogger(__name__)

# Logits per chunk. Large enough to keep matrix products efficient, small enough to be a minor part
# of the memory: a chunk needs about 16 bytes per logit on a GPU while it is processed, 6 on a CPU.
CHUNK_LOGITS = {"cuda": 96 << 20, "cpu": 1 << 25}
# Logits that a CPU reduces at a time, so that all temporaries stay in its caches. With whole chunks
# the kernel's zeroing of their pages took ten times as long as the arithmetic.
CACHED_LOGITS = 1 << 20
# Config attributes of models that transform logits after the output layer, and the neutral value.
LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


EXCLUDED = -1e30  # the logit of an id outside of a support, whatever the temperature


@dataclass(frozen=True)
class Supports:
    """The supports of N tokens: ids[start : start + count] of each; count 0: the vocabulary."""

    starts: torch.Tensor  # [N] int64
    counts: torch.Tensor  # [N] int64
    ids: torch.Tensor  # int64

    def restrict(self, logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Return the logits of a chunk of the tokens, [n, vocabulary], with EXCLUDED elsewhere."""
        starts, counts = self.starts[chunk], self.counts[chunk]
        rows = torch.repeat_interleave(counts)
        begins = counts.cumsum(0) - counts
        at = torch.arange(len(rows), device=rows.device) + (starts - begins)[rows]
        excluded = (counts > 0)[:, None].repeat(1, logits.shape[-1])
        excluded[rows, self.ids[at]] = False
        return logits.masked_fill(excluded, EXCLUDED)


@dataclass(frozen=True)
class Targets:
    """What to compute for sequences of T tokens: of each selected token, the log-prob of its label.

    A hidden state may serve several tokens: sequences can share their first ones.
    """

    tokens: int  # T
    places: torch.Tensor  # [N] int64, the tokens that predict something trained
    rows: torch.Tensor  # [N] int64, the hidden state of each
    labels: torch.Tensor  # [N] int64
    temperatures: torch.Tensor  # [N] float32
    supports: Supports | None = None  # None: all from the whole vocabulary

    def restrict(self, logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Return the logits of a chunk, restricted to the supports of its tokens."""
        return logits if self.supports is None else self.supports.restrict(logits, chunk)


class LossHead:
    """The replaced `forward` of an output layer. Without `targets` it computes logits as before."""

    def __init__(self, layer: torch.nn.Module, vocab_size: int) -> None:
        self.layer, self.vocab_size = layer, vocab_size
        self.targets: Targets | None = None
        self.differentiable_entropy = True
        self.logits = layer.forward
        layer.forward = self.forward

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return log-prob of the label and entropy, nats: [1, C, hidden] -> [1, T, 2] float32.

        C hidden states were computed for T tokens. Tokens that are not selected have zeros.

        Differentiable in both. Returns logits, [..., vocabulary], while `targets` is None.
        """
        if self.targets is None:
            return cast(torch.Tensor, self.logits(hidden))
        targets, parameters = self.targets, self.parameters()
        selected = hidden[0].index_select(0, targets.rows)
        found = cast(torch.Tensor, _ChunkedHead.apply(self, targets, selected, *parameters))
        every = found.new_zeros(targets.tokens, 2)
        return every.index_copy(0, targets.places, found)[None]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the layer's trained parameters; under FSDP2, the ones unsharded at this moment."""
        return [parameter for parameter in self.layer.parameters() if parameter.requires_grad]

    def chunks(self, rows: int, device: torch.device) -> Iterator[slice]:
        """Slices of the selected rows, all but the last of one size."""
        size = max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // self.vocab_size)
        size = max(64, size // 64 * 64) if size >= 64 else size
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _ChunkedHead(torch.autograd.Function):
    """[N, hidden] -> [N, 2]. The parameters are inputs so that autograd routes their gradients."""

    @staticmethod
    def forward(
        ctx: Any, head: LossHead, targets: Targets, hidden: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        found = hidden.new_empty(len(hidden), 2, dtype=torch.float32)
        normalizers = hidden.new_empty(len(hidden), dtype=torch.float32)
        statistics = _fused(_statistics, hidden.device)
        for chunk in head.chunks(len(hidden), hidden.device):
            logits = targets.restrict(head.logits(hidden[chunk]), chunk)
            found[chunk, 0], found[chunk, 1], normalizers[chunk] = statistics(
                logits, targets.labels[chunk], targets.temperatures[chunk]
            )
        ctx.head, ctx.targets = head, targets
        ctx.autocast = _autocast(hidden.device.type)
        ctx.save_for_backward(hidden, normalizers, found[:, 1])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, normalizers, entropies = ctx.saved_tensors
        head, targets, (gradient,) = ctx.head, ctx.targets, gradients
        of_hidden = torch.zeros_like(hidden)
        parameters = head.parameters()
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        kind = _logit_gradient if head.differentiable_entropy else _logit_gradient_of_log_prob
        of_logits = _fused(kind, hidden.device)
        for chunk in head.chunks(len(hidden), hidden.device):
            part = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast:
                logits = head.logits(part)
            of_chunk = of_logits(
                targets.restrict(logits.detach(), chunk),
                targets.labels[chunk], targets.temperatures[chunk],
                normalizers[chunk], entropies[chunk], gradient[chunk],
            )  # fmt: skip
            first, *rest = torch.autograd.grad(logits, [part, *parameters], of_chunk)
            del logits, of_chunk
            of_hidden[chunk] = first
            for total, one in zip(sums, rest, strict=True):
                total += one
                del one  # as large as the output layer
            del first, rest, part
        return (
            None,
            None,
            of_hidden,
            *(t.to(p.dtype) for t, p in zip(sums, parameters, strict=True)),
        )


def _statistics(
    logits: torch.Tensor, labels: torch.Tensor, temperatures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of the label, entropy, log-sum-exp; each [n] float32, nats."""
    scaled = logits.float() / temperatures[:, None]
    chosen = scaled.gather(-1, labels[:, None])[:, 0]
    largest = scaled.amax(-1, keepdim=True)
    exponentials = (scaled - largest).exp_()
    total = exponentials.sum(-1)
    normalizer = largest[:, 0] + total.log()
    entropy = normalizer - exponentials.mul_(scaled).sum(-1) / total
    return chosen - normalizer, entropy, normalizer


def _logit_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperatures: torch.Tensor,
    normalizers: torch.Tensor,
    entropies: torch.Tensor,
    gradients: torch.Tensor,
) -> torch.Tensor:
    """Gradient with respect to logits, [n, vocabulary], in their dtype. `gradients`: [n, 2]."""
    of_log_prob, of_entropy = gradients[:, :1], gradients[:, 1:]
    log_p = logits.float() / temperatures[:, None] - normalizers[:, None]
    chosen = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    probability = log_p.exp()
    of_scaled = of_log_prob * (chosen.float() - probability)
    of_scaled = of_scaled - of_entropy * probability * (log_p + entropies[:, None])
    return (of_scaled / temperatures[:, None]).to(logits.dtype)


def _logit_gradient_of_log_prob(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperatures: torch.Tensor,
    normalizers: torch.Tensor,
    entropies: torch.Tensor,
    gradients: torch.Tensor,
) -> torch.Tensor:
    """The same where nothing depends on the entropy."""
    scale = gradients[:, :1] / temperatures[:, None]
    scaled = logits.float() / temperatures[:, None]
    probability = scaled.sub_(normalizers[:, None]).exp_()
    chosen = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    return probability.neg_().add_(chosen).mul_(scale).to(logits.dtype)


def _fused(function: Any, device: torch.device) -> Any:
    """Return the function of rows of logits, so that it passes over memory only once.

    On CUDA it is compiled; on a CPU it is applied to a few rows at a time.
    """
    if device.type == "cpu":
        return partial(_by_rows, function)
    if device.type == "cuda" and compiles(device.type):
        return _compiled(function)
    return function


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


@cache
def compiles(device: str) -> bool:
    """Whether torch can compile for a device here: that needs a C compiler, and Triton on CUDA."""
    try:
        torch.compile(lambda numbers: numbers.exp() + numbers)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler's many layers
        log.warning("torch.compile fails, so the loss head is slower: %s", describe_error(error))
        return False
    return True


def _by_rows(function: Any, logits: torch.Tensor, *others: torch.Tensor) -> Any:
    size = max(1, CACHED_LOGITS // logits.shape[-1])
    split = [tensor.split(size) for tensor in (logits, *others)]
    parts = [function(*rows) for rows in zip(*split, strict=True)]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _autocast(device_type: str) -> AbstractContextManager[Any]:
    """The autocast state of the forward pass, to be entered again in the backward pass."""
    available = torch.amp.autocast_mode.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type))


def transforms_logits(config: Any) -> str | None:
    """The config attribute by which a model changes logits behind its output layer, if it does."""
    for name, neutral in LOGIT_TRANSFORMS.items():
        if getattr(config, name, neutral) not in (neutral, None):
            return name
    return None
