"""What the training loop asks of a training backend."""

from typing import Any, Protocol

import torch

from atropos_hpc.learner.batch import Batch


class Backend(Protocol):
    """A policy that is trained, spread over all ranks of the default process group, and the frozen model it started from.

    The caller has initialised the process group, with gloo for host tensors ("gloo", or "cpu:gloo,cuda:nccl"). Every method that
    computes is collective: all ranks call it, with their own batch, at the same step.
    """

    rank: int
    world: int
    data_rank: int  # which share of a batch this rank trains, of `data_world`: ranks that share sequences (Ulysses) have the same
    data_world: int
    vocab_size: int

    @property
    def step_count(self) -> int:
        """Optimizer steps behind the weights: their policy version."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The trained model. Changed only by `update` and `load_state_dict`."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Its parameters and persistent buffers by name, for publishing: parameters as shards (DTensor). Collective. Not a copy.

        Frozen ones may be left out, where an adapter is trained.
        """
        ...

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """Compute log-probs of the response tokens under the present weights: jagged [B, response], float32, nats.

        Tokens that are not trained (zeros of `response_mask`) are not computed: their entries are 0.
        """
        ...

    def reference_log_probs(self, batch: Batch) -> torch.Tensor | None:
        """The same under the frozen reference; None if the run keeps none."""
        ...

    def update(self, batch: Batch, kl_coef: float | None = None) -> dict[str, float]:
        """One optimizer step. Needs old log-probs, and uses reference log-probs where the batch has them.

        `kl_coef`: the present weight of the KL in the loss, where it adapts; else algorithm.kl_coef.

        Returns, over all ranks: loss, pg_loss, kl_loss (as in the loss, 0 without one), kl_reference (mean over trained tokens of the
        k3 estimate), entropy and clip_fraction and ppo_kl (means over trained tokens, nats), the mismatch between the behaviour policy's
        log-probs and the learner's before this step, where the former are known: mismatch_mean and mismatch_max (absolute difference,
        nats), mismatch_kl (behaviour to learner), mismatch_chi2 (mean of the squared ratio learner / behaviour, less 1) and
        mismatch_ratio_max; grad_norm (before clipping), lr (of this step). A term that does not apply is absent. Raises ValueError for
        a batch without trained tokens.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state as nested dicts of tensors, sharded, for torch.distributed.checkpoint. Not a copy."""
        ...

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue from `state`, of the shape that `state_dict` gives, as after `step` optimizer steps."""
        ...

    def close(self) -> None:
        """Let go of the models. The process group is the caller's."""
        ...
