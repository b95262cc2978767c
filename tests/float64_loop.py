"""The objective as a float64 loop over sequences that shares no code with the learner."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from learner_ranks import MAX_LENGTH, rows

from atropos_hpc.config import AlgorithmConf, CorrectionConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.support import Support


@dataclass
class Expected:
    """The loop's metrics, gradient per parameter, and d loss / d log-prob by sequence."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    by_token: dict[tuple[int, ...], torch.Tensor]


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
            "off_policy/abs_log_ratio_mean",
            "off_policy/kl",
            "off_policy/mean_ratio",
            "off_policy/chi2",
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
            ("off_policy/abs_log_ratio_mean", (behaviour - log_prob).abs()),
            ("off_policy/kl", behaviour - log_prob),
            ("off_policy/mean_ratio", (log_prob - behaviour).exp()),
            ("off_policy/chi2", (2 * (log_prob - behaviour)).exp() - 1),
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
