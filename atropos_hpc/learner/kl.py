"""The KL to the reference: its coefficient, and its use as a penalty on the reward.

With algorithm.kl_in=reward, it is subtracted from the scores before the baseline is computed:
score - coefficient * sum over the trained tokens of kl(old log-prob, reference log-prob), as RLOO
(arXiv 2402.14740) and verl's `apply_kl_penalty` do. Advantages that an environment gives are final
and are not changed.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.learner.backends.verl_api import AdaptiveKLController, kl_penalty
from atropos_hpc.learner.batch import Batch, from_jagged
from atropos_hpc.learner.sequences import flatten


def next_coefficient(algorithm: AlgorithmConf, coefficient: float, kl: float | None) -> float:
    """Return the coefficient after a step whose KL was `kl`: the mean over trained tokens, nats.

    It is constant, or adapts so that the KL approaches algorithm.kl_target (arXiv 1909.08593).
    `kl` is None if the step had no reference. A KL that is not finite changes nothing.
    """
    if algorithm.kl_target is None or kl is None or not math.isfinite(kl):
        return coefficient
    controller = AdaptiveKLController(coefficient, algorithm.kl_target, algorithm.kl_horizon)
    controller.update(kl, algorithm.batch_size)
    return float(controller.value)


def penalize(
    batch: Batch, groups: Sequence[Group], algorithm: AlgorithmConf, coefficient: float
) -> dict[str, float]:
    """With algorithm.kl_in=reward, recompute the batch's advantages from scores less the KL.

    `groups` are those that the batch was made of. Needs old and reference log-probs. Returns
    kl_penalty: what was subtracted, mean over the trained sequences of all ranks. Collective.
    """
    if algorithm.kl_in != "reward":
        return {}
    tensors = batch.tensors
    old, reference, mask = (
        tensors[name].values() for name in ("old_log_probs", "ref_log_prob", "response_mask")
    )
    per_token: torch.Tensor = kl_penalty(
        old.double(),
        reference.double(),
        algorithm.kl_estimator,  # type: ignore[arg-type]
    )
    lengths = tensors["response_mask"].offsets().diff()
    per_sequence = torch.segment_reduce(per_token * mask, "sum", lengths=lengths) * coefficient
    penalties = np.zeros(len(batch.included))
    penalties[batch.included] = per_sequence.numpy()[: batch.included.sum()]
    sequences = flatten(groups, algorithm, penalties, batch.replicas)
    advantages = torch.from_numpy(sequences.advantages)
    own = tensors["advantages"]
    fillers = own.values()[len(advantages) :]
    tensors["advantages"] = from_jagged(torch.cat([advantages, fillers]), own.offsets())
    totals = torch.tensor([penalties.sum(), batch.included.sum()], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return {"kl_penalty": float(totals[0] / totals[1].clamp(min=1))}
