"""Compare a whole run with TRL's GRPOTrainer: wall time to a held-out accuracy of 0.85.

Both sides start from the same base and take the same prompts in the same order, 32 by 8 samples per
step, with the same reward, AdamW settings, KL and clip, in float32, on the same cores, one after
the other. This side is `experiment=arithmetic_cpu`: vLLM, environments, trajectory server and
learner are separate processes, and one version of staleness is allowed. TRL generates and trains in
turn within one process (bench/trl/grpo.py) with transformers' generation, because it drives no vLLM
on a CPU.

The clock starts with the command. Neither side evaluates during the run: every KEEP-th version is
kept and judged afterwards by the same function, the mean probability of the right answer over all
held-out problems. `make bench NAME=end_to_end` installs TRL's environment, which is separate from
the trainer's.

The result also has what bounds each side: seconds of a step by part, and CPU seconds by process.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.launch import hydra_api
from atropos_hpc.runtime.run_dir import RunDir, read_records
from bench.parts.processes import run
from bench.parts.trl import run_trl
from bench.result import Result

STEPS, KEEP, SEED = 120, 5, 0
BAR = 0.85  # held-out accuracy


@dataclass
class Side:
    """One side's run: Unix times of its start and of each step's end, weights, and times."""

    name: str
    start: float
    ends: dict[int, float]
    weights: dict[int, list[Path]]
    parts: dict[str, float]  # seconds of a step
    cpu: dict[str, float]  # CPU seconds of the whole run, by process


def run_atropos_hpc(scratch: Path) -> Side:
    """Run the experiment; every version that it publishes stays on disk."""
    directory = scratch / "ours"
    overrides = [
        f"run_dir={directory}",
        f"seed={SEED}",
        f"trainer.steps={STEPS}",
        "policy.keep=1000",
        "evaluation.every=0",
        "evaluation.before=false",
        "evaluation.after=false",
    ]
    command = [sys.executable, "-m", "atropos_hpc.train", *overrides]
    ran = run(command, scratch / "ours.log")
    lines = read_records(RunDir(directory).metrics, StepMetrics)[1:]
    phases = {
        name: sum(line.phases.get(name, 0.0) for line in lines) / len(lines)
        for name in lines[0].phases
    }
    phases["step"] = sum(line.step_s for line in lines) / len(lines)
    versions = {
        int(path.parent.name.partition("-")[0]): path.parent
        for path in (directory / "policy").glob("*-*/manifest.json")
    }
    ends = {
        step: (path / "manifest.json").stat().st_mtime for step, path in versions.items() if step
    }
    kept = {
        step: list(path.glob("*.safetensors"))
        for step, path in versions.items()
        if step and step % KEEP == 0
    }
    return Side("atropos_hpc", ran.start, ends, kept, phases, ran.cpu)


def run_trainer_of_trl(scratch: Path, base: Path) -> Side:
    """Run GRPOTrainer with the settings of experiment=arithmetic_cpu."""
    out = scratch / "trl"
    ran, times = run_trl(composed(), base, out, steps=STEPS, keep=KEEP, seed=SEED)
    parts = {name: seconds / STEPS for name, seconds in times["seconds"].items()}
    kept = {step: [out / f"weights-{step}.safetensors"] for step in range(KEEP, STEPS + 1, KEEP)}
    ends = {int(step): end for step, end in times["steps"].items() if int(step)}
    return Side("TRL", ran.start, ends, kept, parts, ran.cpu)


def composed() -> Config:
    """Compose the config of experiment=arithmetic_cpu."""
    return hydra_api.compose([f"seed={SEED}", "experiment=arithmetic_cpu"])


def evaluate(side: Side, base: Path) -> dict[int, float]:
    """Return the held-out accuracy of each kept version."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from atropos_hpc.environments.addition import problems
    from atropos_hpc.environments.make_base import accuracy

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    curve = {}
    for step, files in sorted(side.weights.items()):
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        unknown = model.load_state_dict(weights, strict=False)
        assert not unknown.unexpected_keys and len(unknown.missing_keys) <= 1, (
            unknown
        )  # output layer and embedding are one tensor
        curve[step] = accuracy(model, problems(held_out=True))[0]
    return curve


def row_of(side: Side, curve: dict[int, float]) -> dict[str, Any]:
    reached = next((step for step, value in curve.items() if value >= BAR), None)
    if reached is None:
        raise RuntimeError(f"{side.name} did not reach {BAR} in {STEPS} steps: {curve}")
    wall = side.ends[STEPS] - side.start
    return {
        "side": side.name,
        "until step 1, s": side.ends[1] - side.start,
        "s per step": (side.ends[STEPS] - side.ends[1]) / (STEPS - 1),
        f"steps to {BAR}": reached,
        f"s to {BAR}": side.ends[reached] - side.start,
        "of it after step 1": side.ends[reached] - side.ends[1],
        f"accuracy after {STEPS}": curve[STEPS],
        "cores busy": sum(side.cpu.values()) / wall,
    }


def main() -> Result:

    from atropos_hpc.launch.base_model import ensure

    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = Path(ensure(composed().model, sys.executable, scratch / "make_base.log"))
        sides = [run_trainer_of_trl(scratch, base), run_atropos_hpc(scratch)]
        curves = {side.name: evaluate(side, base) for side in sides}
    rows = [row_of(side, curves[side.name]) for side in sides]
    details = {
        "seconds of a step": {s.name: s.parts for s in sides},
        "CPU seconds": {s.name: s.cpu for s in sides},
        "accuracy": curves,
    }
    result = Result(rows, details=details)
    theirs, ours = rows
    result.at_least(
        f"wall time to {BAR}, TRL / ours", theirs[f"s to {BAR}"] / ours[f"s to {BAR}"], 2.0
    )
    result.at_least("s per step, TRL / ours", theirs["s per step"] / ours["s per step"], 2.0)
    return result
