"""What the parts of the GPU check share: command line, made models, facts about the device."""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.runtime.devices import machine_devices, visible_devices
from atropos_hpc.runtime.model_sizes import sizes
from bench.parts.published import CONFIGS


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's shape."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


def published(size: str) -> Shape:
    """Return the shape of a Qwen2.5 of that size."""
    of = sizes(CONFIGS[f"Qwen/Qwen2.5-{size}-Instruct"])
    return Shape(size, of.hidden, of.inner, of.layers, of.heads, of.kv_heads, of.vocabulary)


SHAPES = {
    "cuda": (published("0.5B"), published("1.5B")),
    "cpu": (Shape("tiny", 256, 256, 2, 4, 2, 512),),
}


def options(description: str | None) -> argparse.Namespace:
    """Read the command line that `bench.gpu` gives each part."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--rollout-python", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    return parser.parse_args()


def save_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows so far: a part that is cut short keeps what it measured."""
    path.write_text(json.dumps(list(rows)))


def make_model(shape: Shape, directory: Path, device: str) -> Path:
    """Save a Qwen2 of random bfloat16 weights, with the tokenizer of the demo's model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atropos_hpc.environments.make_base import make_tokenizer

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def device_memory_used() -> float:
    """Return the GiB in use on the first GPU, all processes together; 0 without one."""
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        return float(text.splitlines()[0]) / 1024
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return 0.0


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that may be used."""
    return bool(visible_devices(os.environ, machine_devices()))


def wait_until(condition: Any, timeout_s: float, what: str, every_s: float = 0.2) -> Any:
    """Poll until `condition()` is true and return its value. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(every_s)
    return found
