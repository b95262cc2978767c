"""A learner step on one device: what it computes, how fast, and in how much memory.

Rows:
- check: log-probs of a small pack by the packed attention and the chunked loss head, and the
  gradient of the loss head, compared with float32 eager transformers on the same device.
- step: reference log-probs and update of about four micro-batches of 8,192 tokens; groups
  of 8 sequences with a prompt of 128 tokens and answers of 256 to 512. MFU counts the FLOPs of
  computed tokens and of causal attention, divided by the rate of a bfloat16 matrix product in the
  same process. Recomputed activations do not count.
"""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from atropos_hpc.config import AlgorithmConf, Config, ModelConf, TrainerConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.runtime import sizing
from atropos_hpc.runtime.model_sizes import sizes_of
from bench.gpu import parts
from bench.gpu.parts import SHAPES, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = 8192 if DEVICE == "cuda" else 512
PROMPT, SHORTEST, LONGEST = (128, 256, 512) if DEVICE == "cuda" else (8, 16, 32)
GROUP = 8
ROUNDS = 3


def groups_of(tokens: int, vocabulary: int) -> list[Group]:
    """Groups that fill about `tokens` tokens, with behaviour log-probs."""
    rng, made, total = np.random.default_rng(0), [], 0
    while total < tokens:
        lengths = (PROMPT + rng.integers(SHORTEST, LONGEST, GROUP)).astype(np.uint32)
        count = int(lengths.sum())
        position = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        trained = position >= PROMPT
        log_probs = np.where(trained, -7.0, 1.0).astype(np.float32)
        ids = rng.integers(0, vocabulary, count).astype(np.int32)
        ids[~trained] = np.tile(ids[:PROMPT], GROUP)  # one prompt, which is computed once
        made.append(Group(lengths, rng.random(GROUP), ids, trained, inference_logprobs=log_probs))
        total += count
    return made


def config_of(model: Path, dtype: str, checkpointing: bool) -> Config:
    config = Config(run_dir="/nowhere")
    config.model = ModelConf(path=str(model), dtype=dtype, max_length=4096, attention="sdpa")
    config.trainer = TrainerConf(
        learning_rate=1e-6, tokens_per_micro_batch=BUDGET, gradient_checkpointing=checkpointing
    )
    config.roles.trainer.gpus_per_node = int(DEVICE == "cuda")
    return config


def backend_of(config: Config) -> Any:
    from atropos_hpc.learner.backends.verl import VerlBackend

    return VerlBackend(config.model, config.trainer, config.algorithm, 0)


def estimated(config: Config, computed: int) -> float:
    """Return the estimated peak, in GiB, with so many tokens in the largest micro-batch."""
    sizes = sizes_of(config)
    assert sizes is not None
    return max(sizing.Learner(config, sizes, computed).phases().values()) / sizing.GIB


def batch_of(groups: list[Group]) -> Any:
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    return make_batch(groups, BatchSettings(AlgorithmConf(), BUDGET, 4096), 0)


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 matrix product of random numbers."""
    size = 8192 if DEVICE == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step(shape: Shape, model: Path, rate: float, checkpointing: bool) -> dict[str, Any]:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = config_of(model, "bfloat16", checkpointing)
    backend, computed = backend_of(config), []
    backend.module.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: computed.append(inputs[0].shape[1])
    )
    groups = groups_of(4 * BUDGET, shape.vocabulary)
    tokens = sum(len(group.tokens) for group in groups)
    reference, update = [], []
    for _ in range(ROUNDS + 1):
        batch = batch_of(groups)
        synchronize()
        start = time.perf_counter()
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        synchronize()
        middle = time.perf_counter()
        backend.update(batch, 0)
        synchronize()
        reference.append(middle - start)
        update.append(time.perf_counter() - middle)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    seconds = min(update[1:])
    row = {
        "what": f"step {shape.name}, {'with' if checkpointing else 'no'} activation checkpointing",
        "tokens": tokens,
        "update s": seconds,
        "first update s": update[0],
        "reference s": min(reference[1:]),
        "update tokens/s": tokens / seconds,
        "MFU of update": backend.flop_rates.of(backend.computed) / seconds / rate,
        "matmul TFLOP/s": rate / 1e12,
        "peak GiB": peak,
        "estimated GiB": estimated(config, max(computed)),
    }
    backend.close()
    del backend
    gc.collect()
    return row


def check(model: Path) -> dict[str, Any]:
    """Compare log-probs and the loss head's gradient with float32."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).to(DEVICE)
    groups = groups_of(BUDGET // 2, int(exact.config.vocab_size))
    wanted = []
    with torch.no_grad():
        for group in groups:
            for row, mask in zip(
                *(
                    np.split(a, np.cumsum(group.lengths)[:-1])
                    for a in (group.tokens, group.trained)
                ),
                strict=True,
            ):
                ids = torch.tensor(row, dtype=torch.long, device=DEVICE)
                log_probs = exact(ids[None]).logits[0, :-1].float().log_softmax(-1)
                chosen = log_probs.gather(-1, ids[1:, None])[:, 0].cpu()
                wanted.append(chosen[torch.tensor(mask[1:])])
    del exact
    found = {}
    for name, dtype in (("bfloat16", "bfloat16"), ("float32", "float32")):
        backend = backend_of(config_of(model, dtype, False))
        batch = batch_of(groups)
        got = backend.log_probs(batch).values()[batch.tensors["response_mask"].values().bool()]
        difference = (got - torch.cat(wanted)).abs()
        found[f"{name}, mean |error| nats"] = float(difference.mean())
        found[f"{name}, largest"] = float(difference.max())
        backend.close()
        del backend
        gc.collect()
    return {"what": "check of log-probs against float32 eager", **found, **head_error()}


def head_error() -> dict[str, float]:
    """Compare the loss head's float32 gradient with autograd through whole logits, relatively."""
    from atropos_hpc.learner.loss_head import LossHead, Targets

    torch.manual_seed(0)
    rows, hidden_size, vocabulary = 700, 64, 3000
    layer = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=DEVICE)
    hidden = torch.randn(1, rows, hidden_size, device=DEVICE, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    temperature = torch.rand(rows, device=DEVICE) + 0.5
    every = (layer(hidden)[0] / temperature[:, None]).log_softmax(-1)
    entropy = -(every.exp() * every).sum(-1)
    wanted = torch.autograd.grad(
        (every.gather(-1, labels[:, None])[:, 0] * 0.7 + entropy * 0.3).sum(),
        [hidden, layer.weight],
    )
    head = LossHead(layer, vocabulary)
    every = torch.arange(rows, device=DEVICE)
    head.targets = Targets(rows, every, every, labels, temperature)
    found = layer(hidden)[0]
    got = torch.autograd.grad((found[:, 0] * 0.7 + found[:, 1] * 0.3).sum(), [hidden, layer.weight])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    return {"loss head, gradient error": max(errors)}


def main() -> None:
    options, rows = parts.options(__doc__), []
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)
        kind = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(kind, store=store, rank=0, world_size=1)
        rate = matmul_rate()
        for shape in SHAPES[DEVICE]:
            model = parts.make_model(shape, Path(scratch) / shape.name, DEVICE)
            if shape is SHAPES[DEVICE][0]:
                rows.append(check(model))
                parts.save_rows(options.out, rows)
            for checkpointing in (True, False):
                rows.append(step(shape, model, rate, checkpointing))
                parts.save_rows(options.out, rows)
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
