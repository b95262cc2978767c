"""What is wrong with a config that its types let through: values out of range, and keys that contradict one another.

Looks at no file and starts nothing. What depends on this machine, the model, the environment or the cluster is checked beside it
(launch/preflight.py), and worded as the same `Problem`.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from atropos_hpc.config import (
    AlgorithmConf,
    Config,
    EnvironmentConf,
    environment_name,
    environments,
    lookup,
)


@dataclass(frozen=True)
class Problem:
    """Something wrong with the config: the key to change, and what is wrong with its value."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": ("sdpa", "flash_attention_2", "eager"),
    "algorithm.advantage": (
        "grpo",
        "grpo_passk",
        "rloo",
        "opo",
        "gpg",
        "reinforce_plus_plus_baseline",
    ),
    "algorithm.loss": ("vanilla", "gspo", "cispo", "sapo", "gpg", "clip_cov", "kl_cov"),
    "algorithm.aggregation": (
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ),
    "algorithm.kl_estimator": ("k1", "k2", "k3", "abs"),
    "algorithm.kl_in": ("loss", "reward"),
    "algorithm.old_log_probs": ("behaviour", "recompute"),
    "algorithm.correction.weights": ("none", "token", "sequence"),
    "trainer.backend": ("verl", "deepspeed"),
    "trainer.schedule": ("constant", "cosine"),
    "policy.sync": ("full", "delta"),
    "policy.update_mode": ("keep", "wait", "abort"),
    "trajectories.server": ("durable", "atropos"),
    "wandb.mode": ("disabled", "offline", "online"),
    "launch.allocation": ("local", "het", "split", "single"),
}

AT_LEAST = {
    "model.max_length": 2,
    "model.lora.rank": 0,
    "model.lora.alpha": 1,
    "algorithm.batch_size": 1,
    "algorithm.kl_coef": 0,
    "algorithm.kl_horizon": 1,
    "algorithm.entropy_coef": 0,
    "algorithm.clip_low": 0,
    "algorithm.clip_high": 0,
    "algorithm.clip_dual": 1,
    "trainer.steps": 1,
    "trainer.learning_rate": 0,
    "trainer.warmup_steps": 0,
    "trainer.weight_decay": 0,
    "trainer.tokens_per_micro_batch": 1,
    "trainer.checkpoint_every": 1,
    "trainer.keep_checkpoints": 1,
    "trainer.keep_checkpoints_every": 0,
    "rollout.servers": 1,
    "rollout.tensor_parallel": 1,
    "rollout.max_sequences": 1,
    "staleness.max": 0,
    "policy.keep": 1,
    "policy.anchor_every": 1,
    "trajectories.max_body_bytes": 1 << 16,
    "trajectories.segment_bytes": 1 << 20,
    "evaluation.every": 0,
    "launch.restarts": 0,
    "launch.requeues": 0,
    "launch.minutes": 1,
    "launch.signal_s": 0,
    "roles.trainer.nodes": 1,
    "roles.trainer.ranks_per_node": 1,
    "roles.trainer.cpus_per_task": 1,
    "roles.trainer.gpus_per_node": 0,
    "roles.rollout.nodes": 1,
    "roles.rollout.cpus_per_task": 1,
    "roles.rollout.gpus_per_node": 0,
}

# algorithm.correction.rejection, by verl's names, and how a number or a range is written there
REJECTIONS = tuple(
    f"{kind}_k{k}"
    for kind in ("token", "seq_sum", "seq_mean", "seq_max")
    for k in (1, 2, 3)
    if f"{kind}{k}" != "seq_max1"
)
RANGE = r"\d*\.?\d+(_\d*\.?\d+)?"

# fields of Atropos' own environment config that follow from the run's, and where to change them instead; {} is the environment's key
ENVIRONMENT_OWN = {
    "group_size": "{}.group_size", "max_num_workers": "{}.concurrency", "inference_weight": "{}.weight",
    "min_batch_allocation": "{}.min_batch_allocation", "max_token_length": "model.max_length", "tokenizer_name": "model.path",
    "max_batches_offpolicy": "staleness.max", "steps_per_eval": "evaluation.every", "total_steps": "trainer.steps",
    "batch_size": "algorithm.batch_size", "use_wandb": "wandb.mode", "rollout_server_url": "trajectories.server",
}  # fmt: skip

