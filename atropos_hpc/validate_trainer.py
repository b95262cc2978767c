"""Check the algorithm and the training backend: options by verl's and DeepSpeed's own names."""

import re
from collections.abc import Iterator

from atropos_hpc.config import AlgorithmConf, Config, CorrectionConf, micro_batch_tokens
from atropos_hpc.schema import did_you_mean

Error = tuple[str, str]  # (key, message)

# values of algorithm.correction.rejection, by verl's names
REJECTIONS = tuple(
    f"{kind}_k{k}"
    for kind in ("token", "seq_sum", "seq_mean", "seq_max")
    for k in (1, 2, 3)
    if f"{kind}{k}" != "seq_max1"
)
RANGE = r"\d*\.?\d+(_\d*\.?\d+)?"  # a number, or two joined by _
POSITIVE_OPTIONS = ("tau_pos", "tau_neg", "clip_cov_ratio", "kl_cov_ratio")
LOSS_OPTIONS = {
    "sapo": ("tau_pos", "tau_neg"),
    "clip_cov": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    "kl_cov": ("kl_cov_ratio", "ppo_kl_coef"),
}
# keys of trainer.fsdp_config and trainer.optim, by verl's names
FSDP_CONFIG = (
    "entropy_checkpointing", "entropy_from_logits_chunk_size", "entropy_from_logits_with_chunking",
    "forward_prefetch", "fsdp_size", "full_determinism", "mixed_precision", "optimizer_offload",
    "pad_to_length", "pad_to_length_bucket", "param_offload", "reshard_after_forward",
    "ulysses_sequence_parallel_size", "use_no_sync_for_gradient_accumulation", "use_torch_compile",
    "wrap_policy",
)  # fmt: skip
OPTIM = (
    "betas", "lr_warmup_steps_ratio", "min_lr_ratio", "num_cycles", "optimizer", "optimizer_impl",
    "override_optimizer_config", "zero_indexed_step",
)  # fmt: skip
# keys of the maps below trainer that the run sets, and the key to change instead
SET_BY_RUN = {
    "fsdp_config.offload_policy": "trainer.offload",
    "fsdp_config.model_dtype": "model.dtype",
    "fsdp_config.dtype": "model.dtype",
    "fsdp_config.max_token_len_per_gpu": "trainer.tokens_per_micro_batch",
    "fsdp_config.strategy": "trainer.backend",
    "fsdp_config.seed": "seed",
    "optim.lr": "trainer.learning_rate",
    "optim.weight_decay": "trainer.weight_decay",
    "optim.lr_warmup_steps": "trainer.warmup_steps",
    "optim.lr_scheduler_type": "trainer.schedule",
    "optim.warmup_style": "trainer.schedule",
    "optim.clip_grad": "trainer.grad_clip",
    "optim.grad_clip": "trainer.grad_clip",
    "optim.total_training_steps": "trainer.steps",
    "deepspeed.train_batch_size": "algorithm.batch_size",
    "deepspeed.train_micro_batch_size_per_gpu": "trainer.tokens_per_micro_batch",
    "deepspeed.gradient_accumulation_steps": "trainer.tokens_per_micro_batch",
    "deepspeed.gradient_clipping": "trainer.grad_clip",
    "deepspeed.optimizer": "trainer.learning_rate",
    "deepspeed.scheduler": "trainer.schedule",
    "deepspeed.bf16": "model.dtype",
    "deepspeed.fp16": "model.dtype",
}


def errors(config: Config) -> Iterator[Error]:
    """Yield (key, message) of everything wrong with `algorithm` and `trainer`."""
    yield from _algorithm(config.algorithm)
    yield from _correction(config.algorithm.correction, config.algorithm.old_log_probs)
    if (tokens := micro_batch_tokens(config)) < config.model.max_length:
        yield (
            "trainer.tokens_per_micro_batch",
            f"{tokens} is less than one sequence of model.max_length={config.model.max_length}",
        )
    if config.export.every % config.trainer.checkpoint_every:
        yield (
            "export.every",
            f"{config.export.every} is not a multiple of trainer.checkpoint_every="
            f"{config.trainer.checkpoint_every}, whose checkpoints are exported",
        )
    yield from _names(config)
    yield from _optimizer_state(config)
    yield from _verl(config)
    if config.trainer.backend == "deepspeed":
        yield from _deepspeed(config)
    elif config.trainer.deepspeed:
        yield (
            "trainer.deepspeed",
            f"requires trainer.backend=deepspeed, but it is {config.trainer.backend}",
        )


