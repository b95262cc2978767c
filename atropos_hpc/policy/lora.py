"""LoRA adapters (arXiv 2106.09685) as policy versions: their two files, as PEFT writes them.

The learner publishes adapter_model.safetensors and adapter_config.json: megabytes instead of the
model's gigabytes. The base model is `model.path`. PEFT is not needed here; rollout nodes lack it.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def config_of(module: torch.nn.Module) -> dict[str, Any] | None:
    """Return the content of adapter_config.json for a module wrapped by PEFT, None for another."""
    configs = getattr(module, "peft_config", None)
    if not configs:
        return None
    config: dict[str, Any] = json.loads(
        json.dumps(configs["default"].to_dict(), default=lambda value: sorted(value))
    )
    # PEFT has resolved the targets to full paths; PEFT and vLLM match the ends of names.
    targets = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    return {**config, "target_modules": targets, "inference_mode": True}


def file_name(name: str) -> str | None:
    """Return the name in FILE of a tensor of the wrapped module, None for the base model's."""
    return name.replace(".default.", ".") if ".lora_" in name else None


def scale(config: Mapping[str, Any]) -> float:
    """Return the factor of the product of an adapter's matrices.

    Raises ValueError for a kind of adapter that is more than such a product.
    """
    for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if config.get(key):
            raise ValueError(f"{CONFIG}: {key} is not supported")
    return float(config["lora_alpha"]) / float(config["r"])


def merge(
    base: Iterable[Mapping[str, torch.Tensor]],
    adapter: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
) -> list[dict[str, torch.Tensor]]:
    """Return the base's files with W + scale * B A in place of W where the adapter has A and B.

    Computed in float32, returned in the base's dtype. Raises ValueError for a target that the base
    has no weights for.
    """
    factor, merged = scale(config), []
    targets = {name.removeprefix(_PREFIX).removesuffix(_A) for name in adapter if name.endswith(_A)}
    for tensors in base:
        shard = dict(tensors)
        for target in [target for target in targets if f"{target}.weight" in shard]:
            down, up = (adapter[f"{_PREFIX}{target}{end}"].float() for end in (_A, _B))
            weight = shard[f"{target}.weight"]
            shard[f"{target}.weight"] = (weight.float() + factor * (up @ down)).to(weight.dtype)
            targets.remove(target)
        merged.append(shard)
    if targets:
        names = ", ".join(sorted(targets)[:5])
        raise ValueError(
            f"the base model has no weights for {names} ({len(targets)} targets of the adapter)"
        )
    return merged
