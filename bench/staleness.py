"""Measure what overlapping generation and training gains: on-policy, and with staleness 2.

Two runs of the arithmetic experiment, one after the other, that differ only in `staleness.max`. The
result is the share of the learner's time, between its first and last step, that it waits for
batches."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.runtime.run_dir import RunDir, read_records
from bench.result import Result

STEPS = 40
WARM_UP = 5  # first steps, in which caches fill


def run(staleness: int, directory: Path) -> dict[str, Any]:
    """Run once, and return the metrics of the steps after the warm-up."""
    overrides = [
        f"run_dir={directory}",
        f"trainer.steps={STEPS}",
        f"staleness.max={staleness}",
        "evaluation.every=0",
        "evaluation.before=false",
        "evaluation.after=false",
    ]
    subprocess.run(
        [sys.executable, "-m", "atropos_hpc.train", *overrides], check=True, timeout=1800
    )
    steps = read_records(RunDir(directory).metrics, StepMetrics)[WARM_UP:]
    wall = sum(step.step_s for step in steps)

    def total(name: str) -> float:
        return sum(step.get(name) or 0.0 for step in steps)

    return {
        "staleness.max": staleness,
        "waiting share": sum(step.phases["wait"] for step in steps) / wall,
        "s per step": wall / len(steps),
        "stale sequences": int(total("stale_sequences")),
        "mean staleness": total("off_policy/staleness_mean") / len(steps),
        "dropped as stale": int(steps[-1].get("dropped_as_stale") or 0),
        "sequences": int(total("sequences")),
    }


def main() -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        rows = [run(staleness, Path(scratch) / f"staleness-{staleness}") for staleness in (0, 2)]
    on_policy, overlapped = rows
    result = Result(rows)
    result.at_most("stale sequences at staleness.max=0", on_policy["stale sequences"], 0)
    result.at_most(
        "waiting share at 2, as a part of that at 0",
        overlapped["waiting share"] / on_policy["waiting share"],
        0.95,
    )
    result.at_least(
        "speed of a step at 2 over 0", on_policy["s per step"] / overlapped["s per step"], 1.0
    )
    return result