def _algorithm(algorithm: AlgorithmConf) -> Iterator[Error]:
    options = LOSS_OPTIONS.get(algorithm.loss, ())
    for option in [option for option in algorithm.loss_options if option not in options]:
        yield (
            f"algorithm.loss_options.{option}",
            f"the options of algorithm.loss={algorithm.loss} are {', '.join(options) or 'none'}",
        )
    for option, value in algorithm.loss_options.items():
        if option in POSITIVE_OPTIONS and not value > 0:
            yield f"algorithm.loss_options.{option}", f"must be greater than 0, not {value}"
        elif option == "kl_cov_ratio" and value > 1:
            yield f"algorithm.loss_options.{option}", f"is a part of the tokens, not {value}"
    if algorithm.loss == "sapo" and algorithm.aggregation != "seq-mean-token-mean":
        yield (
            "algorithm.aggregation",
            f"is {algorithm.aggregation}, but sapo always uses seq-mean-token-mean",
        )
    if algorithm.kl_target is not None and not algorithm.kl_coef > 0:
        yield (
            "algorithm.kl_target",
            "requires algorithm.kl_coef, the initial coefficient, to be greater than 0",
        )
    if algorithm.kl_in == "reward" and not algorithm.kl_coef:
        yield "algorithm.kl_in", "reward has no effect with algorithm.kl_coef=0"


def _correction(correction: CorrectionConf, old_log_probs: str) -> Iterator[Error]:
    prefix = "algorithm.correction"
    active = [name for name in ("weights", "rejection") if getattr(correction, name) != "none"]
    if active and old_log_probs != "recompute":
        yield (
            f"{prefix}.{active[0]}",
            "needs algorithm.old_log_probs=recompute: with behaviour, the ratio of the loss itself "
            "compares the learner's log-probs with the servers'",
        )
    if not _is_range(correction.threshold):
        yield (
            f"{prefix}.threshold",
            f"{correction.threshold!r} is neither a number above 0 nor a range such as 0.5_2.0",
        )
    if (correction.rejection == "none") != (correction.rejection_threshold == "none"):
        yield (f"{prefix}.rejection_threshold", f"and {prefix}.rejection must be given together")
    elif correction.rejection != "none":
        yield from _rejections(correction)


def _rejections(correction: CorrectionConf) -> Iterator[Error]:
    prefix = "algorithm.correction"
    rejections = correction.rejection.split(",")
    thresholds = correction.rejection_threshold.split(",")
    for name in [name for name in rejections if name not in REJECTIONS]:
        yield (
            f"{prefix}.rejection",
            f"{name!r} is not one of {', '.join(REJECTIONS)}{did_you_mean(name, REJECTIONS)}",
        )
    if len(thresholds) not in (1, len(rejections)):
        yield (
            f"{prefix}.rejection_threshold",
            f"has {len(thresholds)} values for {len(rejections)} rejections",
        )
        return
    if len(thresholds) == 1:
        thresholds = thresholds * len(rejections)
    for name, threshold in zip(rejections, thresholds, strict=True):
        whole = threshold if "_" in threshold or not name.endswith("k1") else f"1_{threshold}"
        if not _is_range(whole) or ("_" in threshold and not name.endswith("k1")):
            yield (
                f"{prefix}.rejection_threshold",
                f"{threshold!r} is not a number above 0 for {name}, nor, for a k1, a number of at "
                "least 1 or a range such as 0.5_2.0",
            )


