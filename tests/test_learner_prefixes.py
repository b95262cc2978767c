"""Prefixes that the sequences of a group share are computed once, and nothing else changes."""

import inspect
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from learner_ranks import (  # noqa: E402
    MAX_LENGTH,
    VOCABULARY,
    make_group,
    make_groups,
    on_ranks,
    settings_of,
)
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from verl.utils.tensordict_utils import index_select_tensor_dict  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.learner.backends import packed_attention  # noqa: E402
from atropos_hpc.learner.backends.micro_batches import select  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.learner.prefixes import MIN_PREFIX, local_prefixes, partition, shared_prefixes  # noqa: E402


def sequences(seed: int) -> tuple[list[list[int]], np.ndarray]:
    """Groups of sequences that leave their group's first one at different tokens; group numbers."""
    rng, found, groups = random.Random(seed), [], []
    for group in range(rng.randrange(1, 6)):
        root = [rng.randrange(9) for _ in range(rng.randrange(1, 90))]
        for _ in range(rng.randrange(1, 7)):
            kept = root[: rng.randrange(len(root) + 1)]
            found.append(kept + [rng.randrange(9) for _ in range(rng.randrange(1, 40))])
            groups.append(group)
        found[-1] = rng.choice([root, found[-1]])  # a duplicate, or a mere prefix, of the root
    return found, np.array(groups)


def prefixes_of(found: list[list[int]], groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(tokens) for tokens in found])
    return lengths, shared_prefixes(np.concatenate(found), lengths, groups)


@pytest.mark.parametrize("seed", range(20))
def test_a_prefix_is_what_a_sequence_has_in_common_with_its_root(seed: int) -> None:
    found, groups = sequences(seed)
    _, prefixes = prefixes_of(found, groups)
    root = 0
    for i, prefix in enumerate(prefixes):
        if prefix == 0:
            root = i
            continue
        assert groups[i] == groups[root] and MIN_PREFIX <= prefix < len(found[i])
        assert found[i][:prefix] == found[root][:prefix]
        assert found[i][: prefix + 1] != found[root][: prefix + 1] or prefix == len(found[i]) - 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [130, 260, 1000])
def test_micro_batches_hold_every_sequence_once_within_the_limit(seed: int, limit: int) -> None:
    found, groups = sequences(seed)
    lengths, prefixes = prefixes_of(found, groups)
    least = random.Random(seed).randrange(1, len(found) + 1)  # another rank needs that many
    parts = partition(lengths, prefixes, limit, lambda count: max(count, least))
    assert len(parts) >= least and all(parts)
    assert sorted(i for part in parts for i in part) == list(range(len(found)))
    for part in parts:
        local = local_prefixes(prefixes, part)
        assert lengths[part].sum() - local.sum() <= limit
        root = part[0]
        for i, prefix in zip(part, local, strict=True):
            root = i if prefix == 0 else root
            assert found[i][:prefix] == found[root][:prefix]


def test_sequences_of_a_batch_are_selected_with_all_that_belongs_to_them() -> None:
    tensors = make_batch(make_groups(), settings_of(AlgorithmConf()), 0).tensors
    rows = [5, 0, 12, 3]
    chosen, wanted = select(tensors, rows), index_select_tensor_dict(tensors, rows)
    assert chosen.keys() == wanted.keys() and chosen.batch_size == wanted.batch_size
    names = [name for name, value in tensors.items() if isinstance(value, torch.Tensor)]
    assert len(names) > 5
    padded = chosen.select(*names).to_padded_tensor(), wanted.select(*names).to_padded_tensor()
    for name in names:
        assert_equal = partial(assert_close, rtol=0, atol=0, equal_nan=True, msg=name)
        assert_equal(chosen[name].unbind(), wanted[name].unbind())
        assert_equal(padded[0][name], padded[1][name])


