"""Gradients and metrics of an update by verl's engine are those of a float64 loop."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from float64_loop import expected, noisy_twins  # noqa: E402
from learner_ranks import MAX_LENGTH, make_groups, on_ranks, settings_of  # noqa: E402

from atropos_hpc.config import AlgorithmConf, CorrectionConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.learner.backends import verl as backend_module  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import jagged, make_batch  # noqa: E402
from atropos_hpc.learner.importance import correct  # noqa: E402
from atropos_hpc.learner.kl import penalize  # noqa: E402
from atropos_hpc.learner.sequences import flatten  # noqa: E402


def presets() -> dict[str, AlgorithmConf]:
    """configs/algorithm/*.yaml, each on top of grpo."""
    from omegaconf import OmegaConf

    folder = Path(__file__).parent.parent / "configs" / "algorithm"
    made = {}
    for path in sorted(folder.glob("*.yaml")):
        preset = OmegaConf.load(path)
        preset.pop("defaults", None)
        merged = OmegaConf.merge(AlgorithmConf, OmegaConf.load(folder / "grpo.yaml"), preset)
        made[path.stem] = OmegaConf.to_object(merged)
    return made


def corrected(**correction: str) -> AlgorithmConf:
    return AlgorithmConf(
        kl_coef=0, old_log_probs="recompute", correction=CorrectionConf(**correction)
    )


CASES = {
    **presets(),
    "k3": AlgorithmConf(kl_coef=0.05),
    "asymmetric clip": AlgorithmConf(
        kl_coef=0, clip_low=0.1, clip_high=0.4, aggregation="seq-mean-token-mean"
    ),
    "dual clip": AlgorithmConf(kl_coef=0, clip_dual=1.1, aggregation="seq-mean-token-sum"),
    "not divided by std, normed by length": AlgorithmConf(
        kl_coef=0.01, normalize_by_std=False, aggregation="seq-mean-token-sum-norm"
    ),
    "entropy bonus": AlgorithmConf(kl_coef=0, entropy_coef=0.1),
    "cispo, tight": AlgorithmConf(kl_coef=0, loss="cispo", clip_high=0.3),
    "gspo, wide": AlgorithmConf(
        kl_coef=0, loss="gspo", clip_low=0.05, clip_high=0.06, aggregation="seq-mean-token-mean"
    ),
    "sapo": AlgorithmConf(
        kl_coef=0,
        loss="sapo",
        aggregation="seq-mean-token-mean",
        loss_options={"tau_pos": 1.5, "tau_neg": 2.0},
    ),
    "gpg": AlgorithmConf(kl_coef=0.02, kl_estimator="k2", loss="gpg", advantage="gpg"),
    "reinforce++ baseline": AlgorithmConf(
        kl_coef=0.02, kl_estimator="abs", advantage="reinforce_plus_plus_baseline"
    ),
    "opo": AlgorithmConf(kl_coef=0.02, kl_estimator="k1", advantage="opo"),
    "pass@k": AlgorithmConf(kl_coef=0, advantage="grpo_passk"),
    "KL in the reward": AlgorithmConf(
        kl_coef=0.05, kl_in="reward", advantage="reinforce_plus_plus_baseline"
    ),
    "token weights": corrected(weights="token", threshold="1.3"),
    "token weights within a range": corrected(weights="token", threshold="0.7_1.3"),
    "sequence weights": corrected(weights="sequence", threshold="3.0"),
    "rejection": corrected(
        weights="token", rejection="token_k1,seq_mean_k3", rejection_threshold="0.5_2.0,0.06"
    ),
    "clip_cov": AlgorithmConf(
        kl_coef=0,
        loss="clip_cov",
        loss_options={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.5, "clip_cov_ub": 2.0},
    ),
    "kl_cov": AlgorithmConf(
        kl_coef=0, loss="kl_cov", loss_options={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3}
    ),
}
WITHIN_MICRO_BATCH = (
    "clip_cov",
    "kl_cov",
)  # choose their tokens there: not the same for another packing


def update_all(
    rank: int,
    world: int,
    path: Any,
    deal: list[list[int]],
    groups: list[Group],
    references: list[Group],
    limits: Any,
) -> Any:
    """Update with every case at every micro-batch limit, on one rank.

    Return [(case, limit, metrics, gradients, [(tokens, d loss / d log-prob, mask)])].
    """
    trainer = TrainerConf(learning_rate=0.0, gradient_checkpointing=False)
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH)
    backend = VerlBackend(model, trainer, CASES["entropy bonus"], seed=0)
    ppo_loss, step = backend_module.ppo_loss, backend._policy.optimizer_step
    gradients: dict[str, torch.Tensor] = {}
    watched: list[Any] = []

    def watch(model_output: Any, data: Any, **options: Any) -> Any:
        nested = model_output["log_probs"]
        values = nested.values()
        values.retain_grad()
        lengths, responses = (
            data[name].offsets().diff() for name in ("input_ids", "response_mask")
        )
        watched.append((values, data["input_ids"], lengths - responses, data["response_mask"]))
        again = torch.nested.nested_tensor_from_jagged(values, nested.offsets())
        return ppo_loss(model_output={**model_output, "log_probs": again}, data=data, **options)

    def keep_gradients() -> float:
        gradients.update(
            {n: p.grad.full_tensor().double() for n, p in backend.module.named_parameters()}
        )
        return step()

    backend_module.ppo_loss, backend._policy.optimizer_step = watch, keep_gradients
    results = []
    mine, twins = [groups[i] for i in deal[rank]], [references[i] for i in deal[rank]]
    for name, conf in CASES.items():
        backend._algorithm = conf
        for limit in limits:
            batch = make_batch(mine, settings_of(conf, limit), 0)
            assert batch.needs_log_probs == (conf.old_log_probs == "recompute")
            if batch.needs_log_probs:
                batch.set_old_log_probs(backend.log_probs(batch))
            fillers = len(batch.tensors) - len(flatten(mine, conf).lengths)
            batch.set_reference_log_probs(
                jagged(flatten(twins, conf), fillers, 1, limit)["old_log_probs"]
            )
            watched.clear()
            metrics = {
                **correct(batch, conf.correction),
                **penalize(batch, mine, conf, conf.kl_coef),
            }
            metrics |= backend.update(batch, 0)
            results.append(
                (name, limit, metrics, dict(gradients), list(_by_sequence(watched, world)))
            )
    return results


def _by_sequence(watched: list[Any], world: int) -> Any:
    for values, ids, starts, mask in watched:
        gradients = values.grad.double().split(ids.offsets().diff().tolist())
        for tokens, gradient, start, trained in zip(
            ids.unbind(), gradients, starts.tolist(), mask.unbind(), strict=True
        ):
            whole = torch.zeros(len(tokens), dtype=torch.bool)
            whole[start - 1 : start - 1 + len(trained)] = trained.bool()
            yield (
                tuple(tokens.tolist()),
                gradient / world,
                whole,
            )  # verl multiplies by the number of ranks, over which FSDP takes means


@pytest.mark.parametrize(
    "deal",
    [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[], [0, 1, 2, 3]]],
    ids=["1 rank", "2 ranks", "one without groups"],
)
def test_gradients_are_those_of_the_float64_loop(
    model_path: Any, model64: torch.nn.Module, deal: list[list[int]]
) -> None:
    groups, references = noisy_twins(model64, make_groups())
    truncated = flatten(groups[:1], CASES["entropy bonus"])
    assert truncated.support is not None and truncated.prefixes.any(), "both at once"
    # The fewest micro-batches, two, for a rank that has nothing but fillers in all of them.
    limits = (4096, 120) if len(deal) == 1 else (120,) if all(deal) else (300,)
    results = on_ranks(len(deal), update_all, model_path, deal, groups, references, limits)
    for name, conf in CASES.items():
        want = expected(model64, groups, references, conf)
        norm = torch.sqrt(sum((g**2).sum() for g in want.gradients.values()))
        seen = 0
        for rank in range(len(deal)):
            for case, limit, metrics, gradients, by_sequence in results[rank]:
                if case != name or (
                    conf.loss in WITHIN_MICRO_BATCH and (limit != 4096 or len(deal) > 1)
                ):
                    continue
                error = torch.sqrt(
                    sum(((gradients[n] - g) ** 2).sum() for n, g in want.gradients.items())
                )
                assert float(error / norm) < 1e-5, (name, float(error / norm))
                for key, value in want.metrics.items():
                    if key in metrics and (
                        key == "loss" or conf.loss == "vanilla"
                    ):  # others define some in their own ways
                        assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
                for tokens, gradient, trained in by_sequence:
                    assert (gradient[~trained] == 0).all(), (
                        f"{name}: a token that is not trained moves the weights"
                    )
                    if trained.any():
                        exact = next(
                            g for t, g in want.by_token.items() if t[: len(tokens)] == tokens
                        )[: len(tokens) - 1]
                        assert (
                            float(
                                (gradient[:-1] - exact).abs().max()
                                / exact.abs().max().clamp(min=1e-12)
                            )
                            < 1e-4
                        ), name
                        seen += 1
        assert seen == len(want.by_token) * (
            len(limits) if conf.loss not in WITHIN_MICRO_BATCH else len(deal) == 1
        )
