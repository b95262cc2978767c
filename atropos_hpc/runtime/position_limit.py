"""The most tokens that a model has positions for, and the refusal of a longer model.max_length.

The launcher reads config.json, from the model's directory or the hub's cache. For a name that is
not cached, the trainer's Python looks when it loads the model's config for the checks; where there
was no such check, the first process that loads the model refuses.
"""

import json
from pathlib import Path
from typing import Any

from atropos_hpc.config import ModelConf

KEY = "model.max_length"
# scaled positions of which max_position_embeddings does not say how far they reach
SCALED = ("linear", "dynamic", "yarn", "ntk", "mrope")


def is_hub_name(path: str) -> bool:
    """Tell whether model.path can only be the name of a model on the hub."""
    return (
        path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not Path(path).expanduser().exists()
    )


def config_file(path: str) -> Path | None:
    """Return the config.json of a model, from its directory or the hub's cache. Asks no network."""
    if not is_hub_name(path):
        return Path(path).expanduser() / "config.json"
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "config.json")
    except (ImportError, ValueError):  # not installed here; no valid name
        return None
    return Path(found) if isinstance(found, str) else None


def limit_of(config: dict[str, Any]) -> int | None:
    """Return the limit that a parsed config.json states; None where it is unknown.

    >>> limit_of({"max_position_embeddings": 2048})
    2048
    >>> limit_of({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn"}})
    """
    text = config.get("text_config") or config
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    limit = text.get("max_position_embeddings")
    known = scaling.get("rope_type", scaling.get("type")) not in SCALED
    return limit if known and isinstance(limit, int) else None


def excess(max_length: int, limit: int | None) -> str | None:
    """Say by how much model.max_length exceeds a model's limit; None if it does not."""
    if limit is None or max_length <= limit:
        return None
    return f"{max_length} tokens exceed the model's {limit} (max_position_embeddings)"


def require_positions(model: ModelConf) -> None:
    """Raise ValueError, naming the key, if model.max_length exceeds the limit.

    Loads the model's config, if need be from the hub. A config that transformers cannot load is
    left to whoever loads the model.
    """
    from transformers import AutoConfig

    try:
        loaded: Any = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code
        )
    except Exception:
        return
    if (reason := excess(model.max_length, limit_of(loaded.to_dict()))) is not None:
        raise ValueError(f"{KEY}: {reason}")


def read(path: Path) -> dict[str, Any]:
    """Parse a config.json. Raises OSError and ValueError."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
