"""A run's weights as a Hugging Face directory: `atropos-hpc export RUN OUT`.

  1. The newest durable checkpoint (or the one of a given step) is checked and read, whole, into this process.
  2. transformers loads the base model, and its weights are replaced; a LoRA adapter is merged into them.
  3. transformers saves model and tokenizer beside OUT, under a temporary name, which becomes OUT in the end. A model card goes with them.

Needs the trainer's environment, and host memory for two copies of the model in float32. No process of the run is needed.
"""

import os
import secrets
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from atropos_hpc.learner.checkpoint import find
from atropos_hpc.observe.model_card import model_card
from atropos_hpc.policy import lora
from atropos_hpc.runtime.run_dir import RunDir

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(run: RunDir, out: Path, step: int | None = None) -> int:
    """Write the weights of a checkpoint to `out`, in model.dtype. Returns its step.

    Raises FileExistsError if `out` exists, FileNotFoundError if the run has no (such) checkpoint, BadCheckpoint if it is damaged.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: name a directory that doesn't")
    path, manifest = find(run.checkpoints, step)
    conf = run.config().model
    assert conf.path is not None, "a run that has a checkpoint has had a model"
    model = AutoModelForCausalLM.from_pretrained(
        conf.path, dtype=torch.float32, trust_remote_code=conf.trust_remote_code
    )
    own = model.state_dict()
    weights = read_weights(path)
    if conf.lora.rank:
        named = {name: tensor for key, tensor in weights.items() if (name := lora.file_name(key))}
        (weights,) = lora.merge([own], named, {"r": conf.lora.rank, "lora_alpha": conf.lora.alpha})
    missing = own.keys() - weights.keys() - set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or weights.keys() - own.keys():
        raise ValueError(
            f"{path} and {conf.path} are not of the same model: {', '.join(sorted(missing ^ (weights.keys() - own.keys()))[:5])}"
        )
    model.load_state_dict(
        weights, strict=False
    )  # a tied output layer is the input embedding, loaded already
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        model.to(DTYPES[conf.dtype]).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(
            conf.path, trust_remote_code=conf.trust_remote_code
        ).save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(run, int(manifest["step"])))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return int(manifest["step"])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a checkpoint directory, whole, whatever number of ranks wrote them."""
    reader, prefix = FileSystemReader(path), "model."
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in stored.items()
        if key.startswith(prefix)
    }
    load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}
