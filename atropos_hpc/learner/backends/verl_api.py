"""All that the learner uses of verl 0.9.1, and every patch of it.

No other module imports verl. verl's engine interface is internal and changes between its versions.
When upgrading it, check the names below, the patches here, and the methods that `engine.Engine`
overrides.

The platform is imported first: verl chooses its device while its modules are imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from atropos_hpc.learner.backends.cpu_platform import ON_CPU

# isort: split
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import AdaptiveKLController, get_adv_estimator_fn, kl_penalty
from verl.trainer.ppo.rollout_corr_helper import (
    SAFETY_BOUND,
    compute_rollout_correction_and_rejection_mask,
)
from verl.utils import tensordict_utils, torch_functional
from verl.utils.device import get_device_id, get_device_name
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    ulysses_pad_and_slice_inputs,
)
from verl.workers.config import (
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
)
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils import losses
from verl.workers.utils.losses import ppo_loss

__all__ = [
    "ON_CPU",
    "SAFETY_BOUND",
    "AdaptiveKLController",
    "CheckpointConfig",
    "FSDPActorConfig",
    "FSDPEngineConfig",
    "FSDPEngineWithLMHead",
    "FSDPOptimizerConfig",
    "HFModelConfig",
    "PolicyLossConfig",
    "TensorDict",
    "compute_rollout_correction_and_rejection_mask",
    "gather_heads_scatter_seq",
    "gather_seq_scatter_heads",
    "get_adv_estimator_fn",
    "get_device_id",
    "get_device_name",
    "get_ulysses_sequence_parallel_group",
    "kl_penalty",
    "offload_policy",
    "patch_batches",
    "patch_log_probs",
    "ppo_loss",
    "prepare_micro_batches",
    "report_gradient_norm_on_all_ranks",
    "tensordict_utils",
    "ulysses_pad_and_slice_inputs",
]

if ON_CPU and get_device_name() != "cpu":
    raise ImportError(
        "verl was imported before atropos_hpc.learner.backends.verl_api, so it chose"
        f" the device {get_device_name()}: import verl_api first"
    )


def patch_log_probs() -> None:
    """Replace verl's log-probs from logits, where flash-attention is not installed.

    Reason (0.9.1): verl computes them token by token, and for bfloat16 in bfloat16, whose 8 bits
    are too few for log-probs whose differences become ratios.
    """
    if not torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
        vars(transformer_impl)["logprobs_from_logits"] = _log_probs_from_logits


def _log_probs_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """Return the log-probs of the labels, float32 [T], from logits, [T, vocabulary]."""
    logits = logits.float()
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def patch_batches(
    prepare: Callable[..., Any], collect: Callable[..., Any], pad: Callable[..., Any]
) -> None:
    """Replace verl's division of a batch, its collection of outputs, and its padding of responses.

    Reason (0.9.1): verl handles sequence by sequence, which takes longer than a small model's
    forward pass. Its `force_group_size` keeps groups together, but only if all have the same size
    and fit into a micro-batch.
    """
    vars(transformer_impl)["prepare_micro_batches"] = prepare
    vars(transformer_impl)["postprocess_batch_func"] = collect
    vars(losses)["no_padding_2_padding"] = pad


def report_gradient_norm_on_all_ranks(engine: Any) -> None:
    """Have the engine return its metrics on every rank.

    Reason (0.9.1): of ranks that share sequences (Ulysses), only the first returns them.
    """
    engine.is_mp_src_rank_with_outputs = lambda: True


@contextmanager
def offload_policy(make: Callable[..., Any]) -> Iterator[None]:
    """Replace the offload policy that verl gives to FSDP2; `make` gets the original first.

    Reason (0.9.1): verl gives no choice. It pins host memory, which needs an accelerator, and it
    offloads the weights of every frozen model.
    """
    names = vars(transformer_impl)
    original = names["CPUOffloadPolicy"]
    names["CPUOffloadPolicy"] = lambda pin_memory=True: make(original)
    try:
        yield
    finally:
        names["CPUOffloadPolicy"] = original
