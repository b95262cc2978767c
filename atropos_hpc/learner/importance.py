"""Importance weights for behaviour log-probs that differ from the learner's.

They differ because of stale policy versions, and because inference engines round differently. The
ratio learner / behaviour of every trained token or sequence becomes a weight of its policy loss:
truncated at a threshold (truncated importance sampling, https://fengyao.notion.site/off-policy-rl),
zero outside a range, or zero where a divergence is too large (rejection). The weights are verl's
rollout correction. Its rejection mask is applied as weights of zero, so means are still over all
tokens and sequences of the batch: the more of a batch is rejected, the smaller the step.

This needs the learner's own log-probs as the old ones (algorithm.old_log_probs=recompute). With the
behaviour policy's as the old ones, the ratio is part of the policy loss itself.
"""

import torch
import torch.distributed as dist

from atropos_hpc.config import CorrectionConf
from atropos_hpc.learner.backends.verl_api import (
    SAFETY_BOUND,
    compute_rollout_correction_and_rejection_mask,
)
from atropos_hpc.learner.batch import Batch, from_jagged


def correct(batch: Batch, conf: CorrectionConf) -> dict[str, float]:
    """Set the batch's importance weights, if the config asks for any. Needs old log-probs.

    A sequence without behaviour log-probs has weight 1. Returns, over all ranks, under off_policy/:
    weight_mean and weight_max (as used), rejected_fraction (of tokens with weight 0), and
    chi2_sequence (mean over sequences of the squared ratio, minus 1). Collective.
    """
    if conf.weights == conf.rejection == "none" or not batch.trained_sequences:
        return {}
    offsets = batch.tensors["response_mask"].offsets()
    old, behaviour, mask = (
        batch.tensors[name].values()
        for name in ("old_log_probs", "behaviour_log_probs", "response_mask")
    )
    behaviour = torch.where(behaviour.isnan(), old, behaviour)
    log_ratio = (old - behaviour) * mask
    weights = _weights(old, behaviour, mask, offsets, conf) if mask.any() else torch.zeros_like(old)
    batch.tensors["rollout_is_weights"] = from_jagged(weights, offsets)

    tokens, lengths = weights[mask.bool()].double(), offsets.diff()
    per_sequence = torch.segment_reduce(log_ratio.double(), "sum", lengths=lengths)
    per_sequence = per_sequence[_has_trained_tokens(mask, lengths)]
    squares = (2 * per_sequence).clamp(max=2 * SAFETY_BOUND).exp()
    sums = torch.tensor(
        [len(tokens), tokens.sum(), (tokens == 0).sum(), len(squares), squares.sum()],
        dtype=torch.float64,
    )
    maximum = tokens.max() if len(tokens) else torch.zeros((), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    count, total, rejected, sequences, squared = sums.tolist()
    return {
        "off_policy/weight_mean": total / count,
        "off_policy/weight_max": float(maximum),
        "off_policy/rejected_fraction": rejected / count,
        "off_policy/chi2_sequence": squared / sequences - 1,
    }


def _weights(
    old: torch.Tensor,
    behaviour: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    conf: CorrectionConf,
) -> torch.Tensor:
    """Return verl's weights times its rejection mask, flat like the arguments.

    verl takes padded tensors, [sequences, longest response].
    """
    padded = [
        torch.nested.to_padded_tensor(from_jagged(values, offsets), 0.0)
        for values in (old, behaviour, mask)
    ]
    weights, accepted, _ = compute_rollout_correction_and_rejection_mask(
        *padded,
        rollout_is=None if conf.weights == "none" else conf.weights,
        rollout_is_threshold=conf.threshold,
        rollout_rs=None if conf.rejection == "none" else conf.rejection,
        rollout_rs_threshold=None if conf.rejection == "none" else conf.rejection_threshold,
    )
    product = accepted if weights is None else weights.batch["rollout_is_weights"] * accepted
    inside = torch.arange(product.shape[1]) < offsets.diff()[:, None]
    flat: torch.Tensor = product[inside].to(old)
    return flat


def _has_trained_tokens(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return which sequences have a trained token; fillers have none."""
    return torch.segment_reduce(mask.double(), "sum", lengths=lengths) > 0
