"""Measure batches without padding against the padded data path of Atropos' example recipe.

The recipe's path is rebuilt here: each sequence is split at its first trained token; prompts are
padded on the left to the longest prompt, responses on the right to the longest response;
micro-batches have a fixed number of such rows; old log-probs are recomputed, because the recipe
drops the behaviour policy's. Both paths use the same engine and model, in float32, with one rank
and one thread.

(a) Tokens per second of a step (log-probs of old and reference policy, update), for lengths with
    little and with much skew. The padded path gets the best number of rows per micro-batch of those
    tried, the packed path the best token budget.
(b) Conversion of 1024 sequences from received groups to the engine's tensors. Each path starts with
    what its own client returns: Python lists (from JSON) there, numpy arrays (from a lease) here.

Tokens are those of the sequences, prompts included, without padding. `padded to` is the number of
positions that the padded path computes per token. 5/4 of it (the padded path makes one forward pass
more) bounds the ratio of (a), except for work that grows faster than linearly with length.
"""

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.contracts.group import Group
from bench.parts.models import random_qwen3
from bench.result import Result

SEQUENCES, GROUP = 32, 8
ROUNDS = 2
ROWS = {
    "20 to 400 tokens": (4, 16),
    "heavy tail to 2000": (4,),
}  # per micro-batch, of the padded way
BUDGETS = {
    "20 to 400 tokens": (512, 1024),
    "heavy tail to 2000": (2048,),
}  # tokens per micro-batch, of the packed way
VOCABULARY = 4096
NOT_TRAINED = -100
SHORTEST_RESPONSE = 8


def lengths(kind: str, count: int) -> list[int]:
    """Return lengths in tokens: uniform between 20 and 400, or log-normal with one of 2000."""
    rng = np.random.default_rng(0)
    if kind == "20 to 400 tokens":
        return [int(n) for n in rng.integers(20, 401, count)]
    return [int(n) for n in np.clip(rng.lognormal(4.9, 0.9, count - 1), 20, 2000)] + [2000]


def groups_of(sizes: list[int]) -> list[Group]:
    """Make groups of GROUP sequences with behaviour log-probs and a common prompt.

    The prompt has up to 100 tokens and leaves each sequence some response.
    """
    rng = np.random.default_rng(1)
    made = []
    for start in range(0, len(sizes), GROUP):
        own = np.array(sizes[start : start + GROUP], np.uint32)
        prompt = int(rng.integers(5, max(6, min(100, int(own.min()) - SHORTEST_RESPONSE))))
        tokens = rng.integers(0, VOCABULARY, int(own.sum())).astype(np.int32)
        position = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        log_probs = np.where(position >= prompt, -7.0, 1.0).astype(np.float32)
        made.append(
            Group(
                own, rng.random(len(own)), tokens, position >= prompt, inference_logprobs=log_probs
            )
        )
    return made


def as_lists(group: Group) -> dict[str, Any]:
    """Return a group as the decoded JSON of Atropos' own API."""
    ends = np.cumsum(group.lengths)[:-1]
    masks = np.where(group.trained, group.tokens, NOT_TRAINED)
    return {
        "tokens": [row.tolist() for row in np.split(group.tokens, ends)],
        "masks": [row.tolist() for row in np.split(masks, ends)],
        "scores": group.scores.tolist(),
    }


