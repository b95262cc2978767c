"""The model that a run starts from: a given one, or one that is made on the spot and kept by content."""

import hashlib
import importlib.util
import logging
import os
import subprocess
from pathlib import Path

from filelock import FileLock

from atropos_hpc.config import ModelConf
from atropos_hpc.runtime import process

log = logging.getLogger(__name__)

MAKE_TIMEOUT_S = 3600.0


def cache() -> Path:
    """Where made models are kept: $ATROPOS_HPC_CACHE, or ~/.cache/atropos_hpc."""
    return Path(os.environ.get("ATROPOS_HPC_CACHE") or Path.home() / ".cache" / "atropos_hpc")


def ensure(model: ModelConf, python: str, log_path: Path) -> str:
    """The model's path or hub name; makes the model first if the config says how and the cache lacks it.

    Raises RuntimeError with the end of the maker's log when it fails.
    """
    if model.path is not None:
        local = Path(model.path).expanduser()
        return str(local.resolve()) if local.exists() else model.path
    assert model.make is not None
    options = [
        f"--{key.replace('_', '-')}={value}" for key, value in sorted(model.make_options.items())
    ]
    directory = (
        cache() / "models" / f"{model.make.rpartition('.')[2]}-{_content_key(model.make, options)}"
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock", timeout=MAKE_TIMEOUT_S):  # two runs at once make it once
        if not directory.exists():
            log.info("making the base model with %s; its log is %s", model.make, log_path)
            maker = process.start(
                "make_base", [python, "-m", model.make, "--out", str(directory), *options], log_path
            )
            try:
                code = maker.process.wait(MAKE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise RuntimeError(
                    f"{model.make} did not end within {MAKE_TIMEOUT_S:.0f} s; see {log_path}"
                ) from None
            finally:
                process.end([maker], 1.0)
            if code or not directory.exists():
                raise RuntimeError(
                    f"{model.make} ended with exit code {code}:\n{process.tail(log_path)}"
                )
    return str(directory)


def _content_key(module: str, options: list[str]) -> str:
    """A hash of the maker's own source, of what lies beside it, and of its options: another maker makes another model."""
    digest = hashlib.sha256(repr(options).encode())
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"model.make: there is no module {module}")
    for source in sorted(Path(spec.origin).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
