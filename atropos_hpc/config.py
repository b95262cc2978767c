"""Declare every config key of a run: its type, default, help text and allowed values.

Hydra merges the files of configs/ and the command line into these classes, so an unknown key or a
wrong type is refused while composing. `atropos_hpc.validate` checks what the declarations say, and
which keys contradict one another. `python docs/make_config.py` writes docs/config.md and the
comments of configs/ from here. This module imports neither Hydra nor OmegaConf.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from atropos_hpc.config_launch import ClusterConf as ClusterConf
from atropos_hpc.config_launch import LaunchConf as LaunchConf
from atropos_hpc.config_launch import RoleConf as RoleConf
from atropos_hpc.config_launch import RolesConf as RolesConf
from atropos_hpc.config_output import MOST_STEPS
from atropos_hpc.config_output import ExportConf as ExportConf
from atropos_hpc.config_output import MlflowConf as MlflowConf
from atropos_hpc.config_output import TrackioConf as TrackioConf
from atropos_hpc.config_output import WandbConf as WandbConf
from atropos_hpc.config_rollout import EnvironmentConf as EnvironmentConf
from atropos_hpc.config_rollout import EvaluationConf as EvaluationConf
from atropos_hpc.config_rollout import RolloutConf as RolloutConf
from atropos_hpc.config_rollout import TrajectoriesConf as TrajectoriesConf
from atropos_hpc.schema import MISSING, key, section


@dataclass
class LoraConf:
    """Train a LoRA adapter (arXiv 2106.09685) instead of all weights. Only the adapter is published
    and checkpointed."""

    rank: int = key(0, "rank of the adapter's matrices; 0 trains all weights", ge=0, le=512)
    alpha: int = key(16, "the adapter's output is scaled by alpha / rank", ge=1, le=1 << 16)
    targets: List[str] = key(
        [],
        "name suffixes of the linear layers to adapt, such as q_proj; empty: every linear layer "
        "but the output layer",
    )


@dataclass
class ModelConf:
    """A causal language model in Hugging Face format."""

    path: Optional[str] = key(
        None,
        "directory or Hugging Face Hub name; null: the model that `make` creates",
        path="any",
    )
    make: Optional[str] = key(
        None,
        "Python module that creates the model: run as `python -m MODULE --out DIR ...` by the "
        "trainer's interpreter; the result is cached by content",
    )
    make_options: Dict[str, Any] = key({}, "options of `make`, passed as --key=value")
    max_length: int = key(
        2048,
        "maximum length of prompt plus completion, tokens; longer sequences are refused, never "
        "truncated",
        ge=2,
        le=1 << 24,
    )
    dtype: str = key(
        "bfloat16",
        "data type of computation and serving; the learner's master weights are always float32",
        choices=("bfloat16", "float32"),
    )
    attention: str = key(
        "sdpa",
        "attention implementation of the learner",
        choices=("sdpa", "flash_attention_2", "eager"),
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the model")
    lora: LoraConf = section(LoraConf)


@dataclass
class CorrectionConf:
    """Correct for the difference between the servers' log-probs and the learner's. Needs
    old_log_probs=recompute."""

    weights: str = key(
        "none", "importance weights, learner / servers", choices=("none", "token", "sequence")
    )
    threshold: str = key(
        "2.0",
        'truncate weights above this value; a range such as "0.5_2.0" sets weights outside it to 0',
    )
    rejection: str = key(
        "none",
        "mask tokens or sequences that differ too much, by verl's names: token_k1, seq_mean_k3, "
        "...; several separated by commas",
    )
    rejection_threshold: str = key(
        "none",
        "threshold of each rejection, separated by commas; for a k1 a range of ratios such as "
        '"0.5_2.0"',
    )


@dataclass
class AlgorithmConf:
    """GRPO (DeepSeekMath, arXiv 2402.03300): group-relative advantages, a clipped policy loss and
    a KL penalty towards the frozen reference model."""

    advantage: str = key(
        "grpo",
        "advantage estimator, by verl's name; token-level advantages of the environment take "
        "precedence",
        choices=("grpo", "grpo_passk", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"),
    )
    normalize_by_std: bool = key(
        True, "divide advantages by the group's standard deviation (grpo, grpo_passk)"
    )
    loss: str = key(
        "vanilla",
        "policy loss, by verl's name; clip_cov and kl_cov select tokens within each micro-batch",
        choices=("vanilla", "gspo", "cispo", "sapo", "gpg", "clip_cov", "kl_cov"),
    )
    loss_options: Dict[str, float] = key(
        {},
        "options of the loss: sapo has tau_pos, tau_neg; clip_cov has clip_cov_ratio, clip_cov_lb, "
        "clip_cov_ub; kl_cov has kl_cov_ratio, ppo_kl_coef",
        ge=-1000,
        le=1000,
    )
    clip_low: float = key(0.2, "clip ratios below 1 - clip_low", ge=0, le=1)
    clip_high: float = key(0.2, "clip ratios above 1 + clip_high", ge=0, le=100)
    clip_dual: float = key(
        3.0,
        "bound of the loss for negative advantages (dual-clip PPO, arXiv 1912.09729)",
        gt=1,
        le=1000,
    )
    aggregation: str = key(
        "token-mean",
        "reduction of token losses to one value",
        choices=(
            "token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-mean",
            "seq-mean-token-sum-norm",
        ),
    )
    kl_coef: float = key(
        0.001,
        "weight of the KL to the reference model; the KL is reported even if this is 0",
        ge=0,
        le=100,
    )
    kl_estimator: str = key(
        "k3",
        "estimator of the KL (http://joschu.net/blog/kl-approx.html)",
        choices=("k1", "k2", "k3", "abs"),
    )
    kl_in: str = key(
        "loss",
        "where the KL penalty is applied; reward: subtracted from the scores before the baseline",
        choices=("loss", "reward"),
    )
    kl_metric: bool = key(
        True, "keep the frozen reference for the metric kl_reference even if kl_coef is 0"
    )
    kl_target: Optional[float] = key(
        None,
        "adapt kl_coef to reach this KL, nats per token (arXiv 1909.08593); null: kl_coef is "
        "constant",
        gt=0,
        le=100,
    )
    kl_horizon: int = key(10000, "horizon of the adaptation of kl_coef, sequences", ge=1, le=10**9)
    entropy_coef: float = key(0.0, "weight of the entropy bonus", ge=0, le=100)
    old_log_probs: str = key(
        "behaviour",
        "denominator of the ratio: the log-probs of the servers (behaviour), or the learner's own, "
        "at the cost of one more forward pass (recompute)",
        choices=("behaviour", "recompute"),
    )
    correction: CorrectionConf = section(CorrectionConf)
    batch_size: int = key(256, "sequences per optimizer step, over all ranks", ge=1, le=1 << 20)

    @property
    def needs_reference(self) -> bool:
        """Whether the run keeps the frozen reference model."""
        return self.kl_coef != 0 or self.kl_metric


@dataclass
class TrainerConf:
    """verl's FSDP2 engine, one process per rank."""

    backend: str = key("verl", "training backend", choices=("verl", "deepspeed"))
    steps: int = key(100, "optimizer steps; each produces one policy version", ge=1, le=MOST_STEPS)
    learning_rate: float = key(1e-6, "learning rate after warm-up", ge=0, le=10)
    warmup_steps: int = key(0, "steps of linear warm-up", ge=0, le=MOST_STEPS)
    schedule: str = key(
        "constant",
        "learning rate after warm-up; cosine decays to 0 at the last step",
        choices=("constant", "cosine"),
    )
    weight_decay: float = key(0.01, "weight decay of the optimizer", ge=0, le=10)
    grad_clip: float = key(1.0, "maximum gradient norm", gt=0, le=1e6)
    max_skipped_steps: int = key(
        10,
        "fail when this many steps in a row were skipped because their gradients were not finite",
        ge=1,
        le=MOST_STEPS,
    )
    tokens_per_micro_batch: Optional[int] = key(
        None,
        "tokens per rank and micro-batch; at least model.max_length; null: 16384 on GPUs, 2048 on "
        "a CPU, or model.max_length if that is more",
        ge=1,
        le=1 << 24,
    )
    gradient_checkpointing: Optional[bool] = key(
        None,
        "recompute activations in the backward pass instead of storing them; null: on GPUs, and on "
        "a CPU where the rank would otherwise need more than half of the free memory",
    )
    share_prefixes: bool = key(
        True,
        "compute the tokens with which the sequences of a group begin once, not in each sequence; "
        "only with model.attention=sdpa and full attention in every layer",
    )
    optimizer_state: str = key(
        "float32",
        "memory per trained parameter. float32: 16 bytes for weight, gradient and two moments. "
        "bfloat16: 10 bytes; the weight stays an exact float32 in two halves, gradient and moments "
        "are bfloat16; for backend=verl and model.dtype=bfloat16",
        choices=("float32", "bfloat16"),
    )
    offload: bool = key(False, "keep parameters and optimizer state in host memory between uses")
    checkpoint_every: int = key(
        20,
        "steps between checkpoints: at most this much work is lost with the learner",
        ge=1,
        le=MOST_STEPS,
    )
    keep_checkpoints: int = key(2, "number of newest complete checkpoints to keep", ge=1, le=10_000)
    keep_checkpoints_every: int = key(
        0, "also keep checkpoints at multiples of this many steps; 0: none", ge=0, le=MOST_STEPS
    )
    threads: Optional[int] = key(None, "CPU threads per rank; null: torch's default", ge=1, le=1024)
    fsdp_config: Dict[str, Any] = key(
        {},
        "further settings of verl's engine, by verl's names, such as reshard_after_forward, "
        "fsdp_size, mixed_precision: {reduce_dtype: bf16}, ulysses_sequence_parallel_size",
    )
    optim: Dict[str, Any] = key(
        {},
        "further settings of the optimizer, by verl's names, such as optimizer, optimizer_impl, "
        "betas, min_lr_ratio, num_cycles, override_optimizer_config",
    )
    deepspeed: Dict[str, Any] = key(
        {}, "DeepSpeed's own JSON config, for backend=deepspeed; what other keys set is refused"
    )


