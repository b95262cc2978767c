"""Measure whether the learner's policy is the one that was sampled, for each way of truncation.

A real server of the rollout role answers PROMPTS with a pretrained model in float32, with the
sampling options of each row. The groups go through the record of the trajectory server, and the
learner computes the log-probs of their tokens with the same weights: once with the support of each
token, once over the whole vocabulary, as if nothing had been truncated. The ratio is behaviour /
learner, per token; it is 1 but for rounding where both are over the same distribution.

The model is MODEL in the environment: a directory in the form of transformers, with a chat
template."""

import asyncio
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from atropos_hpc.config import AlgorithmConf, Config, ModelConf, RolloutConf, TrainerConf
from atropos_hpc.contracts.group import Group, encode_group, read_group
from atropos_hpc.contracts.members import AgentState, Roster, ServerState
from atropos_hpc.contracts.messages import GenerateRequest, SamplingParams
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.contracts.scored_group import ScoredGroup
from atropos_hpc.rollout.sampling_support import add_support, sampled, with_support
from atropos_hpc.rollout.server_pool import Pool
from atropos_hpc.rollout.stamping import stamp
from atropos_hpc.runtime.run_dir import RunDir, write_json, write_struct
from bench.policy_stall import served, up
from bench.result import Result

MODEL = "MODEL"
PROMPTS = (
    "Write a short story about a lighthouse keeper.",
    "List five uses of a paper clip.",
    "Explain photosynthesis to a child.",
    "What is 17 times 23? Think step by step.",
    "Give me a recipe with lentils.",
    "Describe the city of Lisbon.",
    "Write a poem about winter.",
    "Why is the sky blue?",
)
SAMPLES, TOKENS, MAX_LENGTH = 4, 32, 256
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_p 0.8": {"top_p": 0.8},
    "top_k 20": {"top_k": 20},
    "min_p 0.1": {"min_p": 0.1},
    "all": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1},
}
ROLLOUT = RolloutConf(
    memory_utilization=0.05,
    kv_cache_bytes=3 << 29,
    enforce_eager=True,
    max_support=16384,  # whatever top_p alone leaves
    variables={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
)


async def sample(
    run: RunDir, url: str, log: Path, prompts: list[list[int]]
) -> dict[str, list[Group]]:
    """Return the groups of each row. All rows are sampled at the same time."""
    async with aiohttp.ClientSession() as session:
        await up(session, url, log)
    server = ServerState(url=url, version=PolicyVersion(version=0, attempt=1))
    write_struct(run.roster, Roster(members={"agent-a-0": AgentState(servers=[server])}))
    pool = Pool(run)

    async def row(options: dict[str, Any]) -> list[Group]:
        return await asyncio.gather(*(group_of(pool, prompt, options) for prompt in prompts))

    found = await asyncio.gather(*(row(options) for options in ROWS.values()))
    await pool.close()
    return dict(zip(ROWS, found, strict=True))


async def group_of(pool: Pool, prompt: list[int], options: dict[str, Any]) -> Group:
    """Sample a group as an environment does, and read it as the learner does."""
    options = {"temperature": 1.0, **options}
    plain = SamplingParams(n=SAMPLES, max_tokens=TOKENS, logprobs=0, **options)
    sampling = with_support(plain, ROLLOUT.max_support)
    answer = await pool.post(GenerateRequest(prompt, sampling, "tokens", stream=True), 3600)
    choices = answer.choices
    group: dict[str, Any] = {
        "tokens": [prompt + choice.token_ids for choice in choices],
        "masks": [[-100] * len(prompt) + choice.token_ids for choice in choices],
        "scores": [float(i % 2) for i in range(len(choices))],
        "inference_logprobs": [
            [1.0] * len(prompt) + [each.logprob for each in choice.logprobs.content]
            for choice in choices
            if choice.logprobs is not None
        ],
    }
    seen = list(sampled(choices, prompt, sampling))
    stamp(group, seen)
    add_support(group, seen, ROLLOUT, binary=True)
    return read_group(bytearray(encode_group(ScoredGroup.from_python(group)).to_bytes()))


class Learner:
    """The learner's log-probs of groups, with the model as it is."""

    def __init__(self, model: str, directory: Path) -> None:
        import torch.distributed as dist

        from atropos_hpc.learner.backends.verl import VerlBackend

        store = dist.FileStore(str(directory / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.algorithm = AlgorithmConf(kl_coef=0)
        conf = ModelConf(path=model, dtype="float32", max_length=MAX_LENGTH)
        self.backend = VerlBackend(conf, TrainerConf(), self.algorithm, seed=0, reference=False)

    def ratios(self, groups: list[Group]) -> np.ndarray:
        """Return log(behaviour / learner) of each trained token."""
        from atropos_hpc.learner.batch import BatchSettings, make_batch

        batch = make_batch(groups, BatchSettings(self.algorithm, 2048, MAX_LENGTH), 0)
        mask = batch.tensors["response_mask"].values().bool()
        behaviour = batch.tensors["behaviour_log_probs"].values()[mask].double()
        own = self.backend.log_probs(batch).values()[mask].double()
        ratios: np.ndarray = (behaviour - own).numpy()
        return ratios


def row_of(name: str, groups: list[Group], learner: Learner) -> dict[str, Any]:
    with_it = learner.ratios(groups)
    supports = [group.support for group in groups if group.support is not None]
    without = with_it
    if supports:
        without = learner.ratios([dataclasses.replace(group, support=None) for group in groups])
    counts = [each.counts[each.counts > 0] for each in supports]
    kept = np.concatenate([np.zeros(0, np.int64), *counts])
    size = sum(len(each.encode()) for each in supports)
    return {
        "sampling": name,
        "tokens": len(with_it),
        "ids left: mean": float(kept.mean()) if kept.size else None,
        "ids left: largest": int(kept.max()) if kept.size else None,
        "bytes per token": size / len(with_it),
        "mean ratio": float(np.exp(with_it).mean()),
        "p99.9 of |log ratio|": float(np.quantile(np.abs(with_it), 0.999)),
        "mean ratio without replay": float(np.exp(without).mean()),
        "p99.9 without replay": float(np.quantile(np.abs(without), 0.999)),
    }


def main() -> Result:
    from transformers import AutoTokenizer

    model = os.environ.get(MODEL)
    if model is None:
        raise SystemExit(f"set {MODEL} to the directory of a pretrained model with a chat template")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        run = RunDir(root / "run")
        run.create()
        config = Config(run_dir=str(run.path), rollout=ROLLOUT)
        config.environment.target = "nowhere:Nothing"
        config.model.path, config.model.max_length = model, MAX_LENGTH
        config.model.dtype = "float32"
        write_json(run.run_json, {"config": dataclasses.asdict(config)})
        with served(run, root / "log") as url:
            found = asyncio.run(sample(run, url, root / "log", prompts))
        learner, result = Learner(model, root), Result([])
        for name, groups in found.items():
            result.rows.append(row_of(name, groups, learner))
            print(result.rows[-1], flush=True)
    worst = max(abs(row["mean ratio"] - 1) for row in result.rows)
    result.at_most("|mean ratio - 1|, the worst row", worst, 0.005)
    return result
