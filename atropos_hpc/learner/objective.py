"""Translate `algorithm.*` into verl's actor config, from which `ppo_loss` assembles the objective.

Every formula is verl's: policy loss, clipping, aggregation, KL and entropy terms. Only the
translation is here; validate.py has checked the values.
"""

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.learner.backends.verl_api import (
    FSDPActorConfig,
    FSDPEngineConfig,
    PolicyLossConfig,
)


def objective(
    algorithm: AlgorithmConf, max_length: int, kl_coef: float | None = None
) -> FSDPActorConfig:
    """Return the config that verl's `ppo_loss` reads.

    `max_length` is model.max_length, by which `seq-mean-token-sum-norm` divides (arXiv 2503.20783).
    verl's own default is the longest response of the micro-batch, which depends on the packing.
    `kl_coef` is the present coefficient, where it adapts.

    `ppo_loss` writes the batch's totals into the config, so every step needs a new one.
    """
    options = algorithm.loss_options
    policy_options = {k: value for k, value in options.items() if hasattr(PolicyLossConfig, k)}
    actor_options = {k: value for k, value in options.items() if k not in policy_options}
    normalized = algorithm.aggregation == "seq-mean-token-sum-norm"
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=algorithm.loss, **policy_options),
        clip_ratio=algorithm.clip_low,
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        clip_ratio_c=algorithm.clip_dual,
        loss_agg_mode=algorithm.aggregation,
        loss_scale_factor=max_length if normalized else None,
        use_kl_loss=algorithm.kl_in == "loss" and algorithm.kl_coef != 0,
        kl_loss_coef=algorithm.kl_coef if kl_coef is None else kl_coef,
        kl_loss_type=algorithm.kl_estimator,
        entropy_coeff=algorithm.entropy_coef,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False),
        **actor_options,
    )
