"""The interface of a training backend."""

from collections.abc import Callable
from typing import Protocol

import torch

from atropos_hpc.learner.batch import Batch
from atropos_hpc.learner.performance import Computed, FlopRates
from atropos_hpc.learner.state import StateDict


class Backend(Protocol):
    """A trained policy, sharded over all ranks, and the frozen model that it started from.

    The caller has initialised the default process group, with gloo for host tensors ("gloo", or
    "cpu:gloo,cuda:nccl"). Every method that computes is collective: all ranks call it, with their
    own batch, at the same step. The caller keeps the version; a backend only receives it.

    This rank trains part `data_rank` of `data_world` of each batch. Ranks that share sequences
    (Ulysses) have the same part.
    """

    rank: int
    world: int
    data_rank: int
    data_world: int
    vocab_size: int
    flop_rates: FlopRates | None  # of `update`; None: not known
    computed: Computed  # by the last `update`, over all ranks
    ratio_counts: list[float]  # of the last `update`, as in StepMetrics.histograms

    @property
    def module(self) -> torch.nn.Module:
        """The trained model. Only `update` and `load_state_dict` change it."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return parameters, as shards (DTensor), and persistent buffers, by name. Not a copy.

        Frozen ones may be missing where an adapter is trained. Collective.
        """
        ...

    def on_micro_batch(self, call: Callable[[], None]) -> None:
        """Have this rank call `call` at the beginning of each micro-batch of any pass."""
        ...

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """Return log-probs of the response tokens: jagged [B, response], float32, nats.

        Those of tokens that are not trained may be 0.
        """
        ...

    def reference_log_probs(self, batch: Batch) -> torch.Tensor | None:
        """Return the same under the frozen reference; None if the run has none."""
        ...

    def update(self, batch: Batch, version: int, kl_coef: float | None = None) -> dict[str, float]:
        """Make the optimizer step from `version` to `version` + 1.

        Needs old log-probs, and uses reference log-probs where the batch has them. `kl_coef` is the
        present weight of the KL in the loss; None means algorithm.kl_coef.

        Returns metrics over all ranks; one that does not apply is absent:
          loss, pg_loss, kl_loss: as in the loss; kl_loss is 0 without a KL term
          kl_reference: k3 estimate, mean over trained tokens, nats
          entropy, clip_fraction, ppo_kl: means over trained tokens, nats
          off_policy/: of the ratio learner / behaviour of trained tokens before this step, where
            the behaviour policy's log-probs are known: mean_ratio, max_ratio; abs_log_ratio_mean
            and abs_log_ratio_max, nats; kl, from behaviour to learner, nats; chi2, the mean of the
            squared ratio, minus 1
          off_policy/same_version/: of the tokens that the learner's own version sampled: mean_ratio
            and abs_log_ratio_p999, the 99.9th percentile of |log ratio|
          grad_norm: before clipping; lr: of this step

        Raises ValueError for a batch without trained tokens.
        """
        ...

    def state_dict(self) -> StateDict:
        """Return weights and optimizer state as nested dicts of sharded tensors. Not a copy."""
        ...

    def load_state_dict(self, state: StateDict) -> None:
        """Restore a state of the shape that `state_dict` returns."""
        ...

    def close(self) -> None:
        """Release the models. The process group is the caller's."""
        ...
