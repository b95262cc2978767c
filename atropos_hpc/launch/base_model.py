"""Provide the model that a run starts from: a given one, or one that is created and cached.

    python -m atropos_hpc.launch.base_model [NAME]

puts a small pretrained model (models/pretrained.py) into the cache, where runs look for it, and
prints its directory.
"""

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from atropos_hpc.config import ModelConf
from atropos_hpc.runtime import process

log = logging.getLogger(__name__)

MAKE_TIMEOUT_S = 3600.0
SMALLEST = "smollm2-135m-instruct"


def cache() -> Path:
    """Return the directory of created models: $ATROPOS_HPC_CACHE, or ~/.cache/atropos_hpc."""
    return Path(os.environ.get("ATROPOS_HPC_CACHE") or Path.home() / ".cache" / "atropos_hpc")


def is_made(path: str | None) -> bool:
    """Tell whether a model's path is one that `ensure` has created, rather than a user's own."""
    return path is not None and Path(path).parent == cache() / "models"


def ensure(model: ModelConf, python: str, log_path: Path) -> str:
    """Return the model's path or hub name, after creating the model if it is not in the cache.

    Raises RuntimeError, with the end of the maker's log, when that fails.
    """
    if model.path is not None:
        local = Path(model.path).expanduser()
        return str(local.resolve()) if local.exists() else model.path
    assert model.make is not None
    directory = made_path(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock", timeout=MAKE_TIMEOUT_S):  # two runs create it once
        if not directory.exists():
            log.info("creating the base model with %s; its log is %s", model.make, log_path)
            command = [python, "-m", model.make, "--out", str(directory), *_arguments(model)]
            _make(model.make, command, log_path)
            if not directory.exists():
                raise RuntimeError(f"{model.make} did not create {directory}; see {log_path}")
    return str(directory)


def made_path(model: ModelConf) -> Path:
    """Return where `ensure` puts a model that `model.make` creates."""
    assert model.make is not None
    key = _content_key(model.make, _arguments(model))
    return cache() / "models" / f"{model.make.rpartition('.')[2]}-{key}"


def _arguments(model: ModelConf) -> list[str]:
    options = model.make_options.items()
    return sorted(f"--{key.replace('_', '-')}={value}" for key, value in options)


def _make(module: str, command: list[str], log_path: Path) -> None:
    maker = process.start("make_base", command, log_path)
    try:
        code = maker.process.wait(MAKE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        seconds = f"{MAKE_TIMEOUT_S:.0f} s"
        raise RuntimeError(f"{module} did not end within {seconds}; see {log_path}") from None
    finally:
        process.end([maker], 1.0)
    if code:
        raise RuntimeError(f"{module} ended with exit code {code}:\n{process.tail(log_path)}")


def _content_key(module: str, options: list[str]) -> str:
    """Hash the maker's options and sources: the module and those beside it."""
    digest = hashlib.sha256(repr(options).encode())
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"model.make: there is no module {module}")
    for source in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def pretrained(name: str = SMALLEST) -> ModelConf:
    """Return the config of a model of models/pretrained.py."""
    return ModelConf(make="atropos_hpc.models.pretrained", make_options={"name": name})


def main() -> None:
    process.log_to_stderr()
    with tempfile.TemporaryDirectory() as logs:
        print(ensure(pretrained(*sys.argv[1:2]), sys.executable, Path(logs) / "make.log"))


if __name__ == "__main__":
    main()
