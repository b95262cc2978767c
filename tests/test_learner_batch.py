"""From groups to flat arrays, without a model."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

from learner_ranks import make_groups, on_ranks, rows, settings_of  # noqa: E402

from atropos_hpc.config import AlgorithmConf  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.learner.advantages import group_advantages  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.learner.sequences import flatten  # noqa: E402


def group_of(masks: list[list[int]], scores: list[float], **fields: object) -> Group:
    """Sequences whose tokens count up from 10, with masks as 0 and 1."""
    lengths = [len(mask) for mask in masks]
    tokens = np.concatenate([10 + np.arange(length) for length in lengths]).astype(np.int32)
    return Group(
        np.array(lengths, np.uint32),
        np.array(scores),
        tokens,
        np.concatenate(masks).astype(bool),
        **fields,
    )


def test_the_loss_mask_is_atropos_mask_and_nothing_else() -> None:
    group = group_of([[0, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0], [1, 1, 0]], [1.0, 0.0, 0.5])
    flat = flatten([group], AlgorithmConf())
    assert flat.lengths.tolist() == [7, 2], (
        "cut behind the last trained token; nothing trained: left out"
    )
    assert flat.starts.tolist() == [2, 1]
    assert flat.mask.tolist() == [True, True, False, False, True, True]
    assert flat.tokens.tolist() == [10, 11, 12, 13, 14, 15, 16, 10, 11]
    assert flat.first_tokens == 1
    baseline = group_advantages(group.scores)
    assert flat.advantages.tolist() == pytest.approx(
        [baseline[0]] * 2 + [0, 0] + [baseline[0]] + [baseline[2]]
    )


def test_flat_arrays_are_those_of_a_loop_over_tokens() -> None:
    for seed in range(20):
        groups = make_groups(seed)
        flat = flatten(groups, AlgorithmConf())
        lengths, starts, tokens, mask, advantages = [], [], [], [], []
        for group in groups:
            relative = group_advantages(group.scores)
            for i, (ids, trained) in enumerate(
                zip(rows(group, group.tokens), rows(group, group.trained), strict=True)
            ):
                positions = [j for j in range(1, len(ids)) if trained[j]]
                if not positions:
                    continue
                lengths.append(positions[-1] + 1)
                starts.append(positions[0])
                tokens += ids[: positions[-1] + 1].tolist()
                for j in range(positions[0], positions[-1] + 1):
                    mask.append(bool(trained[j]))
                    value = (
                        relative[i]
                        if group.advantages is None
                        else rows(group, group.advantages)[i][j]
                    )
                    silent = group.overrides and group.overrides[i].get("set_advantage_to_zero")
                    advantages.append(0.0 if silent or not trained[j] else value)
        assert (
            flat.lengths.tolist(),
            flat.starts.tolist(),
            flat.tokens.tolist(),
            flat.mask.tolist(),
        ) == (lengths, starts, tokens, mask)
        assert np.allclose(flat.advantages, advantages, atol=1e-6)


def test_equal_scores_and_lone_sequences_have_no_advantage() -> None:
    assert (group_advantages(np.full(15, 0.97)) == 0).all(), "in float32 this would be 0.19"
    assert group_advantages(np.array([3.0])).tolist() == [0.0]
    assert group_advantages(np.array([1.0, 0, 0, 0])) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5], rel=1e-5
    )
    assert group_advantages(np.array([1.0, 0, 0, 0]), normalize_by_std=False).tolist() == [
        0.75,
        -0.25,
        -0.25,
        -0.25,
    ]
    assert group_advantages(np.array([1.0, 0, 0, 0]), "rloo") == pytest.approx(
        [1, -1 / 3, -1 / 3, -1 / 3]
    )
    with pytest.raises(ValueError, match=r"algorithm.advantage=gae.*grpo"):
        group_advantages(np.array([1.0, 2.0]), "gae")


def test_a_silenced_sequence_leaves_the_baseline_alone() -> None:
    group = group_of(
        [[0, 1]] * 3, [1.0, 0.0, 0.5], overrides=[{"set_advantage_to_zero": True}, {}, {}]
    )
    advantages = flatten([group], AlgorithmConf()).advantages
    assert advantages[0] == 0 and advantages[1:] == pytest.approx(
        group_advantages(np.array([1.0, 0.0, 0.5]))[1:]
    )


@pytest.mark.parametrize("placeholder", [1.0, np.nan, -np.inf])
def test_a_sequence_with_a_placeholder_among_its_log_probs_counts_as_without(
    placeholder: float,
) -> None:
    log_probs = np.array(
        [1, -0.5, -0.25, 1, placeholder, -0.5], np.float32
    )  # the ones stand at masked tokens
    group = group_of([[0, 1, 1], [0, 1, 1]], [1.0, 0.0], inference_logprobs=log_probs)
    behaviour = flatten([group], AlgorithmConf()).behaviour
    assert behaviour[:2].tolist() == [-0.5, -0.25] and np.isnan(behaviour[2:]).all()
    batch = make_batch([group], settings_of(None, 100, 100), 0)
    assert batch.needs_log_probs
    batch.set_old_log_probs(batch.tensors["advantages"] * 0 - 7)
    assert (
        batch.tensors["old_log_probs"].values().tolist() == [-0.5, -0.25, -7, -7]
        and not batch.needs_log_probs
    )


def test_a_sequence_that_never_fits_is_refused_by_name_on_every_rank() -> None:
    def work(rank: int, world: int) -> None:
        groups = [group_of([[0] + [1] * 20], [1.0])] if rank else []
        with pytest.raises(ValueError, match=r"21 tokens.*trainer.tokens_per_micro_batch=20"):
            make_batch(groups, settings_of(None, 20, 64), 0)

    on_ranks(2, work)


def test_statistics_are_of_all_ranks() -> None:
    versions = {"policy_versions": [[3, 5], None, [5, 5]]}
    first = group_of([[0, 1, 1], [0, 0], [1, 1, 1, 1]], [1.0, 0.0, 2.0], generation_params=versions)
    biased = {
        "biased_sampling": "top_p: the environment tokenized the answer again",
        "finish_reasons": ["length", None],  # a limit of its own, below the model's
    }
    second = group_of([[0, 1]] * 2, [1.0, 1.0], generation_params=biased)

    def work(rank: int, world: int) -> object:
        batch = make_batch([[first, second], []][rank], settings_of(None, 100, 4), 5)
        found = batch.statistics
        return (
            len(batch.tensors),
            batch.trained_sequences,
            found.metrics(),
            found.staleness_counts(),
        )

    (size, trained, metrics, counts), (other_size, _, other_metrics, _) = on_ranks(2, work)
    assert counts == [1, 0, 1] + [0] * (len(counts) - 3)
    assert size == other_size == trained == 4, "a rank without groups gets as many fillers"
    assert metrics == other_metrics
    assert metrics == pytest.approx(
        {
            "groups": 2,
            "sequences": 5,
            "trained_sequences": 4,
            "tokens": 13,
            "trained_tokens": 7,
            "first_tokens": 1,
            "reward/mean": 1.0,
            "reward/std": np.std([1, 0, 2, 1, 1]),
            "length_mean": 2.6,
            "length_max": 4,
            "response_length_mean": 7 / 4,
            "truncated_fraction": 0.4,
            "zero_advantage_groups": 1,
            "without_log_probs": 4,
            "off_policy/staleness_mean": 1.0,
            "off_policy/staleness_max": 2,
            "stale_sequences": 1,
            "biased_sequences": 2,
        }
    )


def test_no_groups_at_all() -> None:
    batch = make_batch([], settings_of(None, 100, 4), 0)
    assert batch.trained_sequences == 0 and len(batch.tensors) == 1
    assert not any(np.isnan(value) for value in batch.statistics.metrics().values())


def test_temperature_by_precedence() -> None:
    group = group_of(
        [[0, 1]] * 4,
        [1.0, 0.0, 0.0, 0.0],
        generation_params={"temperature": 0.7},
        group_overrides={"temperature": 0.8},
    )
    group.overrides = [{"temperature": 0.9}, {}, {"temperature": 0.0}, {"temperature": None}]
    assert flatten([group], AlgorithmConf()).temperatures.tolist() == pytest.approx(
        [0.9, 0.8, 1.0, 1.0]
    )


def test_many_groups_take_no_python_per_token() -> None:
    rng = random.Random(0)
    mask = [0] * 100 + [1] * 4000
    groups = [group_of([mask] * 8, [rng.random() for _ in range(8)]) for _ in range(4)]
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        flatten(groups, AlgorithmConf())
    finally:
        sys.setprofile(None)
    assert calls < 10_000 < sum(len(group.tokens) for group in groups)


def test_a_groups_override_is_that_of_each_of_its_sequences_unless_they_say_otherwise() -> None:
    group = group_of([[0, 1]] * 3, [1.0, 0.0, 0.5], group_overrides={"set_advantage_to_zero": True})
    group.overrides = [{}, {"set_advantage_to_zero": False}, {}]
    advantages = flatten([group], AlgorithmConf()).advantages
    assert advantages[[0, 2]].tolist() == [0, 0] and advantages[1] == pytest.approx(
        group_advantages(np.array([1.0, 0.0, 0.5]))[1]
    )


def test_reference_log_probs_of_the_environment_come_before_the_models() -> None:
    given = group_of(
        [[0, 1, 1], [0, 1, 1]],
        [1.0, 0.0],
        ref_logprobs=np.array([1, -0.5, -0.25, 1, -0.75, -0.5], np.float32),
    )
    batch = make_batch([given], settings_of(None, 100, 100), 0)
    assert not batch.needs_reference
    assert batch.tensors["ref_log_prob"].values().tolist() == [-0.5, -0.25, -0.75, -0.5]
    batch = make_batch([given, group_of([[0, 1]], [1.0])], settings_of(None, 100, 100), 0)
    assert batch.needs_reference and "ref_log_prob" not in batch.tensors
    batch.set_reference_log_probs(batch.tensors["advantages"] * 0 - 7)
    assert batch.tensors["ref_log_prob"].values().tolist() == [-0.5, -0.25, -0.75, -0.5, -7]


@pytest.mark.parametrize("name", ["gpg", "reinforce_plus_plus_baseline", "opo", "rloo", "grpo"])
def test_advantages_are_verls_for_the_whole_batch(name: str) -> None:
    import torch
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rng = np.random.default_rng(0)
    masks = [[0] + [1] * rng.integers(1, 9) for _ in range(9)]
    sizes, scores = (
        [2, 4, 3],
        [float(x) for x in rng.integers(0, 3, 9) + rng.random(9) * (np.arange(9) % 2)],
    )
    longest = max(map(len, masks)) - 1
    mask = torch.tensor(
        [[1.0] * (len(m) - 1) + [0.0] * (longest + 1 - len(m)) for m in masks], dtype=torch.float64
    )
    rewards = torch.zeros(9, longest, dtype=torch.float64)
    rewards[:, 0] = torch.tensor(scores)
    want, _ = get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, index=np.repeat([0, 1, 2], sizes)
    )
    ends = np.cumsum(sizes)
    groups = [
        group_of(masks[end - size : end], scores[end - size : end])
        for end, size in zip(ends, sizes, strict=True)
    ]

    def work(rank: int, world: int) -> np.ndarray:
        return flatten(groups[rank::world], AlgorithmConf(advantage=name)).advantages

    of_groups = np.split(
        want[mask.bool()].numpy(), np.cumsum(mask.sum(-1).numpy().astype(int))[ends[:-1] - 1]
    )
    first, second = on_ranks(2, work)
    assert first == pytest.approx(
        np.concatenate(of_groups[0::2]), rel=1e-5
    ) and second == pytest.approx(of_groups[1], rel=1e-5)


def test_the_kl_coefficient_follows_its_target() -> None:
    from atropos_hpc.learner.kl import next_coefficient

    adapting = AlgorithmConf(kl_coef=0.1, kl_target=0.01, kl_horizon=1000, batch_size=100)
    raised = next_coefficient(adapting, 0.1, 1.0)
    assert raised == pytest.approx(0.1 * 1.02), "far above: more, by a fifth of batch / horizon"
    assert next_coefficient(adapting, raised, None) == raised
    assert next_coefficient(adapting, raised, 0.0) == pytest.approx(0.1 * 1.02 * 0.98)
    assert next_coefficient(AlgorithmConf(kl_coef=0.3), 0.3, 1.0) == 0.3, "fixed"


def test_what_is_rejected_weighs_nothing_and_no_more_than_that() -> None:
    from atropos_hpc.config import CorrectionConf
    from atropos_hpc.learner.importance import correct

    log_probs = np.array([1, -0.5, -0.5, 1, -9.0, -0.5, 1, 1, 1], np.float32)
    group = group_of(
        [[0, 1, 1], [0, 1, 1], [0, 1, 1]], [1.0, 0.0, 0.0], inference_logprobs=log_probs
    )
    batch = make_batch([group], settings_of(AlgorithmConf(old_log_probs="recompute"), 100, 100), 0)
    batch.set_old_log_probs(batch.tensors["advantages"] * 0 - 0.25)
    mask = batch.tensors["response_mask"].values().clone()
    metrics = correct(
        batch,
        CorrectionConf(
            weights="token", threshold="1.2", rejection="token_k3", rejection_threshold="5"
        ),
    )
    assert batch.tensors["rollout_is_weights"].values().tolist() == pytest.approx(
        [1.2, 1.2, 0, 1.2, 1, 1]
    ), "unknown: 1"
    assert (batch.tensors["response_mask"].values() == mask).all() and metrics[
        "off_policy/rejected_fraction"
    ] == pytest.approx(1 / 6)
    assert correct(batch, CorrectionConf()) == {}


def test_a_batch_with_nothing_to_train_has_no_importance_weights() -> None:
    """The update refuses it, with what is wrong."""
    from atropos_hpc.config import CorrectionConf
    from atropos_hpc.learner.importance import correct

    group = group_of([[0, 0, 0], [0, 0, 0]], [1.0, 0.0])
    batch = make_batch([group], settings_of(AlgorithmConf(old_log_probs="recompute"), 100, 100), 0)
    batch.set_old_log_probs(batch.tensors["advantages"] * 0 - 0.25)
    assert correct(batch, CorrectionConf(weights="token")) == {}


def test_one_module_imports_verl() -> None:
    package = Path(__file__).resolve().parent.parent / "atropos_hpc"
    importing = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import) verl\b", path.read_text(), re.MULTILINE)
    }
    backends = "learner/backends"
    assert importing == {f"{backends}/verl_api.py", f"{backends}/cpu_platform.py"}
