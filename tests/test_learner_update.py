"""Updates by verl's engine: ranks, precision, temperature, old log-probs and refusals."""

import random
from dataclasses import replace
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
    rows,
    settings_of,
)

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.contracts.metrics import HISTOGRAM_EDGES  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402


def three_steps(
    rank: int, world: int, path: Any, conf: AlgorithmConf, with_log_probs: bool = True
) -> Any:
    """Metrics of three steps on groups of their own, and the weights after them."""
    trainer = TrainerConf(
        learning_rate=1e-3, warmup_steps=2, schedule="cosine", steps=10, weight_decay=0.0
    )
    backend = VerlBackend(
        ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH), trainer, conf, seed=0
    )
    steps = []
    for step in range(3):
        groups = make_groups(step)[rank::world]
        if with_log_probs:
            for group in groups:
                group.inference_logprobs = np.full(len(group.tokens), -4.0, np.float32)
        batch = make_batch(groups, settings_of(conf, 120), step)
        if batch.needs_log_probs:
            batch.set_old_log_probs(backend.log_probs(batch))
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        steps.append(backend.update(batch, step))
    weights = {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for n, t in backend.module.state_dict().items()
    }
    return steps, weights


def test_ranks_agree_and_a_repetition_is_bit_equal(model_path: Any) -> None:
    (steps, weights), (again, same) = (
        on_ranks(1, three_steps, model_path, AlgorithmConf())[0] for _ in range(2)
    )
    assert steps == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    first, second = on_ranks(2, three_steps, model_path, AlgorithmConf())
    assert first[0] == second[0], "metrics are global: every rank has the same"
    for one, two in zip(steps, first[0], strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert max(float((weights[n] - first[1][n]).abs().max()) for n in weights) < 1e-5
    assert [s["lr"] for s in steps] == [0.0, pytest.approx(5e-4), pytest.approx(1e-3)], (
        "of the step itself, not of the next"
    )
    assert steps[0]["kl_reference"] == 0.0 and steps[2]["kl_reference"] > 0


@pytest.mark.parametrize(
    "conf, with_log_probs",
    [(AlgorithmConf(), False), (AlgorithmConf(old_log_probs="recompute", kl_coef=0), True)],
)
def test_old_log_probs_of_the_learner_itself(
    model_path: Any, conf: AlgorithmConf, with_log_probs: bool
) -> None:
    steps, _ = on_ranks(1, three_steps, model_path, conf, with_log_probs)[0]
    for step in steps:
        assert step["ppo_kl"] == pytest.approx(0, abs=1e-6) and step["clip_fraction"] == 0
        assert ("off_policy/abs_log_ratio_max" in step) == with_log_probs
    assert steps[2]["kl_reference"] > 0, "also reported where it is not part of the loss"


def bfloat16(rank: int, world: int, path: Any) -> Any:
    trainer = TrainerConf(learning_rate=1e-3)
    results = []
    for dtype in ("float32", "bfloat16"):
        backend = VerlBackend(
            ModelConf(path=str(path), dtype=dtype, max_length=MAX_LENGTH),
            trainer,
            AlgorithmConf(),
            seed=0,
        )
        batch = make_batch(make_groups(), settings_of(), 0)
        own = backend.log_probs(batch)
        batch.set_old_log_probs(own)
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        metrics = backend.update(batch, 0)
        kinds = {p.dtype for p in backend.module.parameters()}
        results.append(
            (
                own.values(),
                metrics,
                kinds,
                {t.dtype for s in backend._policy.optimizer.state.values() for t in s.values()},
            )
        )
    return results


def test_bfloat16_is_for_computing_only(model_path: Any) -> None:
    exact, rounded = on_ranks(1, bfloat16, model_path)[0]
    assert rounded[2] == rounded[3] == {torch.float32}
    assert rounded[0].dtype == torch.float32 and len(rounded[0].unique()) > 0.9 * len(
        exact[0].unique()
    ), "log-probs are not rounded"
    assert float((exact[0] - rounded[0]).abs().max()) < 0.2
    assert rounded[1]["kl_reference"] == 0.0 and rounded[1]["ppo_kl"] == 0.0


def temperatures(rank: int, world: int, path: Any, group: Group) -> Any:
    backend = VerlBackend(
        ModelConf(path=str(path), dtype="float32"),
        TrainerConf(),
        AlgorithmConf(kl_coef=0),
        seed=0,
        reference=False,
    )
    batch = make_batch([group], settings_of(), 0)
    assert backend.reference_log_probs(batch) is None
    with pytest.raises(ValueError, match="old log-probs"):
        backend.update(batch, 0)
    return [row.clone() for row in backend.log_probs(batch).unbind()]


def test_log_probs_are_taken_at_the_temperature_of_sampling(
    model_path: Any, model64: torch.nn.Module
) -> None:
    group = make_group(random.Random(5), 2, generation_params={"temperature": 0.5})
    group.overrides = [{"temperature": 2.0}, {}]
    got = on_ranks(1, temperatures, model_path, group)[0]
    for i, temperature in enumerate((2.0, 0.5)):
        tokens = torch.tensor(rows(group, group.tokens)[i], dtype=torch.long)
        mask = rows(group, group.trained)[i]
        trained = mask.nonzero()[0]
        with torch.no_grad():
            logits = model64(tokens[None], use_cache=False).logits[0, :-1] / temperature
        want = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        found = got[i][mask[trained[0] : trained[-1] + 1]]
        assert float((found - want[trained - 1]).abs().max()) < 1e-5


def silent(rank: int, world: int, path: Any) -> tuple[int, str]:
    backend = VerlBackend(
        ModelConf(path=str(path), dtype="float32"), TrainerConf(), AlgorithmConf(), seed=0
    )
    group = make_group(random.Random(0), 3)
    group.trained[:] = False
    batch = make_batch([group] if rank == 0 else [], settings_of(), 0)
    with pytest.raises(ValueError) as refusal:
        backend.update(batch, 0)
    return backend.vocab_size, str(refusal.value)


def test_a_batch_with_nothing_to_train_is_refused(model_path: Any) -> None:
    vocabulary, refusal = on_ranks(1, silent, model_path)[0]
    assert vocabulary == VOCABULARY and "no sequence" in refusal and "-100" in refusal


def same_version_metrics(rank: int, world: int, path: Any) -> list[dict[str, Any]]:
    """Of an update at version 1, with behaviour log-probs that equal the learner's own.

    Then of one that trains the same tokens as if all had been sampled from the whole vocabulary.
    The behaviour log-probs of the sequences of older versions are off by 1.
    """
    trainer = TrainerConf(learning_rate=0.0, gradient_checkpointing=False)
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH)
    backend = VerlBackend(model, trainer, AlgorithmConf(kl_coef=0), seed=0)
    groups = make_groups()
    for i, group in enumerate(groups):
        versions = [[0, 1] if i == 1 else [1, 1]] * len(group.lengths)
        group.generation_params = {"policy_versions": versions}
    metrics = []
    for replay in (True, False):
        batch = make_batch(groups, settings_of(budget=120), 1)
        if replay:
            own = backend.log_probs(batch)
            older = ~batch.tensors["same_version"].repeat_interleave(own.offsets().diff())
            behaviour = torch.nested.nested_tensor_from_jagged(
                own.values() - older.float(), own.offsets()
            )
        batch.tensors["behaviour_log_probs"] = behaviour
        batch.tensors["old_log_probs"] = behaviour
        batch.needs_log_probs = False
        metrics.append({**backend.update(batch, 1), "counts": backend.ratio_counts})
        metrics[-1]["trained_tokens"] = batch.statistics.sums["trained_tokens"]
        groups = [replace(group, support=None) for group in groups]
    return metrics


def test_the_ratio_at_equal_versions_shows_whether_the_sampled_policy_is_replayed(
    model_path: Any,
) -> None:
    replayed, biased = on_ranks(1, same_version_metrics, model_path)[0]
    assert replayed["off_policy/same_version/mean_ratio"] == pytest.approx(1, abs=1e-5)
    assert replayed["off_policy/same_version/abs_log_ratio_p999"] < 1e-5
    counts = dict(zip((*HISTOGRAM_EDGES["ratio"], "above"), replayed["counts"], strict=True))
    # The ratio of the same version is 1, and that of the older one e.
    assert {edge for edge, count in counts.items() if count} == {1.01, "above"}
    assert sum(counts.values()) == replayed["trained_tokens"]
    of_older_version = replayed["off_policy/abs_log_ratio_max"]
    assert of_older_version == pytest.approx(1, abs=1e-5)
    assert biased["off_policy/same_version/mean_ratio"] < 0.9
    assert biased["off_policy/same_version/abs_log_ratio_p999"] > 1
