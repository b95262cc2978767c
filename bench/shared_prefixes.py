"""Measure a step's passes with the prefixes of groups computed once, against each sequence alone.

The model has the shapes of SmolLM2-135M with random weights, in bfloat16, with one rank and one
thread. A row is one group of 8 sequences: the reference's log-probs and the update, with and
without `trainer.share_prefixes`, in CPU seconds, the better of two rounds each. Beside the measured
ratio stands that of the updates' FLOPs, which bounds it where all arithmetic runs at one rate.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.contracts.group import Group
from bench.result import Result

GROUP = 8
SHAPES = {  # tokens of prompt and completion, and the bar for the ratio
    "GSM8K": (125, 130, 1.5),
    "long prompt": (1024, 128, 4.0),
    "nothing shared": (0, 255, 0.98),
}
MAX_LENGTH = 2048
VOCABULARY = 49152
ROUNDS = 2


def group_of(prompt: int, completion: int) -> Group:
    """Make a group whose completions are of 0.5 to 1.5 times the given length."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, VOCABULARY, prompt)
    own = np.linspace(0.5, 1.5, GROUP) * completion
    parts = [np.append(common, rng.integers(0, VOCABULARY, int(n))) for n in own]
    lengths = np.array([len(part) for part in parts], np.uint32)
    trained = np.concatenate([np.arange(n) >= max(1, prompt) for n in lengths])
    tokens = np.concatenate(parts).astype(np.int32)
    log_probs = np.where(trained, -10.0, 1.0).astype(np.float32)
    return Group(lengths, rng.random(GROUP), tokens, trained, inference_logprobs=log_probs)


def model_of(directory: Path) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(directory)
    return str(directory)


def seconds(backend: Any, group: Group) -> tuple[float, float]:
    """Return CPU seconds of the reference's pass and of the update."""
    from atropos_hpc.config import AlgorithmConf
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    batch = make_batch([group], BatchSettings(AlgorithmConf(), 16384, MAX_LENGTH), 0)
    start = time.process_time()
    batch.set_reference_log_probs(backend.reference_log_probs(batch))
    middle = time.process_time()
    backend.update(batch, 0)
    return middle - start, time.process_time() - middle


def main() -> Result:
    import torch
    import torch.distributed as dist

    from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf
    from atropos_hpc.learner.backends.verl import VerlBackend

    torch.set_num_threads(1)
    result = Result([])
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        model = ModelConf(path=model_of(Path(scratch) / "model"), max_length=MAX_LENGTH)
        trainer = TrainerConf(learning_rate=1e-6, gradient_checkpointing=False)
        backends = {
            shared: VerlBackend(
                model, replace(trainer, share_prefixes=shared, optim={}), AlgorithmConf(), 0
            )
            for shared in (False, True)
        }
        for what, (prompt, completion, bar) in SHAPES.items():
            group = group_of(prompt, completion)
            best = dict.fromkeys(backends, (float("inf"), float("inf")))
            flops = dict.fromkeys(backends, 0.0)
            for _ in range(ROUNDS):
                for shared, backend in backends.items():
                    best[shared] = min(best[shared], seconds(backend, group), key=sum)
                    flops[shared] = backend.flop_rates.of(backend.computed)
            ratio = sum(best[False]) / sum(best[True])
            result.rows.append(
                {
                    "group": f"{what}: {GROUP} x [{prompt} + {completion}]",
                    "reference, alone": best[False][0],
                    "update, alone": best[False][1],
                    "reference, shared": best[True][0],
                    "update, shared": best[True][1],
                    "ratio": ratio,
                    "ratio of FLOPs": flops[False] / flops[True],
                }
            )
            result.at_least(f"{what}: CPU time without sharing, over with", ratio, bar)
        dist.destroy_process_group()
    return result
