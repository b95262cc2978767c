"""An update by verl's engine agrees with a float64 loop that shares no code with it."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
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
    tiny_model,
)

from atropos_hpc.config import AlgorithmConf, CorrectionConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.contracts.support import Support  # noqa: E402
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


@dataclass
class Expected:
    """The loop's metrics, gradient per parameter, and d loss / d log-prob by sequence."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    by_token: dict[tuple[int, ...], torch.Tensor]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model64(model_path: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def log_probs64(
    model: torch.nn.Module, tokens: np.ndarray, support: Support | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs of tokens 1.., entropies of what predicts them), over the supports"""
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    excluded = torch.zeros(logits.shape, dtype=torch.bool)
    if support is not None:
        for row, kept in enumerate(np.split(support.ids, np.cumsum(support.counts)[:-1])[1:]):
            excluded[row] = len(kept) > 0
            excluded[row, kept] = False
    every = logits.masked_fill(excluded, -torch.inf).log_softmax(-1)
    entropy = -(every.exp() * every.masked_fill(excluded, 0)).sum(-1)
    return every.gather(-1, ids[1:, None])[:, 0], entropy


def supports_of(group: Group) -> list[Support | None]:
    """Of each sequence."""
    if group.support is None:
        return [None] * len(group.lengths)
    owner = np.repeat(np.arange(len(group.lengths)), group.lengths)
    return [group.support.select(owner == i) for i in range(len(group.lengths))]


def noisy_twins(model: torch.nn.Module, groups: list[Group]) -> tuple[list[Group], list[Group]]:
    """Return the groups with behaviour log-probs, and again with reference log-probs instead.

    Both are the model's log-probs with noise.
    """
    noise = np.random.default_rng(1)
    twins = []
    with torch.no_grad():
        exact = [
            np.concatenate(
                [
                    [0, *log_probs64(model, r, kept)[0].numpy()][: len(r)]
                    for r, kept in zip(rows(g, g.tokens), supports_of(g), strict=True)
                ]
            )
            for g in groups
        ]
    for _ in range(2):
        values = [
            np.minimum(e + 0.3 * noise.standard_normal(len(e)), 0).astype(np.float32) for e in exact
        ]
        twins.append(
            [replace(g, inference_logprobs=v) for g, v in zip(groups, values, strict=True)]
        )
    return twins[0], twins[1]


def estimates(
    conf: AlgorithmConf, scores: list[torch.Tensor], lengths: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Advantages by group, from the papers' formulas."""
    made = []
    for score, length in zip(scores, lengths, strict=True):
        centred = score - score.mean()
        if conf.advantage == "rloo":
            centred = torch.stack(
                [score[i] - (score.sum() - score[i]) / (len(score) - 1) for i in range(len(score))]
            )
        elif conf.advantage == "opo":
            centred = score - (score * length).sum() / length.sum()
        elif conf.advantage == "grpo_passk":
            best, second = score.topk(2).values
            centred = torch.where(score == best, best - second, torch.zeros_like(score))
        if conf.advantage in ("grpo", "grpo_passk") and conf.normalize_by_std:
            centred = centred / (score.std() + 1e-6)
        made.append(centred)
    if conf.advantage == "gpg":
        every = torch.cat(scores)
        made = [group * len(every) / (every != 0).sum() for group in made]
    if conf.advantage == "reinforce_plus_plus_baseline":
        tokens = torch.cat(
            [group.repeat_interleave(length) for group, length in zip(made, lengths, strict=True)]
        )
        made = [(group - tokens.mean()) / (tokens.var() + 1e-8).sqrt() for group in made]
    return made


