"""Check one GPU without a network in under eight minutes: correctness, speed and memory.

    python -m bench.gpu --model DIR --data DIR --rollout-python PY [--parts learner,update,run]

learner   a step of the verl backend at the shapes of a 0.5B and a 1.5B model with random weights in
          bfloat16, micro-batches of 8k tokens: tokens/s, MFU, peak memory; and its log-probs and
          gradients, compared with float32 (`bench/gpu/learner.py`)
update    a vLLM server of the model under load loads full versions, deltas and LoRA adapters:
          seconds, and the longest time without a token (`bench/gpu/update.py`)
run       GSM8K end to end, learner and server sharing the GPU; the server is killed and replaced
          (`bench/gpu/run.py`)

Each part runs in processes of its own, of the role's Python. Without a GPU, the same code runs at
tiny shapes on the CPU; that tests the code, and its figures mean nothing. Results:
bench/results/gpu.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.resources import HOME
from bench.result import Result

PARTS = ("learner", "update", "run")
TIMEOUT_S = {"learner": 240, "update": 240, "run": 540}


@dataclass(frozen=True)
class Setting:
    """What the parts need: where the model and the data are, and the roles' interpreters."""

    model: Path | None
    data: Path | None
    trainer_python: str
    rollout_python: str
    logs: Path


def main(parts: tuple[str, ...] = PARTS, setting: Setting | None = None) -> Result:
    """Run the parts, each in a process, and gather their rows. A failed part is a missed bar."""
    result = Result([])
    with tempfile.TemporaryDirectory() as scratch:
        setting = setting or Setting(
            None,
            None,
            sys.executable,
            str(HOME / ".venv-rollout" / "bin" / "python"),
            Path(scratch),
        )
        for part in parts:
            rows = _run(part, setting)
            result.rows += [{"part": part, **row} for row in rows]
            result.at_least(f"{part} completed", float(bool(rows)), 1.0)
    return result


def _run(part: str, setting: Setting) -> list[dict[str, Any]]:
    """Run one part in a process; its rows, or none if it failed."""
    setting.logs.mkdir(parents=True, exist_ok=True)
    out, log = setting.logs / f"{part}.json", setting.logs / f"{part}.log"
    command = [setting.trainer_python, "-m", f"bench.gpu.{part}", "--out", str(out)]
    command += ["--rollout-python", setting.rollout_python, "--logs", str(setting.logs)]
    for name in ("model", "data"):
        if (path := getattr(setting, name)) is not None:
            command += [f"--{name}", str(path)]
    start = time.monotonic()
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S[part],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    taken = time.monotonic() - start
    print(f"{part}: exit code {code} after {taken:.0f} s", flush=True)
    if code:
        print("\n".join(log.read_text().splitlines()[-40:]), flush=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    return rows
