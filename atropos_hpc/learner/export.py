"""Export a run's weights as a Hugging Face directory: `atropos-hpc export RUN OUT`.

`push` uploads such a directory to the Hugging Face Hub.

1. Verify the newest durable checkpoint, or that of a given step, and read it into this process.
2. Load the base model and replace its weights. A LoRA adapter is merged into them.
3. Save model, tokenizer and model card under a temporary name beside OUT, then rename it.

Needs the trainer's environment, and host memory for two copies of the model in float32. No process
of the run is needed.
"""

import errno
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


def export(run: RunDir, out: Path, step: int | None = None, spare_bytes: int = 0) -> int:
    """Write the weights of a checkpoint to `out`, in model.dtype. Return its step.

    `spare_bytes`: space that stays free. Raises FileExistsError if `out` exists, FileNotFoundError
    if the run has no such checkpoint, BadCheckpoint if it is damaged, and OSError without space.
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
    model.to(getattr(torch, conf.dtype))
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    free = shutil.disk_usage(out.parent).free
    if free < size + spare_bytes:
        reason = f"{free:,} bytes are free, and {size + spare_bytes:,} are needed"
        raise OSError(errno.ENOSPC, reason, str(out.parent))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(temporary)
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
