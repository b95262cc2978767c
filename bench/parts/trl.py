"""Run TRL's GRPOTrainer (bench/trl/grpo.py) with the settings of a config."""

import json
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from bench.parts.processes import ROOT, TRL, Ran, run

SCRIPT = ROOT / "bench" / "trl" / "grpo.py"


def run_trl(
    config: Config, base: Path | str, out: Path, memory: bool = False, **more: object
) -> tuple[Ran, dict[str, Any]]:
    """Run it. Returns its processes' times, and times.json: those of its steps and their parts.

    `memory`: sample that too. `more`: steps, keep, seed, and other options of the script.
    """
    if not TRL.exists():
        raise FileNotFoundError(f"{TRL} is missing: `make bench NAME=...` makes TRL's environment")
    out.mkdir()
    options = {
        "base": base,
        "out": out,
        "batch": config.algorithm.batch_size,
        "group": config.environment.group_size,
        "learning-rate": config.trainer.learning_rate,
        "kl": config.algorithm.kl_coef,
        "clip": config.algorithm.clip_low,
        **more,
    }
    flags = (str(part) for name, value in options.items() for part in (f"--{name}", value))
    ran = run([str(TRL), str(SCRIPT), *flags], out.with_suffix(".log"), memory=memory)
    return ran, json.loads((out / "times.json").read_text())
