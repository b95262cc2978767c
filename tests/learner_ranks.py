"""Helpers of the learner's tests: a tiny model, random groups, training steps, forked ranks."""

import contextlib
import importlib
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from atropos_hpc.config import AlgorithmConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.support import Support
from atropos_hpc.learner.batch import Batch, BatchSettings, make_batch
from atropos_hpc.learner.state import TrainState
from atropos_hpc.policy.shard_writer import ShardWriter
from atropos_hpc.policy.snapshot import Snapshot

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
VOCABULARY = 131
MAX_LENGTH = 150  # above that of any group made here
RANK_SECONDS = 240


def tiny_model(directory: Path, tied: bool = False, layers: int = 2) -> Path:
    """A Qwen3 of random weights, larger than usual so that probabilities differ."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    torch.manual_seed(3)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(rank, world, *arguments)` in forked ranks with a process group; return the results.

    Ranks are forked because importing verl takes seconds. Modules that the ranks imported are
    imported here afterwards, so that the next ranks have them. A rank that fails or takes too long
    fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as scratch:
        children = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _run_rank(rank, world, Path(scratch), work, arguments)
            children[pid] = rank
        failed = False
        for _ in range(world):
            pid, status = _reap(children)
            children.pop(pid)
            if status and not failed:
                failed = True
                for other in children:
                    os.kill(other, signal.SIGKILL)
        errors = [
            f"rank {path.suffix}:\n{path.read_text()}"
            for path in sorted(Path(scratch).glob("error.*"))
        ]
        assert not failed, "\n".join(errors) or "a rank was killed: it took too long"
        _import((Path(scratch) / "imported").read_text().split())
        return [
            torch.load(Path(scratch) / f"result.{rank}", weights_only=False)
            for rank in range(world)
        ]


def _import(names: list[str]) -> None:
    for name in names:
        if name.startswith(("torch.", "transformers.", "verl.", "deepspeed.", "networkx.")):
            with contextlib.suppress(
                Exception
            ):  # what cannot stand alone has come with another, or does not matter
                importlib.import_module(name)


def _reap(children: dict[int, int]) -> tuple[int, int]:
    """Wait for one of these children; a test's process may have others."""
    while True:
        for pid in children:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return pid, status
        signal.sigtimedwait([], 0.02)


def _run_rank(
    rank: int, world: int, scratch: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    code, known = 1, set(sys.modules)
    try:
        signal.alarm(RANK_SECONDS)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        store = dist.FileStore(str(scratch / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        torch.save(work(rank, world, *arguments), scratch / f"result.{rank}")
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0:
            (scratch / "imported").write_text(
                "\n".join(name for name in sys.modules if name not in known)
            )
        code = 0
    except BaseException:  # the parent shows it
        (scratch / f"error.{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def make_group(
    rng: random.Random, size: int, gid: int = 0, first_trained: bool = False, **fields: Any
) -> Group:
    """Several turns: a masked prompt, then trained and masked spans in turn."""
    tokens: list[list[int]] = []
    masks: list[list[bool]] = []
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 40))]
    for i in range(size):
        sequence, mask = list(prompt), [False] * len(prompt)
        for turn in range(rng.randrange(1, 5)):
            span = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 16))]
            sequence += span
            mask += [turn % 2 == 0] * len(span)
        if first_trained and i == 0:
            mask[0] = True
        tokens.append(sequence)
        masks.append(mask)
    return Group(
        lengths=np.array([len(t) for t in tokens], np.uint32),
        scores=np.array([rng.random() for _ in range(size)]),
        tokens=np.array(list(chain(*tokens)), np.int32),
        trained=np.array(list(chain(*masks)), bool),
        gid=gid,
        **fields,
    )


def make_groups(seed: int = 0) -> list[Group]:
    """Make four groups of unequal size.

    One with tokens that were sampled from a part of the vocabulary; one with a fully masked
    sequence; one whose first token is to be trained, with a sequence whose advantage is set to
    zero; one with token-level advantages and such a sequence.
    """
    rng = random.Random(seed)
    plain, masked, first, token_level = (
        make_group(rng, size, gid, first_trained=gid == 2) for gid, size in enumerate((5, 4, 6, 3))
    )
    masked.trained[: masked.lengths[0]] = False
    first.overrides = [{}, {"set_advantage_to_zero": True}, {}, {}, {}, {}]
    token_level.advantages = np.array([rng.gauss(0, 1) for _ in token_level.tokens], np.float32)
    token_level.overrides = [{}, {}, {"set_advantage_to_zero": True}]
    return [with_supports(plain), masked, first, token_level]


def with_supports(group: Group) -> Group:
    """The group as if two tokens of three had been sampled from a part of the vocabulary."""
    draw = np.random.default_rng(5)
    kept = [
        [*draw.choice(VOCABULARY, draw.integers(40), replace=False).tolist(), token]
        if i % 3
        else []
        for i, token in enumerate(group.tokens.tolist())
    ]
    return replace(group, support=Support.of_lists(kept))


def rows(group: Group, values: np.ndarray) -> list[np.ndarray]:
    """A flat per-token array, cut into the group's sequences."""
    return np.split(values, np.cumsum(group.lengths)[:-1])


def one_batch(backend: Any, tokens_per_micro_batch: int = 4096, truncated: bool = True) -> Batch:
    """Make the batch of the backend's present step, with the log-probs that an update needs."""
    groups = make_groups(state_of(backend).version)[backend.data_rank :: backend.data_world]
    if not truncated:
        groups = [replace(group, support=None) for group in groups]
    replicas = backend.world // backend.data_world
    settings = BatchSettings(backend._algorithm, tokens_per_micro_batch, MAX_LENGTH, replicas)
    batch = make_batch(groups, settings, 0)
    batch.set_old_log_probs(backend.log_probs(batch))
    batch.set_reference_log_probs(backend.reference_log_probs(batch))
    return batch


def train(backend: Any, steps: int, tokens_per_micro_batch: int = 4096) -> list[dict[str, float]]:
    """Make that many steps, and return their metrics."""
    metrics = []
    for _ in range(steps):
        metrics.append(
            backend.update(one_batch(backend, tokens_per_micro_batch), state_of(backend).version)
        )
        state_of(backend).version += 1
    return metrics


def state_of(backend: Any) -> TrainState:
    """The training state that goes with a backend; new ones start at version 0."""
    state: TrainState = vars(backend).setdefault("state", TrainState())
    return state


def settings_of(
    algorithm: AlgorithmConf | None = None, budget: int = 4096, max_length: int = MAX_LENGTH
) -> BatchSettings:
    """Settings of a batch on one rank."""
    return BatchSettings(algorithm or AlgorithmConf(), budget, max_length)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of a state's tensors, put together from all ranks."""
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, tensor in tensors.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit-equal, tensor by tensor."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_shards(shot: Snapshot, directory: Path, group: Any) -> Any:
    """Write one snapshot in full. Return the files of all ranks."""
    writer = ShardWriter(group)
    return writer.write_full(directory, writer.fill(shot))
