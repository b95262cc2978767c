"""Correcting for behaviour log-probs that differ from the learner's: stale versions, and engines that round differently.

The ratio learner / behaviour of every trained token, or of every sequence, becomes a weight of its policy loss: cut down to a threshold
(truncated importance sampling, https://fengyao.notion.site/off-policy-rl), zero outside a range, or zero where a divergence is too large
(rejection). The weights are verl's rollout correction; its rejection mask is taken as weights of zero, so that means are still over all
tokens and sequences of the batch: a batch of which much is rejected makes a smaller step, and one of which all is, none.

It needs the learner's own log-probs as the old ones (algorithm.old_log_probs=recompute). With the behaviour policy's as the old ones, the
ratio stands in the policy loss itself.
"""

import torch
import torch.distributed as dist

from atropos_hpc.config import CorrectionConf
from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl
from atropos_hpc.learner.batch import Batch

# isort: split
from verl.trainer.ppo.rollout_corr_helper import (
    SAFETY_BOUND,
    compute_rollout_correction_and_rejection_mask,
)


def correct(batch: Batch, conf: CorrectionConf) -> dict[str, float]:
    """Give the batch its weights, where the config asks for any. Collective. Needs old log-probs.

    A sequence without behaviour log-probs has weight 1. Returns, over all ranks: importance_mean and importance_max (of the weights
    as used), rejected_fraction (of tokens whose weight is 0), chi2_sequence (mean over sequences of the squared ratio, less 1).
    """
    if conf.weights == conf.rejection == "none":
        return {}
    offsets = batch.tensors["response_mask"].offsets()
    old, behaviour, mask = (
        batch.tensors[name].values()
        for name in ("old_log_probs", "behaviour_log_probs", "response_mask")
    )
    behaviour = torch.where(behaviour.isnan(), old, behaviour)
    log_ratio = (old - behaviour) * mask
    weights = _weights(old, behaviour, mask, offsets, conf) if mask.any() else torch.zeros_like(old)
    batch.tensors["rollout_is_weights"] = torch.nested.nested_tensor_from_jagged(weights, offsets)

    tokens, lengths = weights[mask.bool()].double(), offsets.diff()
    of_sequence = torch.segment_reduce(log_ratio.double(), "sum", lengths=lengths)[
        _with_tokens(mask, lengths)
    ]
    squares = (2 * of_sequence).clamp(max=2 * SAFETY_BOUND).exp()
    sums = torch.tensor(
        [len(tokens), tokens.sum(), (tokens == 0).sum(), len(squares), squares.sum()],
        dtype=torch.float64,
    )
    greatest = tokens.max() if len(tokens) else torch.zeros((), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    number, total, rejected, sequences, squared = sums.tolist()
    return {
        "importance_mean": total / number,
        "importance_max": float(greatest),
        "rejected_fraction": rejected / number,
        "chi2_sequence": squared / sequences - 1,
    }


def _weights(
    old: torch.Tensor,
    behaviour: torch.Tensor,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    conf: CorrectionConf,
) -> torch.Tensor:
    """verl's weights times its rejection mask, flat like the arguments. verl takes padded tensors [sequences, longest response]."""
    padded = [
        torch.nested.to_padded_tensor(torch.nested.nested_tensor_from_jagged(v, offsets), 0.0)
        for v in (old, behaviour, mask)
    ]
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        *padded,
        rollout_is=None if conf.weights == "none" else conf.weights,
        rollout_is_threshold=conf.threshold,
        rollout_rs=None if conf.rejection == "none" else conf.rejection,
        rollout_rs_threshold=None if conf.rejection == "none" else conf.rejection_threshold,
    )
    both = kept if weights is None else weights.batch["rollout_is_weights"] * kept
    inside = torch.arange(both.shape[1]) < offsets.diff()[:, None]
    flat: torch.Tensor = both[inside].to(old)
    return flat


def _with_tokens(mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which sequences have anything to train: fillers have not."""
    return torch.segment_reduce(mask.double(), "sum", lengths=lengths) > 0