@dataclass
class StalenessConf:
    """Train while the next batches are generated, with a bound on how far behind they may be."""

    max: int = key(
        1, "maximum staleness of a sequence, policy versions; 0: on-policy", ge=0, le=10_000
    )


@dataclass
class PolicyConf:
    """Publication of new weights by the learner to the servers."""

    sync: str = key(
        "full",
        "content of a published version: all weights, or a lossless delta to the previous version",
        choices=("full", "delta"),
    )
    anchor_every: int = key(
        16,
        "with sync=delta, publish a full version every `anchor_every` versions; a server that "
        "starts reads the newest full version and the deltas since",
        ge=1,
        le=10_000,
    )
    keep: int = key(
        2, "published versions to keep on disk, with the versions they depend on", ge=1, le=10_000
    )
    max_bytes: Optional[int] = key(
        None,
        "maximum size of the policy store, bytes; a version that exceeds it is not published, and "
        "an alarm is raised; null: the free space of the filesystem",
        ge=1,
        le=1 << 60,
    )
    update_mode: str = key(
        "keep",
        "requests in flight while a server loads a new version: continue them, let them finish "
        "first, or abort them",
        choices=("keep", "wait", "abort"),
    )
    kv: str = key(
        "keep",
        "KV cache of requests in flight over an update: keep it, or recompute it by prefilling",
        choices=("keep", "recompute"),
    )
    poll_s: float = key(
        0.5, "interval at which node agents look for new versions, seconds", ge=0.01, le=3600
    )
    cache: str = key(
        "/dev/shm",
        "directory of a rollout node's copy of the newest version, shared by its servers; needs "
        "space for two versions",
    )