# what DeepSpeed's JSON could say, and another key does
DEEPSPEED_OWN = {
    "train_batch_size": "algorithm.batch_size", "train_micro_batch_size_per_gpu": "trainer.tokens_per_micro_batch",
    "gradient_accumulation_steps": "trainer.tokens_per_micro_batch", "gradient_clipping": "trainer.grad_clip",
    "optimizer": "trainer.learning_rate", "scheduler": "trainer.schedule", "bf16": "model.dtype", "fp16": "model.dtype",
}  # fmt: skip

# trainer.fsdp_config and trainer.optim, by verl's names; and those of which another key of ours decides
FSDP_CONFIG = (
    "entropy_checkpointing", "entropy_from_logits_chunk_size", "entropy_from_logits_with_chunking", "forward_prefetch", "fsdp_size",
    "full_determinism", "mixed_precision", "optimizer_offload", "pad_to_length", "pad_to_length_bucket", "param_offload",
    "reshard_after_forward", "ulysses_sequence_parallel_size", "use_no_sync_for_gradient_accumulation", "use_torch_compile", "wrap_policy",
)  # fmt: skip
OPTIM = (
    "betas", "lr_warmup_steps_ratio", "min_lr_ratio", "num_cycles", "optimizer", "optimizer_impl", "override_optimizer_config",
    "zero_indexed_step",
)  # fmt: skip
VERL_OWN = {
    "fsdp_config.offload_policy": "trainer.offload", "fsdp_config.model_dtype": "model.dtype", "fsdp_config.dtype": "model.dtype",
    "fsdp_config.max_token_len_per_gpu": "trainer.tokens_per_micro_batch", "fsdp_config.strategy": "trainer.backend",
    "fsdp_config.seed": "seed", "optim.lr": "trainer.learning_rate", "optim.weight_decay": "trainer.weight_decay",
    "optim.lr_warmup_steps": "trainer.warmup_steps", "optim.lr_scheduler_type": "trainer.schedule",
    "optim.warmup_style": "trainer.schedule", "optim.clip_grad": "trainer.grad_clip", "optim.grad_clip": "trainer.grad_clip",
    "optim.total_training_steps": "trainer.steps",
}  # fmt: skip

# algorithm.loss_options of each loss, by verl's names
LOSS_OPTIONS = {
    "sapo": ("tau_pos", "tau_neg"),
    "clip_cov": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    "kl_cov": ("kl_cov_ratio", "ppo_kl_coef"),
}

ABOVE_ZERO = (
    "trainer.grad_clip",
    "rollout.memory_utilization",
    "policy.poll_s",
    "evaluation.timeout_s",
    "launch.backoff_s",
    "launch.start_timeout_s",
    "launch.step_timeout_s",
    "launch.save_timeout_s",
    "launch.grace_s",
)


def problems(config: Config) -> list[Problem]:
    """Everything wrong that the config alone shows, each with its key. Looks at no file and starts nothing."""
    return [*_single_values(config), *_combinations(config)]


def _single_values(config: Config) -> Iterator[Problem]:
    for key, choices in CHOICES.items():
        if (value := lookup(config, key)) not in choices:
            yield Problem(
                key,
                f"{value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}",
            )
    for key, least in AT_LEAST.items():
        if not (value := lookup(config, key)) >= least:
            yield Problem(key, f"{value} is less than {least}")
    for key in ABOVE_ZERO:
        if not (value := lookup(config, key)) > 0:
            yield Problem(key, f"{value} is not above 0")


def _combinations(config: Config) -> Iterator[Problem]:
    algorithm, trainer = config.algorithm, config.trainer
    for key, environment in environments(config).items():
        yield from _environment(key, environment, algorithm)
    if (floors := sum(each.min_batch_allocation for each in environments(config).values())) > 1:
        yield Problem(
            "environment.min_batch_allocation",
            f"and those of more_environments add up to {floors:g}, more than a whole batch",
        )
    yield from _algorithm(algorithm)
    if trainer.tokens_per_micro_batch < config.model.max_length:
        longest = f"one sequence of model.max_length={config.model.max_length} tokens"
        yield Problem(
            "trainer.tokens_per_micro_batch",
            f"{trainer.tokens_per_micro_batch} cannot hold {longest}",
        )
    yield from _verl(config)
    yield from _deepspeed(config)
    if config.model.attention == "flash_attention_2" and config.model.dtype == "float32":
        yield Problem(
            "model.attention",
            "flash_attention_2 computes in bfloat16, and model.dtype is float32; use sdpa",
        )
    if config.model.path is None and config.model.make is None:
        yield Problem("model.path", "is needed: a model's directory, or its name on the hub")
    if config.rollout.memory_utilization > 1:
        yield Problem(
            "rollout.memory_utilization",
            f"{config.rollout.memory_utilization} is more than the whole memory",
        )
    ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
    if config.trajectories.server == "atropos" and ranks > 1:
        yield Problem(
            "trajectories.server",
            f"atropos serves one trainer rank, roles.trainer has {ranks}; use durable",
        )


