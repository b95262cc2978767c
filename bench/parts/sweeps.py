"""Submit a sweep to a private Slurm cluster, as a user would."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def submit(sweep: Path, env: Mapping[str, str], *overrides: str, timeout_s: float = 300.0) -> None:
    """Submit a point per combination of values into `sweep`. Raises if the command fails."""
    train = [sys.executable, "-m", "atropos_hpc.train", "-m", "hydra/launcher=submitit_slurm"]
    command = [*train, f"run_dir={sweep}", *overrides]
    subprocess.run(command, env=env, check=True, timeout=timeout_s, cwd=sweep.parent)
