"""Export a run's weights as a Hugging Face directory: `atropos-hpc export RUN OUT`.

1. Verify the newest durable checkpoint, or that of a given step, and read it into this process.
2. Load the base model and replace its weights. A LoRA adapter is merged into them.
3. Save model, tokenizer and model card under a temporary name beside OUT, then rename it.

Needs the trainer's environment, and host memory for two copies of the model in float32. No process
of the run is needed.
"""

import os
import secrets
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_hpc.config import ModelConf
from atropos_hpc.learner.checkpoint_files import find
from atropos_hpc.observe.model_card import model_card
from atropos_hpc.policy import lora
from atropos_hpc.runtime.run_dir import RunDir

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(run: RunDir, out: Path, step: int | None = None) -> int:
    """Write the weights of a checkpoint to `out`, in model.dtype. Return its step.

    Raises FileExistsError if `out` exists, FileNotFoundError if the run has no such checkpoint, and
    BadCheckpoint if it is damaged.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: name a directory that does not")
    path, manifest = find(run.checkpoints, step)
    conf = run.config().model
    assert conf.path is not None, "a run with a checkpoint has a model"
    model = AutoModelForCausalLM.from_pretrained(
        conf.path, dtype=torch.float32, trust_remote_code=conf.trust_remote_code
    )
    # A tied output layer is the input embedding, which is in the checkpoint.
    model.load_state_dict(_exported_weights(path, model, conf), strict=False)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        model.to(DTYPES[conf.dtype]).save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(
            conf.path, trust_remote_code=conf.trust_remote_code
        )
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(run, manifest.step))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest.step


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the model's whole tensors from a checkpoint that any number of ranks wrote."""
    reader, prefix = FileSystemReader(path), "model."
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in stored.items()
        if key.startswith(prefix)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _exported_weights(
    path: Path, model: torch.nn.Module, conf: ModelConf
) -> dict[str, torch.Tensor]:
    """Return the checkpoint's weights under the model's names, an adapter merged into the model's.

    Raises ValueError if they are not those of this model.
    """
    own, weights = model.state_dict(), read_weights(path)
    if conf.lora.rank:
        named = {name: tensor for key, tensor in weights.items() if (name := lora.file_name(key))}
        (weights,) = lora.merge([own], named, {"r": conf.lora.rank, "lora_alpha": conf.lora.alpha})
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing, unknown = own.keys() - weights.keys() - tied, weights.keys() - own.keys()
    if missing or unknown:
        names = ", ".join(sorted(missing | unknown)[:5])
        raise ValueError(f"{path} and {conf.path} are not the same model: they differ in {names}")
    return weights
