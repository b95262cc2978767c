"""The objective, as verl's actor config: which policy loss, clipping, aggregation, KL and entropy terms `ppo_loss` puts together.

Every formula is verl's. What stands here is only the translation of `algorithm.*`, and what its values must be.
"""

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl
from atropos_hpc.validate import LOSS_OPTIONS

# isort: split
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, PolicyLossConfig

# bypass_mode and dro need options that `algorithm` doesn't have; geo_mean divides by the size of the micro-batch, whatever the batch is.
LOSSES = tuple(sorted(set(POLICY_LOSS_REGISTRY) - {"bypass_mode", "dro", "geo_mean"}))
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
KL_ESTIMATORS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")


def objective(
    algorithm: AlgorithmConf, max_length: int, kl_coef: float | None = None
) -> FSDPActorConfig:
    """What verl's `ppo_loss` reads. `max_length`: model.max_length, by which `seq-mean-token-sum-norm` divides (arXiv 2503.20783);
    left to verl it would be the longest response of the micro-batch, and so depend on how sequences were packed. `kl_coef`: the
    present coefficient, where it adapts; else algorithm.kl_coef.

    `ppo_loss` writes the batch's totals into the config: make one for each step. Raises ValueError naming the key.
    """
    for key, value, known in (
        ("loss", algorithm.loss, LOSSES),
        ("aggregation", algorithm.aggregation, AGGREGATIONS),
        ("kl_estimator", algorithm.kl_estimator, KL_ESTIMATORS),
    ):
        if value not in known:
            raise ValueError(
                f"algorithm.{key}={value}: verl has no such one; use one of {', '.join(known)}"
            )
    for option in algorithm.loss_options:
        if option not in LOSS_OPTIONS.get(algorithm.loss, ()):
            raise ValueError(
                f"algorithm.loss_options.{option}: algorithm.loss={algorithm.loss} has no such option"
            )
    in_loss = algorithm.kl_in == "loss" and algorithm.kl_coef != 0
    of_policy = {
        name: value
        for name, value in algorithm.loss_options.items()
        if hasattr(PolicyLossConfig, name)
    }
    of_actor = {
        name: value for name, value in algorithm.loss_options.items() if name not in of_policy
    }
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=algorithm.loss, **of_policy),
        clip_ratio=algorithm.clip_low,
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        clip_ratio_c=algorithm.clip_dual,
        loss_agg_mode=algorithm.aggregation,
        loss_scale_factor=max_length
        if algorithm.aggregation == "seq-mean-token-sum-norm"
        else None,
        use_kl_loss=in_loss,
        kl_loss_coef=algorithm.kl_coef if kl_coef is None else kl_coef,
        kl_loss_type=algorithm.kl_estimator,
        entropy_coeff=algorithm.entropy_coef,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False),
        **of_actor,
    )
