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

The result also has what bounds each side: seconds of a step by part, CPU seconds by process and of
a step, and what vLLM and the learner take for a step when each is alone on the machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, micro_batch_tokens
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.launch import hydra_api
from atropos_hpc.runtime.run_dir import RunDir, read_records
from bench.parts.processes import ROOT, Ran, run
from bench.parts.trl import run_trl
from bench.result import Result

STEPS, KEEP, SEED = 120, 5, 0
ROUNDS = 30  # of a part that runs alone
BAR = 0.85  # held-out accuracy


@dataclass
class Side:
    """One side's run: Unix times of its start and of each step's end, weights, and times."""

    name: str
    start: float
    ends: dict[int, float]
    weights: dict[int, list[Path]]
    parts: dict[str, float]  # seconds of a step
    ran: Ran


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
    return Side("atropos_hpc", ran.start, ends, kept, phases, ran)


def run_trainer_of_trl(scratch: Path, base: Path) -> Side:
    """Run GRPOTrainer with the settings of experiment=arithmetic_cpu."""
    out = scratch / "trl"
    ran, times = run_trl(composed(), base, out, steps=STEPS, keep=KEEP, seed=SEED)
    parts = {name: seconds / STEPS for name, seconds in times["seconds"].items()}
    kept = {step: [out / f"weights-{step}.safetensors"] for step in range(KEEP, STEPS + 1, KEEP)}
    ends = {int(step): end for step, end in times["steps"].items() if int(step)}
    return Side("TRL", ran.start, ends, kept, parts, ran)


def composed() -> Config:
    """Compose the config of experiment=arithmetic_cpu."""
    return hydra_api.compose([f"seed={SEED}", "experiment=arithmetic_cpu"])


def vllm_alone(conf: Config, base: Path, scratch: Path) -> float:
    """Return the seconds in which vLLM, in one process, samples a step's answers."""
    from atropos_hpc.environments.addition import ANSWER_TOKENS, problems
    from atropos_hpc.launch.steps import rollout_python

    batch, group = conf.algorithm.batch_size, conf.environment.group_size
    prompts = scratch / "prompts"
    prompts.write_text(
        "\0".join(each.prompt for each in problems(held_out=False)[: batch // group])
    )
    engine = {
        "dtype": conf.model.dtype,
        "max_model_len": conf.model.max_length,
        "max_num_seqs": conf.rollout.max_sequences,
        "kv_cache_memory_bytes": conf.rollout.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",
    }
    command = [rollout_python(conf), str(ROOT / "bench" / "parts" / "generation.py"), str(base)]
    command += [str(prompts), str(batch), str(ANSWER_TOKENS), "--samples", str(group)]
    command += ["--rounds", str(ROUNDS), "--engine", json.dumps(engine)]
    variables = {**os.environ, **conf.rollout.variables, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"vLLM alone ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return float(ran.stdout.rpartition("batch_s=")[2].split()[0])


def learner_alone(conf: Config, base: Path) -> dict[str, float]:
    """Return the median seconds of a learner's step, by part, on a batch of the demo's shape."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from atropos_hpc.contracts.group import Group
    from atropos_hpc.learner.backends.verl import VerlBackend
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    torch.set_num_threads(conf.trainer.threads or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    conf.model.path, conf.trainer.gradient_checkpointing = str(base), False  # as it is decided
    backend = VerlBackend(conf.model, conf.trainer, conf.algorithm, conf.seed)
    rng, count = np.random.default_rng(0), conf.environment.group_size
    settings = BatchSettings(conf.algorithm, micro_batch_tokens(conf), conf.model.max_length)
    rows: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        groups = []
        for _ in range(conf.algorithm.batch_size // count):
            prompt, answers = rng.integers(0, 12, 6), rng.integers(0, 12, (count, 4))
            tokens = np.hstack([np.tile(prompt, (count, 1)), answers]).astype(np.int32)
            trained = np.tile(np.arange(10) >= 6, count)
            log_probs = np.where(trained, -1.0, 1.0).astype(np.float32)
            lengths, scores = np.full(count, 10, np.uint32), rng.random(count)
            groups.append(
                Group(lengths, scores, tokens.ravel(), trained, inference_logprobs=log_probs)
            )
        at = [time.perf_counter()]
        batch = make_batch(groups, settings, 0)
        at.append(time.perf_counter())
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        at.append(time.perf_counter())
        backend.update(batch, 0)
        at.append(time.perf_counter())
        rows.append(dict(zip(("batch", "reference", "update"), np.diff(at), strict=True)))
    dist.destroy_process_group()
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


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
        "CPU s per step": side.ran.cpu_between(side.ends[1], side.ends[STEPS]) / (STEPS - 1),
        "cores busy": sum(side.ran.cpu.values()) / wall,
    }


def main() -> Result:

    from atropos_hpc.launch.base_model import ensure

    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        base = Path(ensure(composed().model, sys.executable, scratch / "make_base.log"))
        alone = {"vLLM": vllm_alone(composed(), base, scratch)}
        alone |= learner_alone(composed(), base)
        sides = [run_trainer_of_trl(scratch, base), run_atropos_hpc(scratch)]
        curves = {side.name: evaluate(side, base) for side in sides}
    rows = [row_of(side, curves[side.name]) for side in sides]
    details = {
        "seconds of a step": {s.name: s.parts for s in sides},
        "seconds of a step, alone": alone,
        "CPU seconds": {s.name: s.ran.cpu for s in sides},
        "accuracy": curves,
    }
    result = Result(rows, details=details)
    theirs, ours = rows
    result.at_least(
        f"wall time to {BAR}, TRL / ours", theirs[f"s to {BAR}"] / ours[f"s to {BAR}"], 0.5
    )
    result.at_least("s per step, TRL / ours", theirs["s per step"] / ours["s per step"], 0.5)
    return result
