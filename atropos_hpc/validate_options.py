"""Check maps and lists whose names belong to others: torch's optimizers, vLLM's command line."""

from collections.abc import Iterator
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.config_rollout import OWN_ENVIRONMENTS
from atropos_hpc.schema import did_you_mean

Error = tuple[str, str]  # (key, message)

# options of torch.optim's classes beside lr, weight_decay and betas, which other keys set; without
# the classes that need a closure, sparse gradients or matrices only
_ALL = ("foreach", "maximize", "capturable", "differentiable")
OPTIMIZERS = {
    "ASGD": (*_ALL, "alpha", "lambd", "t0"),
    "Adadelta": (*_ALL, "eps", "rho"),
    "Adafactor": ("foreach", "maximize", "beta2_decay", "d", "eps"),
    "Adagrad": (
        *("foreach", "maximize", "differentiable", "eps", "fused"),
        *("initial_accumulator_value", "lr_decay"),
    ),
    "Adam": (*_ALL, "amsgrad", "decoupled_weight_decay", "eps", "fused"),
    "AdamW": (*_ALL, "amsgrad", "eps", "fused"),
    "Adamax": (*_ALL, "eps"),
    "NAdam": (*_ALL, "decoupled_weight_decay", "eps", "momentum_decay"),
    "RAdam": (*_ALL, "decoupled_weight_decay", "eps"),
    "RMSprop": (*_ALL, "alpha", "centered", "eps", "momentum"),
    "SGD": ("foreach", "maximize", "differentiable", "dampening", "fused", "momentum", "nesterov"),
}
_OWNED_OPTIONS = {
    "lr": "trainer.learning_rate",
    "weight_decay": "trainer.weight_decay",
    "betas": "trainer.optim.betas",
}
# flags of vLLM's server that the run sets, and the key to change instead
VLLM_FLAGS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "max-model-len": "model.max_length",
    "trust-remote-code": "model.trust_remote_code",
    "enable-lora": "model.lora.rank",
    "max-loras": "model.lora.rank",
    "max-lora-rank": "model.lora.rank",
    "max-num-seqs": "rollout.max_sequences",
    "tensor-parallel-size": "rollout.tensor_parallel",
    "pipeline-parallel-size": "rollout.tensor_parallel",
    "data-parallel-size": "rollout.servers",
    "enforce-eager": "rollout.enforce_eager",
    "kv-cache-memory-bytes": "rollout.kv_cache_bytes",
    "gpu-memory-utilization": "rollout.memory_utilization",
    "seed": "seed",
    "host": "cluster.host",
    "port": "",
    "uds": "",
    "api-key": "",
    "middleware": "",
    "root-path": "",
    "ssl-keyfile": "",
    "ssl-certfile": "",
    "served-model-name": "",
    "worker-extension-cls": "",
    "weight-transfer-config": "",
    "logprobs-mode": "",
    "max-logprobs": "rollout.max_support",
    "generation-config": "",
}
QUANTIZING = ("--quantization", "-q", "--quantization-config", "--quantization_config")
_SHORT_FLAGS = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size"} | {
    "-dp": "data-parallel-size"
}
OWN_METRIC = "eval/percent_correct"


def errors(config: Config) -> Iterator[Error]:
    """Yield (key, message) of what is wrong in these maps and lists."""
    yield from _optimizer(config.trainer.optim)
    yield from _vllm_arguments(config.rollout.arguments, config.model.lora.rank > 0)
    environment = config.environment
    if environment.target.startswith(OWN_ENVIRONMENTS) and environment.metric != OWN_METRIC:
        yield (
            "environment.metric",
            f"{environment.metric!r} is not reported by {environment.target}, which reports"
            f" {OWN_METRIC}",
        )


def _optimizer(optim: dict[str, Any]) -> Iterator[Error]:
    prefix = "trainer.optim"
    ranges = {"min_lr_ratio": (0, 1), "num_cycles": (0, 1000), "lr_warmup_steps_ratio": (0, 1)}
    for name, (low, high) in ranges.items():
        value = optim.get(name)
        if value is not None and not _within(value, low, high):
            yield f"{prefix}.{name}", f"must be a number from {low} to {high}, not {value!r}"
    betas = optim.get("betas")
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == 2 and all(_within(b, 0, 1) for b in betas)
    ):
        wanted = "two numbers from 0 to 1, such as [0.9, 0.99]"
        yield f"{prefix}.betas", f"must be {wanted}, not {betas!r}"
    given = optim.get("override_optimizer_config") or {}
    if not isinstance(given, dict):
        yield f"{prefix}.override_optimizer_config", f"must be a map, not {given!r}"
        return
    if optim.get("optimizer_impl", "torch.optim") != "torch.optim":
        return  # another package's classes
    name = optim.get("optimizer", "AdamW")
    if name not in OPTIMIZERS:
        near = did_you_mean(str(name), OPTIMIZERS)
        yield f"{prefix}.optimizer", f"{name!r} is not one of {', '.join(OPTIMIZERS)}{near}"
        return
    for option in given:
        where, known = f"{prefix}.override_optimizer_config.{option}", OPTIMIZERS[name]
        if option in _OWNED_OPTIONS:
            yield where, f"is set by the run; change {_OWNED_OPTIONS[option]} instead"
        elif option not in known:
            near = did_you_mean(str(option), known)
            yield where, f"is not an option of torch.optim.{name}: {', '.join(known)}{near}"


def _within(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and bool(low <= value <= high)


def _vllm_arguments(arguments: list[str], adapter: bool) -> Iterator[Error]:
    for argument in map(str, arguments):
        flag = argument.partition("=")[0]
        name = _SHORT_FLAGS.get(flag) or flag.removeprefix("--").replace("_", "-")
        if flag.startswith("-") and name.removeprefix("no-") in VLLM_FLAGS:
            owner = VLLM_FLAGS[name.removeprefix("no-")]
            instead = f"; change {owner} instead" if owner else ""
            yield "rollout.arguments", f"{flag} is set by the run{instead}"
        elif flag in QUANTIZING and not adapter:
            yield (
                "rollout.arguments",
                f"{flag}: a quantized server cannot load the weights that the run publishes; only"
                " the base model of an adapter (model.lora.rank) can be quantized",
            )