def padded(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert as the recipe does: rows [sequences, longest prompt + longest response]."""
    import torch

    prompts, responses, advantages = [], [], []
    for group in groups:
        scores = torch.tensor(group["scores"])
        relative = (scores - scores.mean()) / (scores.std() + 1e-6)
        for tokens, mask, advantage in zip(
            group["tokens"], group["masks"], relative.tolist(), strict=True
        ):
            split = next((i for i, label in enumerate(mask) if label != NOT_TRAINED), len(tokens))
            prompts.append(tokens[:split])
            responses.append(tokens[split:])
            advantages.append(advantage)
    longest_prompt, longest_response = max(map(len, prompts)), max(map(len, responses))
    rows: dict[str, list[Any]] = {
        name: []
        for name in ("input_ids", "attention_mask", "position_ids", "response_mask", "advantages")
    }
    for prompt, response, advantage in zip(prompts, responses, advantages, strict=True):
        before, after = longest_prompt - len(prompt), longest_response - len(response)
        seen = [0] * before + [1] * (len(prompt) + len(response)) + [0] * after
        rows["input_ids"].append(torch.tensor([0] * before + prompt + response + [0] * after))
        rows["attention_mask"].append(torch.tensor(seen))
        rows["position_ids"].append(torch.clamp(torch.cumsum(torch.tensor(seen), 0) - 1, min=0))
        rows["response_mask"].append(torch.tensor([1] * len(response) + [0] * after))
        rows["advantages"].append(torch.tensor([advantage] * len(response) + [0.0] * after))
    return {name: torch.stack(values) for name, values in rows.items()} | {
        "prompt_length": longest_prompt
    }


def padded_batch(groups: list[Group], rows: int) -> Any:
    """Make a batch of the recipe's rows, whose padding counts as tokens, so that it is computed."""
    from atropos_hpc.config import AlgorithmConf
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    made = padded([as_lists(group) for group in groups])
    ids, prompt = made["input_ids"].numpy(), made["prompt_length"]
    trained = np.zeros(ids.shape, bool)
    trained[:, prompt:] = made["response_mask"].numpy().astype(bool)
    trained[:, -1] = (
        True  # a batch is cut behind its last trained token; these rows have to keep their length
    )
    whole, length = [], ids.shape[1]
    for i, group in zip(range(0, len(ids), GROUP), groups, strict=True):
        rows_of_group = ids[i : i + GROUP].reshape(-1).astype(np.int32)
        whole.append(
            Group(
                np.full(GROUP, length, np.uint32),
                group.scores,
                rows_of_group,
                trained[i : i + GROUP].reshape(-1),
            )
        )
    batch = make_batch(whole, BatchSettings(AlgorithmConf(), ids.size, ids.shape[1]), 0)
    from verl.utils import tensordict_utils

    options = {
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": rows,
        "use_remove_padding": False,
    }
    tensordict_utils.assign_non_tensor(batch.tensors, **options)
    return batch


def backend_of(directory: Path) -> Any:
    """Build a Qwen3 of 4 M parameters on verl's engine, with one rank."""
    import torch
    import torch.distributed as dist

    from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf
    from atropos_hpc.learner.backends.verl import VerlBackend

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(directory / "store"), 1), rank=0, world_size=1
    )
    small = random_qwen3(VOCABULARY, 256, 4, (4, 2), max_position_embeddings=4096)
    small.save_pretrained(directory / "model")
    model = ModelConf(path=str(directory / "model"), dtype="float32", max_length=4096)
    return VerlBackend(
        model, TrainerConf(learning_rate=1e-6, gradient_checkpointing=False), AlgorithmConf(), 0
    )


def seconds_of_step(backend: Any, made: Callable[[], Any], recompute: bool) -> tuple[float, float]:
    """Return CPU seconds of (whole step, update alone), the best of ROUNDS."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        batch = made()
        start = time.process_time()
        if recompute:
            batch.needs_log_probs = True
            batch.tensors["old_log_probs"] = batch.tensors["old_log_probs"] * float("nan")
            batch.set_old_log_probs(backend.log_probs(batch))
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        middle = time.process_time()
        backend.update(batch, 0)
        end = time.process_time()
        best = [min(best[0], end - start), min(best[1], end - middle)]
    return best[0], best[1]


def conversion() -> dict[str, Any]:
    """Measure (b). Return a row of the table."""
    from atropos_hpc.config import AlgorithmConf
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    rng = random.Random(0)
    groups = groups_of([rng.randrange(200, 2001) for _ in range(1024)])
    lists = [as_lists(group) for group in groups]
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        start = time.process_time()
        padded(lists)
        middle = time.process_time()
        make_batch(groups, BatchSettings(AlgorithmConf(), 16384, 4096), 0)
        end = time.process_time()
        best = [min(best[0], middle - start), min(best[1], end - middle)]
    tokens = sum(len(group.tokens) for group in groups)
    slow, fast = tokens / best[0], tokens / best[1]
    return {
        "what": "groups to tensors",
        "tokens": tokens,
        "padded": slow,
        "packed": fast,
        "ratio": fast / slow,
        "update alone": "-",
        "padded to": "-",
    }


def step(backend: Any, kind: str) -> dict[str, Any]:
    """Measure (a). Return a row of the table."""
    from atropos_hpc.config import AlgorithmConf
    from atropos_hpc.learner.batch import BatchSettings, make_batch

    sizes = lengths(kind, SEQUENCES)
    groups, tokens = groups_of(sizes), sum(sizes)
    theirs = [
        seconds_of_step(backend, partial(padded_batch, groups, rows), True) for rows in ROWS[kind]
    ]
    packed = [
        partial(make_batch, groups, BatchSettings(AlgorithmConf(), budget, 4096), 0)
        for budget in BUDGETS[kind]
    ]
    ours = [seconds_of_step(backend, made, False) for made in packed]
    (slow, slow_update), (fast, fast_update) = min(theirs), min(ours)
    computed = padded([as_lists(group) for group in groups])["input_ids"].numel()
    return {
        "what": f"step, {kind}",
        "tokens": tokens,
        "padded": tokens / slow,
        "packed": tokens / fast,
        "ratio": slow / fast,
        "update alone": slow_update / fast_update,
        "padded to": computed / tokens,
    }


def main() -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        backend = backend_of(Path(scratch))
        rows = [
            step(backend, "20 to 400 tokens"),
            step(backend, "heavy tail to 2000"),
            conversion(),
        ]
    result = Result(
        rows,
        details={"padded and packed": "tokens per CPU second", "sequences of a step": SEQUENCES},
    )
    for row, bar in zip(rows, (2.5, 4.0, 20.0), strict=True):
        result.at_least(f"{row['what']}, packed / padded", row["ratio"], bar)
    return result
