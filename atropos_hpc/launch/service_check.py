"""Check what a run looks up when it is under way: W&B's key, and the layers that LoRA adapts."""

import json
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem

WANDB = "https://api.wandb.ai"
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def check(config: Config) -> Iterator[Problem]:
    """Report a mode of W&B that needs a key and has none, and LoRA targets that match nothing."""
    if config.wandb.mode == "online" and not _has_wandb_key():
        yield Problem(
            "wandb.mode",
            "online needs an API key: set WANDB_API_KEY, run `wandb login`, or give"
            " wandb.mode=offline",
        )
    if config.model.lora.rank and config.model.lora.targets:
        yield from _targets(config)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB).hostname or ""
    try:
        path = os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _targets(config: Config) -> Iterator[Problem]:
    layers = {name.removesuffix(".weight") for name in _weights(Path(config.model.path or ""))}
    unmatched = [
        target
        for target in config.model.lora.targets
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers)
    ]
    if layers and unmatched:
        found = sorted({layer.rpartition(".")[2] for layer in layers if ".layers." in layer})
        names = f"{', '.join(unmatched)} match no layer of the model; its layers end in"
        yield Problem("model.lora.targets", f"{names} {', '.join(found)}")


def _weights(path: Path) -> set[str]:
    """Return the names of a local model's tensors; none for a model of another format."""
    path = path.expanduser()
    try:
        if (path / INDEX).exists():
            return set(json.loads((path / INDEX).read_text())["weight_map"])
        import numpy as np  # which starts threads: not in every command of a login node

        from atropos_hpc.policy.shard_buffer import tensors_of

        return set(tensors_of(np.memmap(path / WEIGHTS, np.uint8, "r")))
    except (OSError, ValueError, KeyError):
        return set()
