"""Compare a step of a pretrained model with TRL's: SmolLM2-135M on GSM8K's prompts, on a CPU.

Both sides start from the same weights and take the same prompts in the same order, 8 by 8 samples
of at most 160 tokens per step, with the same AdamW settings, KL and clip: float32 weights, bfloat16
computation. This side has the defaults: one version of staleness, vLLM, environment, trajectory
server and learner as separate processes. Groups of equal scores are trained too, as in TRL: this
model solves few problems. Neither side evaluates. TRL generates and trains in turn
(bench/trl/grpo.py).

Seconds per step are those after the first step; CPU seconds of all processes show how far other
work on the machine has stretched them. Memory is the sum of the proportional memory of all
processes, sampled twice per second. The same run measures what the machine can do: a bfloat16
matrix product, vLLM alone, and where a learner's step spends its CPU time.

`REAL_MODEL=DIR GSM8K=DIR` name the model and the directory of train.jsonl and test.jsonl; without
them, the model comes from the cache of `model=smollm2_135m`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.launch import hydra_api
from atropos_hpc.launch.steps import rollout_python
from atropos_hpc.runtime.model_sizes import Sizes, sizes_of
from atropos_hpc.runtime.run_dir import RunDir, read_records
from bench.parts.processes import ROOT, run
from bench.parts.trl import run_trl
from bench.result import Result

STEPS, TRL_STEPS = int(os.environ.get("STEPS", "5")), int(os.environ.get("TRL_STEPS", "3"))
TOKENS, MICRO, SEED = 160, 16, 0


def overrides(scratch: Path) -> list[str]:
    """Return the run's config: defaults, and what defines the task."""
    data = Path(os.environ["GSM8K"])
    model = [f"model.path={os.environ['REAL_MODEL']}"] if "REAL_MODEL" in os.environ else []
    return [
        f"run_dir={scratch / 'ours'}",
        f"seed={SEED}",
        "model=smollm2_135m",
        *model,
        "environment=gsm8k",
        f"environment.config.train_path={data / 'train.jsonl'}",
        f"environment.config.test_path={data / 'test.jsonl'}",
        f"environment.config.max_tokens={TOKENS}",
        "environment.config.ensure_scores_are_not_same=false",
        "rollout=vllm_cpu",
        "algorithm.batch_size=64",
        f"trainer.steps={STEPS}",
        "evaluation.before=false",
        "evaluation.after=false",
    ]


