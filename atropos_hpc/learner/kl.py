"""The KL to the reference: its coefficient, and its place in the reward (algorithm.kl_in=reward).

In the reward it is taken off the scores before any baseline is: score - coefficient * sum over the trained tokens of
kl(old log-prob, reference log-prob), as RLOO (arXiv 2402.14740) and verl's `apply_kl_penalty` do. Advantages that an environment gives are
final, and see nothing of it.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl
from atropos_hpc.learner.batch import Batch, flatten

# isort: split
from verl.trainer.ppo.core_algos import AdaptiveKLController, FixedKLController, kl_penalty


class Coefficient:
    """The coefficient's value, from step to step: fixed, or steered so that the KL comes to algorithm.kl_target (arXiv 1909.08593)."""

    def __init__(self, algorithm: AlgorithmConf, stored: float | None = None) -> None:
        """`stored`: the value that a checkpoint holds; of no account unless the coefficient adapts."""
        self._sequences = algorithm.batch_size
        self._controller: AdaptiveKLController | FixedKLController
        if algorithm.kl_target is None:
            self._controller = FixedKLController(algorithm.kl_coef)
        else:
            start = algorithm.kl_coef if stored is None else stored
            self._controller = AdaptiveKLController(
                start, algorithm.kl_target, algorithm.kl_horizon
            )

    @property
    def value(self) -> float:
        return float(self._controller.value)

    def update(self, kl: float | None) -> None:
        """After a step, with its KL: the mean over trained tokens, nats. None: the step had no reference."""
        if kl is not None:
            self._controller.update(kl, self._sequences)


def penalize(
    batch: Batch, groups: Sequence[Group], algorithm: AlgorithmConf, coefficient: float
) -> dict[str, float]:
    """With algorithm.kl_in=reward, compute the batch's advantages anew, from scores less the KL. `groups`: those it was made of.

    Collective. Needs old and reference log-probs. Returns kl_penalty: what was taken off, mean over the trained sequences of all ranks.
    """
    if algorithm.kl_in != "reward":
        return {}
    tensors = batch.tensors
    old, reference, mask = (
        tensors[name].values() for name in ("old_log_probs", "ref_log_prob", "response_mask")
    )
    each: torch.Tensor = kl_penalty(old.double(), reference.double(), algorithm.kl_estimator) * mask  # type: ignore[arg-type]
    of_sequence = (
        torch.segment_reduce(each, "sum", lengths=tensors["response_mask"].offsets().diff()).numpy()
        * coefficient
    )
    penalties = np.zeros(len(batch.kept))
    penalties[batch.kept] = of_sequence[: batch.kept.sum()]
    advantages = torch.from_numpy(flatten(groups, algorithm, penalties, batch.copies).advantages)
    own = tensors["advantages"]
    fillers = own.values()[len(advantages) :]
    tensors["advantages"] = torch.nested.nested_tensor_from_jagged(
        torch.cat([advantages, fillers]), own.offsets()
    )
    totals = torch.tensor([penalties.sum(), batch.kept.sum()], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return {"kl_penalty": float(totals[0] / totals[1].clamp(min=1))}