def kl_of(estimator: str, log_prob: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    d = log_prob - ref
    return {"k1": d, "abs": d.abs(), "k2": d * d / 2, "k3": (-d).exp() + d - 1}[estimator]


def importance(conf: CorrectionConf, log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One sequence's weights."""
    ratio = torch.ones_like(log_ratio)
    if conf.weights != "none":
        ratio = (
            log_ratio.exp()
            if conf.weights == "token"
            else log_ratio[mask].sum().exp().expand_as(log_ratio)
        )
        low, _, high = conf.threshold.rpartition("_")
        ratio = (
            torch.where((ratio >= float(low)) & (ratio <= float(high)), ratio, 0)
            if low
            else ratio.clamp(max=float(high))
        )
    if conf.rejection != "none":
        assert (conf.rejection, conf.rejection_threshold) == (
            "token_k1,seq_mean_k3",
            "0.5_2.0,0.06",
        )
        kept = (
            (log_ratio.exp() >= 0.5)
            & (log_ratio.exp() <= 2)
            & bool(kl_of("k3", -log_ratio, log_ratio * 0)[mask].mean() <= 0.06)
        )
        ratio = ratio * kept
    return ratio


def covariances(kept: list[Any]) -> list[torch.Tensor]:
    """Of advantage and log-prob, at each trained token of each sequence."""
    advantage, log_prob = (torch.cat([k[at][k[1]].detach() for k in kept]) for at in (-1, 2))
    every = (advantage - advantage.mean()) * (log_prob - log_prob.mean())
    return list(every.split([int(k[1].sum()) for k in kept]))


def expected(
    model: torch.nn.Module, groups: list[Group], references: list[Group], conf: AlgorithmConf
) -> Expected:
    """The objective, written down once more, sequence by sequence."""
    found: list[list[Any]] = []
    for group, twin in zip(groups, references, strict=True):
        found.append([])
        for i, tokens in enumerate(rows(group, group.tokens)):
            mask = torch.tensor(rows(group, group.trained)[i][1:])
            log_prob, entropy = log_probs64(model, tokens, supports_of(group)[i])
            log_prob.retain_grad()
            behaviour, ref = (
                torch.tensor(rows(g, g.inference_logprobs)[i][1:], dtype=torch.float64)
                for g in (group, twin)
            )
            old = log_prob.detach() if conf.old_log_probs == "recompute" else behaviour
            found[-1].append(
                (
                    tokens,
                    mask,
                    log_prob,
                    entropy,
                    old,
                    ref,
                    importance(conf.correction, old - behaviour, mask),
                    behaviour,
                )
            )
    scored = [i for i, group in enumerate(groups) if group.advantages is None]
    scores, lengths = [], []
    for i in scored:
        scores.append(torch.tensor(groups[i].scores, dtype=torch.float64))
        lengths.append(torch.stack([f[1].sum() for f in found[i]]))
        if conf.kl_in == "reward":
            scores[-1] = scores[-1] - conf.kl_coef * torch.stack(
                [kl_of(conf.kl_estimator, f[4], f[5])[f[1]].sum() for f in found[i]]
            )
    relative = dict(zip(scored, estimates(conf, scores, lengths), strict=True))
    kept = []
    for i, group in enumerate(groups):
        for k, (_, mask, *_rest) in enumerate(found[i]):
            given = (
                torch.tensor(rows(group, group.advantages)[k][1:], dtype=torch.float64)
                if i not in relative
                else None
            )
            advantage = relative[i][k].expand(len(mask)) if given is None else given
            if group.overrides and group.overrides[k].get("set_advantage_to_zero"):
                advantage = torch.zeros(len(mask), dtype=torch.float64)
            if mask.any():
                kept.append((*found[i][k], advantage))
    model.zero_grad()
    tokens_total, sequences_total = sum(int(k[1].sum()) for k in kept), len(kept)
    covariance = covariances(kept)
    largest = (
        torch.cat(covariance)
        .topk(max(1, int(tokens_total * conf.loss_options.get("kl_cov_ratio", 0))))
        .values.min()
    )
    loss = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(
        (
            "entropy",
            "kl_reference",
            "clip_fraction",
            "ppo_kl",
            "mismatch_mean",
            "mismatch_kl",
            "mismatch_chi2",
        ),
        0.0,
    )
    for (_, mask, log_prob, entropy, old, ref, weight, behaviour, advantage), spread in zip(
        kept, covariance, strict=True
    ):
        ratio = (log_prob - old).exp()
        low, high = 1 - conf.clip_low, 1 + conf.clip_high
        if conf.loss == "gspo":
            ratio = (
                (log_prob - old)[mask].mean().exp().detach()
                * log_prob.exp()
                / log_prob.exp().detach()
            )
        free, clipped = -advantage * ratio, -advantage * ratio.clamp(low, high)
        each = torch.maximum(free, clipped)
        if conf.loss == "cispo":
            each = -ratio.clamp(low, high).detach() * advantage * log_prob
        if conf.loss == "gpg":
            each = -advantage * log_prob
        if conf.loss == "sapo":
            tau = torch.where(
                advantage > 0, conf.loss_options["tau_pos"], conf.loss_options["tau_neg"]
            )
            each = -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        if conf.loss == "clip_cov":
            outside = torch.zeros(len(mask), dtype=torch.bool)
            outside[mask] = (spread > conf.loss_options["clip_cov_lb"]) & (
                spread < conf.loss_options["clip_cov_ub"]
            )
            each = torch.where(outside & ~(clipped > free), 0, each)
        if conf.loss == "kl_cov":
            large = torch.zeros(len(mask), dtype=torch.bool)
            large[mask] = spread >= largest
            each = free + torch.where(
                large, conf.loss_options["ppo_kl_coef"] * (log_prob - old).abs(), 0
            )
        if conf.loss == "vanilla":
            each = torch.where(
                advantage < 0, torch.minimum(each, -advantage * conf.clip_dual), each
            )
        in_loss = (
            conf.kl_coef * kl_of(conf.kl_estimator, log_prob, ref) if conf.kl_in == "loss" else 0
        )
        each = (each * weight + in_loss - conf.entropy_coef * entropy)[mask]
        loss = (
            loss
            + {
                "token-mean": each.sum() / tokens_total,
                "seq-mean-token-mean": each.mean() / sequences_total,
                "seq-mean-token-sum": each.sum() / sequences_total,
                "seq-mean-token-sum-norm": each.sum() / sequences_total / MAX_LENGTH,
            }[conf.aggregation]
        )
        for name, values in (
            ("entropy", entropy),
            ("kl_reference", kl_of("k3", log_prob, ref)),
            ("clip_fraction", (clipped > free).double()),
            ("ppo_kl", old - log_prob),
            ("mismatch_mean", (behaviour - log_prob).abs()),
            ("mismatch_kl", behaviour - log_prob),
            ("mismatch_chi2", (2 * (log_prob - behaviour)).exp() - 1),
        ):
            sums[name] += float(values[mask].detach().sum())
    loss.backward()
    return Expected(
        {
            "loss": float(loss.detach()),
            **{name: value / tokens_total for name, value in sums.items()},
        },
        {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
        {tuple(k[0].tolist()): k[2].grad for k in kept},
    )


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
        watched.append(
            (values, data["input_ids"], data["prompts"].offsets().diff(), data["response_mask"])
        )
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
    limits = (4096, 120) if len(deal) == 1 else (120,)
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
        assert ("mismatch_max" in step) == with_log_probs
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


@pytest.mark.parametrize(
    "conf, complaint",
    [
        (AlgorithmConf(loss="vanila"), r"algorithm.loss=vanila.*cispo.*vanilla"),
        (AlgorithmConf(aggregation="mean"), r"algorithm.aggregation=mean.*token-mean"),
        (AlgorithmConf(kl_estimator="full"), r"algorithm.kl_estimator=full.*k3"),
    ],
)
def test_a_wrong_objective_is_named_with_the_valid_ones(
    conf: AlgorithmConf, complaint: str
) -> None:
    from atropos_hpc.learner.objective import objective

    with pytest.raises(ValueError, match=complaint):
        objective(conf, MAX_LENGTH)


def same_version_metrics(rank: int, world: int, path: Any) -> list[dict[str, float]]:
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
        metrics.append(backend.update(batch, 1))
        groups = [replace(group, support=None) for group in groups]
    return metrics


def test_the_ratio_at_equal_versions_shows_whether_the_sampled_policy_is_replayed(
    model_path: Any,
) -> None:
    replayed, biased = on_ranks(1, same_version_metrics, model_path)[0]
    assert replayed["same_version_ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert replayed["same_version_log_ratio_p999"] < 1e-5
    assert replayed["mismatch_max"] == pytest.approx(1, abs=1e-5), "of an older version"
    assert biased["same_version_ratio_mean"] > 1.5
    assert biased["same_version_log_ratio_p999"] > 1