def write_problems(base: str, path: Path) -> list[str]:
    """Write the first prompts of an epoch, in the environment's order. Returns them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = Path(os.environ["GSM8K"], "train.jsonl").read_text().splitlines()
    order = random.Random(f"{SEED}/0").sample(range(len(lines)), len(lines))
    system = (
        "Solve the problem step by step. On the last line write #### and then the answer, as a"
        " number and nothing else. For example: #### 42"
    )
    rows = []
    for index in order[: 8 * TRL_STEPS]:
        row = json.loads(lines[index])
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": row["question"]},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt, "answer": row["answer"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(row["prompt"]) for row in rows]


def matmul_rate() -> float:
    """Return FLOP/s of bfloat16 matrix products of the model's shape, on all cores."""
    import torch

    x = torch.randn(2048, 576, dtype=torch.bfloat16)
    w = torch.randn(576, 1536, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(10):
            x @ w
        best = min(best, time.perf_counter() - start)
    return 10 * 2 * 2048 * 576 * 1536 / best


def generation_alone(conf: Config, base: str, prompts: list[str], scratch: Path) -> float:
    """Return vLLM's tokens per second with nothing beside it, 64 sequences at once."""
    texts = scratch / "prompts"
    texts.write_text("\0".join(prompts[:8]))
    script = str(ROOT / "bench" / "parts" / "generation.py")
    command = [rollout_python(conf), script, base, str(texts), "64", str(TOKENS)]
    variables = {**os.environ, **conf.rollout.variables, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"vLLM alone ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return float(ran.stdout.rpartition("tokens_per_s=")[2].split()[0])


def profile(base: str) -> dict[str, float]:
    """Return fractions of a learner step's CPU time, by operator, on a batch of this shape."""
    import torch
    import torch.distributed as dist

    from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf
    from atropos_hpc.learner.backends.verl import VerlBackend
    from atropos_hpc.learner.batch import BatchSettings, make_batch
    from bench.shared_prefixes import group_of

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = TrainerConf(learning_rate=1e-6, gradient_checkpointing=False)
    backend = VerlBackend(ModelConf(path=base, max_length=512), trainer, AlgorithmConf(), 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    for _ in range(2):  # the second one counts
        groups = [group_of(100, 140) for _ in range(2)]
        batch = make_batch(groups, BatchSettings(AlgorithmConf(), 2048, 512), 0)
        with torch.profiler.profile(activities=activities) as found:
            batch.set_reference_log_probs(backend.reference_log_probs(batch))
            backend.update(batch, 0)
    dist.destroy_process_group()
    averages = found.key_averages()
    total = sum(each.self_cpu_time_total for each in averages)
    largest = sorted(averages, key=lambda each: -each.self_cpu_time_total)[:15]
    return {each.key: round(each.self_cpu_time_total / total, 3) for each in largest}


def phases_of(lines: list[StepMetrics], model: Sizes, rate: float) -> dict[str, dict[str, float]]:
    """Return seconds, tokens/s and the fraction of the matrix product's rate, by phase."""
    found = {}
    layers, head = model.layers * model.layer, model.embedding
    passes = {"update": 6, "log_probs": 2}  # FLOPs per parameter and token

    def mean(name: str) -> float:
        return sum(line.get(name) or 0.0 for line in lines) / len(lines)

    tokens, trained, first = (mean(n) for n in ("tokens", "trained_tokens", "first_tokens"))
    prompts = tokens - trained
    computed = trained + prompts / 8  # a prompt counts once per group
    for name in lines[0].phases:
        seconds = sum(line.phases.get(name, 0.0) for line in lines) / len(lines)
        found[name] = {"s": seconds}
        if name in passes:
            flops = passes[name] * (layers * computed + head * trained)
            found[name] |= {
                "tokens/s": tokens / seconds,
                "computed tokens/s": computed / seconds,
                "of the matrix product": flops / seconds / rate,
            }
    found["batch of a step"] = {"tokens": tokens, "trained": trained, "first": first}
    return found


def main() -> Result:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        conf = hydra_api.compose(overrides(scratch))
        from atropos_hpc.launch.base_model import ensure

        base = conf.model.path or ensure(conf.model, sys.executable, scratch / "make.log")
        conf.model.path = str(base)
        prompts = write_problems(str(base), scratch / "problems.jsonl")
        rate = matmul_rate()
        command = [sys.executable, "-m", "atropos_hpc.train", *overrides(scratch)]
        ours = run(command, scratch / "ours.log", memory=True)
        lines = read_records(RunDir(scratch / "ours").metrics, StepMetrics)
        alone = generation_alone(conf, str(base), prompts, scratch)
        theirs, times = run_trl(
            conf,
            base,
            scratch / "trl",
            memory=True,
            steps=TRL_STEPS,
            keep=TRL_STEPS + 1,
            seed=SEED,
            problems=scratch / "problems.jsonl",
            tokens=TOKENS,
            micro=MICRO,
        )
    model = sizes_of(conf)
    assert model is not None
    ends = [times["steps"][str(step)] for step in (1, TRL_STEPS)]
    trl_s = (ends[1] - ends[0]) / (TRL_STEPS - 1)
    ours_s = sum(line.step_s for line in lines[1:]) / len(lines[1:])
    trl_cpu = theirs.cpu_between(*ends) / (TRL_STEPS - 1)
    ours_cpu = ours.cpu_between(lines[0].time, lines[-1].time) / len(lines[1:])
    phases = phases_of(lines[1:], model, rate)
    made = phases["batch of a step"]["trained"] / ours_s
    sides = (
        ("TRL", theirs, ends[0], trl_s, trl_cpu),
        ("atropos_hpc", ours, lines[0].time, ours_s, ours_cpu),
    )
    rows = [
        {
            "side": name,
            "s per step": seconds,
            "CPU s per step": cpu,
            "until step 1, s": first - ran.start,
            "peak memory, GB": ran.peak / 1e9,
        }
        for name, ran, first, seconds, cpu in sides
    ]
    details = {
        "phases": phases,
        "step seconds": [line.step_s for line in lines],
        "TRL, seconds of a step": {k: v / TRL_STEPS for k, v in times["seconds"].items()},
        "CPU seconds": {"TRL": theirs.cpu, "atropos_hpc": ours.cpu},
        "peak memory by program, GB": {k: v / 1e9 for k, v in ours.peaks.items()},
        "bf16 matrix product, GFLOP/s": rate / 1e9,
        "vLLM alone, tokens/s": alone,
        "generated in the run, tokens/s": made,
        "profile": profile(str(base)),
    }
    result = Result(rows, details=details)
    result.at_least("s per step, TRL / ours", trl_s / ours_s, 2.2)
    result.at_least("CPU s per step, TRL / ours", trl_cpu / ours_cpu, 2.2)
    result.at_most("peak memory, ours / TRL", ours.peak / theirs.peak, 1.3)
    return result