def _is_range(text: str) -> bool:
    """Whether a text is a number above 0, or two of them, joined by _, that do not fall."""
    if not re.fullmatch(RANGE, text):
        return False
    numbers = [float(number) for number in text.split("_")]
    return numbers[0] > 0 and numbers == sorted(numbers)


def _names(config: Config) -> Iterator[Error]:
    """Check the keys of the maps whose names belong to verl and DeepSpeed."""
    maps = (("fsdp_config", FSDP_CONFIG), ("optim", OPTIM), ("deepspeed", None))
    for section, known in maps:
        for name in sorted(getattr(config.trainer, section)):
            owner = SET_BY_RUN.get(f"{section}.{name}")
            if owner is not None and not (
                section == "deepspeed" and config.trainer.backend != "deepspeed"
            ):
                yield f"trainer.{section}.{name}", f"is set by the run; change {owner} instead"
            elif known is not None and name not in known:
                near = did_you_mean(name, known)
                yield f"trainer.{section}.{name}", f"is not one of {', '.join(known)}{near}"


def _optimizer_state(config: Config) -> Iterator[Error]:
    if config.trainer.optimizer_state == "float32":
        return
    excluded = {
        "trainer.backend=deepspeed, which keeps float32; trainer.offload moves it to the host": (
            config.trainer.backend == "deepspeed"
        ),
        "model.dtype=float32": config.model.dtype == "float32",
        "model.lora.rank: the state of an adapter is small": config.model.lora.rank > 0,
        "trainer.optim.optimizer": "optimizer" in config.trainer.optim,
    }
    for what in [what for what, found in excluded.items() if found]:
        yield "trainer.optimizer_state", f"bfloat16 cannot be combined with {what}"


def _verl(config: Config) -> Iterator[Error]:
    trainer, prefix = config.trainer, "trainer.fsdp_config"
    engine = trainer.fsdp_config
    if trainer.backend != "verl" and engine:
        yield prefix, f"requires trainer.backend=verl, but it is {trainer.backend}"
    precision = engine.get("mixed_precision") or {}
    if not isinstance(precision, dict):
        yield f"{prefix}.mixed_precision", f"must be a map, not {precision!r}"
    elif "param_dtype" in precision:
        yield (
            f"{prefix}.mixed_precision.param_dtype",
            "is set by the run; change model.dtype instead",
        )
    if engine.get("entropy_checkpointing") and not config.algorithm.entropy_coef:
        yield (f"{prefix}.entropy_checkpointing", "has no effect with algorithm.entropy_coef=0")
    for name in ("param_offload", "optimizer_offload"):
        if trainer.offload and engine.get(name):
            yield f"{prefix}.{name}", "and trainer.offload do the same; keep one"
    ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
    for name in ("ulysses_sequence_parallel_size", "fsdp_size"):
        value = engine.get(name, -1)
        if value != -1 and (not isinstance(value, int) or value < 1 or ranks % value):
            yield (
                f"{prefix}.{name}",
                f"{value!r} does not divide the {ranks} ranks of roles.trainer",
            )
    parallel = engine.get("ulysses_sequence_parallel_size", 1)
    if parallel != 1 and config.model.attention == "eager":
        yield (
            f"{prefix}.ulysses_sequence_parallel_size",
            f"is {parallel}, which needs model.attention=sdpa or flash_attention_2: with eager, "
            "each rank would attend only to its part of a sequence",
        )


def _deepspeed(config: Config) -> Iterator[Error]:
    zero = config.trainer.deepspeed.get("zero_optimization", {})
    stage = zero.get("stage", 2) if isinstance(zero, dict) else zero
    if stage not in (1, 2, 3):
        yield "trainer.deepspeed.zero_optimization.stage", f"{stage!r} is not one of 1, 2, 3"
    optim = {"optimizer": "AdamW", "optimizer_impl": "torch.optim", **config.trainer.optim}
    if (optim["optimizer"], optim["optimizer_impl"]) != ("AdamW", "torch.optim"):
        yield (
            "trainer.optim.optimizer",
            "ZeRO shards the state of torch's AdamW only; use trainer.backend=verl for others",
        )