@dataclass
class Config:
    """The config of a run."""

    run_dir: str = key(
        MISSING,
        "run directory; given again, the run in it is resumed. The points of a multirun become "
        "subdirectories. Default: a new directory named after the date",
    )
    seed: int = key(
        0, "seed of the base model, the environments' sampling and the learner", ge=0, le=2**32 - 1
    )
    model: ModelConf = section(ModelConf)
    environment: EnvironmentConf = section(EnvironmentConf)
    more_environments: Dict[str, EnvironmentConf] = key(
        {}, "further environments by name, each a map with the keys of `environment`"
    )
    algorithm: AlgorithmConf = section(AlgorithmConf)
    trainer: TrainerConf = section(TrainerConf)
    rollout: RolloutConf = section(RolloutConf)
    staleness: StalenessConf = section(StalenessConf)
    policy: PolicyConf = section(PolicyConf)
    trajectories: TrajectoriesConf = section(TrajectoriesConf)
    evaluation: EvaluationConf = section(EvaluationConf)
    wandb: WandbConf = section(WandbConf)
    tensorboard: bool = key(False, "also write the metrics as TensorBoard files to RUN/tensorboard")
    mlflow: MlflowConf = section(MlflowConf)
    trackio: TrackioConf = section(TrackioConf)
    export: ExportConf = section(ExportConf)
    cluster: ClusterConf = section(ClusterConf)
    launch: LaunchConf = section(LaunchConf)
    roles: RolesConf = section(RolesConf)


def micro_batch_tokens(config: Config) -> int:
    """Return trainer.tokens_per_micro_batch, or what null stands for."""
    if config.trainer.tokens_per_micro_batch is not None:
        return config.trainer.tokens_per_micro_batch
    return max(config.model.max_length, 16384 if config.roles.trainer.gpus_per_node else 2048)


def environments(config: Config) -> dict[str, EnvironmentConf]:
    """Map the dotted key of each environment to its section, the main environment first."""
    more = config.more_environments
    return {
        "environment": config.environment,
        **{f"more_environments.{name}": more[name] for name in sorted(more)},
    }


def environment_name(key: str) -> str:
    """Return the name of an environment in metrics: the last part of its key."""
    return key.rpartition(".")[2]