def _environment(
    key: str, environment: EnvironmentConf, algorithm: AlgorithmConf
) -> Iterator[Problem]:
    """What is wrong with the environment at that key."""
    for name, least in (
        ("group_size", 1),
        ("workers", 1),
        ("concurrency", 1),
        ("min_batch_allocation", 0),
    ):
        if not (value := getattr(environment, name)) >= least:
            yield Problem(f"{key}.{name}", f"{value} is less than {least}")
    for name in ("request_timeout_s", "weight"):
        if not (value := getattr(environment, name)) > 0:
            yield Problem(f"{key}.{name}", f"{value} is not above 0")
    if environment.group_size == 1 and algorithm.advantage in CHOICES["algorithm.advantage"]:
        nothing = f"1 leaves algorithm.advantage={algorithm.advantage} nothing to compare a sequence with; at least 2"
        yield Problem(f"{key}.group_size", nothing)
    if environment.group_size > 0 and algorithm.batch_size % environment.group_size:
        whole = f"whole groups of {environment.group_size} ({key}.group_size)"
        yield Problem("algorithm.batch_size", f"{algorithm.batch_size} sequences are not {whole}")
    if not environment.target.rpartition(":")[0]:
        yield Problem(
            f"{key}.target", f"{environment.target!r} is not of the form package.module:Class"
        )
    if key != "environment" and not re.fullmatch(r"(?!environment$)\w+", environment_name(key)):
        yield Problem(
            key, "is no name for figures: letters, digits and _, and another than environment"
        )
    for name in sorted(environment.config.keys() & ENVIRONMENT_OWN.keys()):
        yield Problem(
            f"{key}.config.{name}",
            f"is set by the run; change {ENVIRONMENT_OWN[name].format(key)} instead",
        )


def _verl(config: Config) -> Iterator[Problem]:
    """What verl's engine and optimizer cannot be asked for."""
    trainer, ranks = (
        config.trainer,
        config.roles.trainer.nodes * config.roles.trainer.ranks_per_node,
    )
    engine, optim = trainer.fsdp_config, trainer.optim
    for section, given, known in (("fsdp_config", engine, FSDP_CONFIG), ("optim", optim, OPTIM)):
        for key in sorted(given.keys() - set(known)):
            owner = VERL_OWN.get(f"{section}.{key}")
            wrong = (
                f"is set by the run; change {owner} instead"
                if owner
                else f"is not one of {', '.join(known)}{did_you_mean(key, known)}"
            )
            yield Problem(f"trainer.{section}.{key}", wrong)
    if trainer.backend != "verl" and engine:
        yield Problem(
            "trainer.fsdp_config", f"is for trainer.backend=verl; this is {trainer.backend}"
        )
    if "param_dtype" in (engine.get("mixed_precision") or {}):
        yield Problem(
            "trainer.fsdp_config.mixed_precision.param_dtype",
            "is set by the run; change model.dtype instead",
        )
    if engine.get("entropy_checkpointing") and not config.algorithm.entropy_coef:
        yield Problem(
            "trainer.fsdp_config.entropy_checkpointing",
            "is for an entropy in the loss, and algorithm.entropy_coef is 0",
        )
    for key in ("param_offload", "optimizer_offload"):
        if trainer.offload and engine.get(key):
            yield Problem(
                f"trainer.fsdp_config.{key}",
                "and trainer.offload are two ways of the same; keep one",
            )
    parallel = engine.get("ulysses_sequence_parallel_size", 1)
    for key, value in (
        ("ulysses_sequence_parallel_size", parallel),
        ("fsdp_size", engine.get("fsdp_size", -1)),
    ):
        if value != -1 and (not isinstance(value, int) or value < 1 or ranks % value):
            yield Problem(
                f"trainer.fsdp_config.{key}",
                f"{value!r} does not divide the {ranks} ranks of roles.trainer",
            )
    if parallel != 1 and config.model.attention != "flash_attention_2":
        wrong = f"{parallel} with model.attention={config.model.attention} would let each rank attend to its own part of a sequence only"
        yield Problem(
            "trainer.fsdp_config.ulysses_sequence_parallel_size", f"{wrong}; use flash_attention_2"
        )