def test_ranks_agree_on_long_sequences_in_a_few_rounds() -> None:
    """A round is collective; sequences of up to half the limit leave room in every micro-batch."""
    lengths = np.random.default_rng(0).integers(2000, 8192, 1024)
    prefixes = np.where(np.arange(len(lengths)) % 8 == 0, 0, 512)
    rounds: list[int] = []
    parts = partition(lengths, prefixes, 16384, lambda count: rounds.append(count) or count)
    assert len(rounds) <= 6
    assert len(parts) < 1.25 * rounds[0], "rounds[0] would be enough if no micro-batch had room"


def pack_of(segments: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions, [1, T], and who sees whom, [T, T], of segments (prefix, length)."""
    positions, seen, root = [], [], 0
    for prefix, length in segments:
        start = len(positions)
        root = start if prefix == 0 else root
        for k in range(length):
            seen.append({*range(root, root + prefix), *range(start, start + k + 1)})
        positions += range(prefix, prefix + length)
    mask = torch.tensor([[j in row for j in range(len(positions))] for row in seen])
    return torch.tensor(positions)[None], mask


PACKS = [
    [(0, 30), (20, 5), (20, 9), (20, 40)],
    [(0, 30), (16, 5), (30, 9), (18, 1), (0, 7), (0, 50), (49, 3), (17, 60)],
    [(0, 20), (20, 3), (20, 2)],  # the first branch goes on where the root ends
    [(0, 3), (0, 64), (40, 1), (63, 1), (0, 1)],
]


@pytest.mark.parametrize("segments", PACKS, ids=str)
def test_a_branch_attends_to_its_prefix_and_itself(segments: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    positions, mask = pack_of(segments)
    total = positions.shape[1]
    shapes = ((1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8))
    mine = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in mine]
    want = scaled_dot_product_attention(*theirs, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    module: Any = SimpleNamespace(num_key_value_groups=2)
    got, _ = packed_attention.attend(module, *mine, None, position_ids=positions)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", PACKS, ids=str)
def test_the_kernel_for_varying_lengths_gets_the_keys_of_each_branch(
    segments: list[tuple[int, int]],
) -> None:
    """Interpret the arguments as torch.nn.attention.varlen does, which needs CUDA."""
    positions, mask = pack_of(segments)
    packed = packed_attention.varlen(positions[0])
    keys = torch.arange(positions.shape[1]) if packed.keys is None else packed.keys
    seen = torch.zeros_like(mask)
    for i, (start, stop) in enumerate(pairwise(packed.query_offsets)):
        own = keys[packed.key_offsets[i] : packed.key_offsets[i + 1]]
        for k, query in enumerate(range(start, stop)):  # causal, aligned at the ends
            seen[query, own[: len(own) - (stop - start) + k + 1]] = True
    assert torch.equal(seen, mask)
    assert packed.longest_query == packed.query_offsets.diff().max()
    assert packed.longest_key == packed.key_offsets.diff().max()


@pytest.mark.parametrize("segments", PACKS, ids=str)
def test_the_call_of_that_kernel_attends_to_each_branch_s_prefix(
    segments: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the kernel's own signature, causal at the ends of queries and keys."""
    from torch.nn.attention.varlen import varlen_attn

    def stand_in(*values: Any, **named: Any) -> torch.Tensor:
        call = inspect.signature(varlen_attn).bind(*values, **named)
        call.apply_defaults()
        given = call.arguments
        assert given["window_size"] == (-1, 0), "which varlen_attn takes for causal"
        offsets = [given[name] for name in ("cu_seq_q", "cu_seq_k")]
        assert all(each.dtype == torch.int32 for each in offsets)
        parts = []
        for (start, stop), (first, last) in zip(
            *(pairwise(o.tolist()) for o in offsets), strict=True
        ):
            q, k, v = (
                given[name][slice(*span)].transpose(0, 1)[None]
                for name, span in (
                    ("query", (start, stop)),
                    ("key", (first, last)),
                    ("value", (first, last)),
                )
            )
            before = (last - first) - (stop - start)
            causal = torch.ones(stop - start, last - first, dtype=torch.bool).tril(before)
            options = {"scale": given["scale"], "enable_gqa": given["enable_gqa"]}
            part = scaled_dot_product_attention(q, k, v, attn_mask=causal, **options)
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)

    torch.manual_seed(0)
    positions, mask = pack_of(segments)
    total = positions.shape[1]
    shapes = ((1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    want = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    _, options = packed_attention._varlen_attention()
    monkeypatch.setattr(packed_attention, "_varlen_attention", lambda: (stand_in, options))
    got = packed_attention._varlen(query, key, value, positions, 0.3)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


# --- with a model


def groups_with_long_prompts() -> list[Group]:
    """Groups whose sequences share 1 to 39 tokens, and one that is all prompt but a few tokens."""
    rng = random.Random(5)
    groups = [make_group(rng, size, gid) for gid, size in enumerate((5, 4, 6, 3))]
    prompt = [rng.randrange(VOCABULARY) for _ in range(100)]
    tokens = [prompt + [rng.randrange(VOCABULARY) for _ in range(n)] for n in (4, 9, 30, 1)]
    lengths = np.array([len(each) for each in tokens], np.uint32)
    trained = np.concatenate([np.arange(n) >= len(prompt) for n in lengths])
    flat = np.concatenate(tokens).astype(np.int32)
    scores = np.array([0.1, 0.9, 0.4, 0.2])
    return [*groups, Group(lengths=lengths, scores=scores, tokens=flat, trained=trained, gid=9)]


def step(
    rank: int, world: int, path: Path, backend: str, trainer: TrainerConf, limit: int
) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    """Return log-probs, gradients or weights after a step, and computed tokens per micro-batch."""
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH)
    trainer = replace(trainer, backend=backend, tokens_per_micro_batch=limit, optim={})
    algorithm = AlgorithmConf(kl_coef=0.05)
    if backend == "deepspeed":
        from atropos_hpc.learner.backends.deepspeed import DeepSpeedBackend as Kind
    else:
        Kind = VerlBackend
    learner = Kind(model, trainer, algorithm, 0)
    computed: list[int] = []
    learner.module.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: computed.append(inputs[0].shape[1])
    )
    own = groups_with_long_prompts()[rank::world]
    batch = make_batch(own, settings_of(algorithm, limit), 0)
    log_probs = learner.log_probs(batch)
    batch.set_old_log_probs(log_probs)
    batch.set_reference_log_probs(learner.reference_log_probs(batch))
    learner.update(batch, 0)
    weights = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
        for name, tensor in learner.weights().items()
    }
    return log_probs.values().clone(), weights, computed