def _deepspeed(config: Config) -> Iterator[Problem]:
    given = config.trainer.deepspeed
    if config.trainer.backend != "deepspeed":
        if given:
            yield Problem(
                "trainer.deepspeed",
                f"is for trainer.backend=deepspeed; this is {config.trainer.backend}",
            )
        return
    for key in sorted(given.keys() & DEEPSPEED_OWN.keys()):
        yield Problem(
            f"trainer.deepspeed.{key}", f"is set by the run; change {DEEPSPEED_OWN[key]} instead"
        )
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 2) if isinstance(zero, dict) else zero
    if stage not in (1, 2, 3):
        yield Problem(
            "trainer.deepspeed.zero_optimization.stage", f"{stage!r} is not one of 1, 2, 3"
        )
    optim = {"optimizer": "AdamW", "optimizer_impl": "torch.optim", **config.trainer.optim}
    if (optim["optimizer"], optim["optimizer_impl"]) != ("AdamW", "torch.optim"):
        yield Problem(
            "trainer.optim.optimizer",
            "ZeRO shards the state of torch's AdamW only; use trainer.backend=verl for another",
        )


def _algorithm(algorithm: AlgorithmConf) -> Iterator[Problem]:
    """What the parts of an algorithm ask of one another."""
    options = LOSS_OPTIONS.get(algorithm.loss, ())
    for option in [option for option in algorithm.loss_options if option not in options]:
        yield Problem(
            f"algorithm.loss_options.{option}",
            f"algorithm.loss={algorithm.loss} has {', '.join(options) or 'no options'}",
        )
    if algorithm.loss == "sapo" and algorithm.aggregation != "seq-mean-token-mean":
        yield Problem(
            "algorithm.aggregation",
            f"{algorithm.aggregation} is not what sapo does, which is always seq-mean-token-mean",
        )
    if algorithm.kl_target is not None and not (algorithm.kl_target > 0 and algorithm.kl_coef > 0):
        yield Problem(
            "algorithm.kl_target",
            "and algorithm.kl_coef, where the coefficient starts, are both above 0, or the target is null",
        )
    if algorithm.kl_in == "reward" and not algorithm.kl_coef:
        yield Problem("algorithm.kl_in", "reward has no effect with algorithm.kl_coef=0")
    correction = algorithm.correction
    on = [name for name in ("weights", "rejection") if getattr(correction, name) != "none"]
    if on and algorithm.old_log_probs != "recompute":
        why = "compares the learner's log-probs with the servers', and with algorithm.old_log_probs=behaviour the loss's ratio does that"
        yield Problem(f"algorithm.correction.{on[0]}", f"{why}; it needs recompute")
    if not re.fullmatch(RANGE, correction.threshold):
        yield Problem(
            "algorithm.correction.threshold",
            f"{correction.threshold!r} is neither a number nor a range such as 0.5_2.0",
        )
    if (correction.rejection == "none") != (correction.rejection_threshold == "none"):
        yield Problem(
            "algorithm.correction.rejection_threshold",
            "and algorithm.correction.rejection go together: both, or none",
        )
    if correction.rejection == "none" or correction.rejection_threshold == "none":
        return
    rejections, limits = correction.rejection.split(","), correction.rejection_threshold.split(",")
    for name in [name for name in rejections if name not in REJECTIONS]:
        yield Problem(
            "algorithm.correction.rejection",
            f"{name!r} is not one of {', '.join(REJECTIONS)}{did_you_mean(name, REJECTIONS)}",
        )
    if len(limits) not in (1, len(rejections)):
        yield Problem(
            "algorithm.correction.rejection_threshold",
            f"has {len(limits)} values for {len(rejections)} rejections",
        )
    for limit in limits:
        if not re.fullmatch(RANGE, limit) or (
            "_" in limit and not all(name.endswith("k1") for name in rejections)
        ):
            yield Problem(
                "algorithm.correction.rejection_threshold",
                f"{limit!r} is not a number, nor, for a k1, a range such as 0.5_2.0",
            )


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(wrong, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""