@pytest.mark.parametrize(
    ("backend", "world", "checkpointing"),
    [("verl", 1, False), ("verl", 2, True), ("deepspeed", 1, False)],
)
def test_a_step_is_the_same_with_and_without_sharing(
    model_path: Path, backend: str, world: int, checkpointing: bool
) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed")
    trainer = TrainerConf(learning_rate=0.01, gradient_checkpointing=checkpointing)
    alone = on_ranks(world, step, model_path, backend, replace(trainer, share_prefixes=False), 400)
    shared = on_ranks(world, step, model_path, backend, trainer, 400)
    for (log_probs, weights, tokens), (want, weights_alone, tokens_alone) in zip(
        shared, alone, strict=True
    ):
        assert sum(tokens) < 0.8 * sum(tokens_alone)
        assert torch.allclose(log_probs, want, atol=1e-4)
        for name, tensor in weights.items():  # after Adam's first step, which is a sign
            assert torch.allclose(tensor, weights_alone[name], atol=1e-3), name


@pytest.mark.parametrize("kind", ["full", "windowed", "convolving"])
def test_only_models_with_full_attention_share_prefixes(kind: str) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": packed_attention.register(),
    }
    window = 6 if kind == "windowed" else None
    model = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    if kind == "convolving":
        model.model.layers[0].conv = torch.nn.Conv1d(1, 1, 4)
    assert packed_attention.supports_prefixes(model) == (kind == "full")
