"""Metrics of an optimizer step, exact over micro-batches and ranks.

verl's own metrics are means over micro-batches of unequal size.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from atropos_hpc.contracts.metrics import HISTOGRAM_EDGES
from atropos_hpc.learner.backends.micro_batches import response_rows
from atropos_hpc.learner.backends.verl_api import TensorDict, kl_penalty
from atropos_hpc.learner.batch import PREFIXES
from atropos_hpc.learner.performance import Computed

MAX_LOG_RATIO = 20.0  # verl clamps log-ratios to this, too, before it takes their exponential


class LossMetrics:
    """verl's loss function, which also collects metrics. Use a new one for every step."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self._loss = loss
        self._tokens = 0.0  # trained
        self._token_sums: defaultdict[str, float] = defaultdict(float)
        # verl has divided these by totals over all ranks, and multiplied by the number of ranks.
        self._loss_terms: defaultdict[str, float] = defaultdict(float)
        # d = behaviour - own log-prob: count, sums of |d|, d, exp(-d), exp(-2 d).
        self._mismatch = torch.zeros(5, dtype=torch.float64)
        # Maxima of |d| and -d.
        self._maxima = torch.tensor([0.0, -math.inf], dtype=torch.float64)
        self._same_version = _Ratios()
        self._ratio_edges = torch.tensor(HISTOGRAM_EDGES["ratio"], dtype=torch.float64)
        self._ratio_counts = torch.zeros(len(self._ratio_edges) + 1, dtype=torch.float64)
        self.ratio_counts: list[float] = []  # over all ranks, set by `over_ranks`
        self._computed = torch.zeros(2, dtype=torch.float64)  # tokens, pairs of query and key
        self.computed = Computed()  # over all ranks, set by `over_ranks`

    def __call__(
        self, model_output: dict[str, torch.Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the loss of one micro-batch."""
        loss, metrics = self._loss(model_output=model_output, data=data, dp_group=dp_group)
        with torch.no_grad():
            mask = data["response_mask"].values().bool()
            rows = response_rows(data)[mask]
            log_probs, entropy = (
                model_output[name].values()[rows] for name in ("log_probs", "entropy")
            )
            self._add_terms(loss, metrics, int(mask.sum()), entropy)
            log_probs = log_probs.float()
            if "ref_log_prob" in data:
                kl: Any = kl_penalty(log_probs, data["ref_log_prob"].values()[mask], "k3")
                self._token_sums["kl_reference"] += kl.sum().item()
            difference = data["behaviour_log_probs"].values()[mask] - log_probs
            self._add_mismatch(difference)
            self._add_computed(data["input_ids"].offsets().diff(), data[PREFIXES])
            lengths = data["response_mask"].offsets().diff()
            same = torch.repeat_interleave(data["same_version"], lengths)[mask]
            self._same_version.add(difference[same])
        return loss, {}

    def over_ranks(self, replicas: int = 1) -> dict[str, float]:
        """Return the metrics over all ranks, see `Backend.update`. Collective.

        `replicas` is the number of ranks that hold each sequence.
        """
        sums = torch.tensor(
            [self._tokens, *self._token_sums.values(), *self._loss_terms.values()],
            dtype=torch.float64,
        )
        same_version = self._same_version.sums
        parts = (sums, self._mismatch, same_version, self._computed, self._ratio_counts)
        whole = torch.cat(parts)
        dist.all_reduce(whole)
        sums, mismatch, same_version, computed, counts = whole.split(list(map(len, parts)))
        self.ratio_counts = (counts / replicas).tolist()
        self.computed = Computed(*(torch.cat([computed, sums[:1]]) / replicas).tolist())
        dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX)
        tokens, *rest = sums.tolist()
        values = iter(rest)
        world = dist.get_world_size()
        means = {name: next(values) / tokens for name in self._token_sums}
        losses = {name: next(values) / world for name in self._loss_terms}
        known, absolute, kl, ratios, squares = mismatch.tolist()
        if not known:
            return {**losses, **means}
        max_difference, max_log_ratio = self._maxima.tolist()
        return {
            **losses,
            **means,
            "off_policy/abs_log_ratio_mean": absolute / known,
            "off_policy/abs_log_ratio_max": max_difference,
            "off_policy/kl": kl / known,
            "off_policy/chi2": squares / known - 1,
            "off_policy/mean_ratio": ratios / known,
            "off_policy/max_ratio": math.exp(min(max_log_ratio, MAX_LOG_RATIO)),
            **_Ratios(same_version).metrics(),
        }

    def _add_terms(
        self, loss: torch.Tensor, metrics: Mapping[str, Any], tokens: int, entropy: torch.Tensor
    ) -> None:
        self._tokens += tokens
        self._loss_terms["loss"] += loss.item()
        self._loss_terms["pg_loss"] += metrics["actor/pg_loss"].aggregate()
        kl_loss = metrics.get("kl_loss")
        self._loss_terms["kl_loss"] += kl_loss.aggregate() if kl_loss is not None else 0.0
        self._token_sums["entropy"] += entropy.sum().item()
        for name, verl_name in (("clip_fraction", "actor/pg_clipfrac"), ("ppo_kl", "actor/ppo_kl")):
            if verl_name in metrics:  # not every policy loss has them
                self._token_sums[name] += metrics[verl_name].aggregate() * tokens

    def _add_computed(self, lengths: torch.Tensor, prefixes: torch.Tensor) -> None:
        """Count a micro-batch: a branch computes only what follows its prefix."""
        squares = lengths.double().square() - prefixes.double().square()
        self._computed[0] += float((lengths - prefixes).sum())
        self._computed[1] += float(squares.sum()) / 2

    def _add_mismatch(self, difference: torch.Tensor) -> None:
        known = difference[difference.isfinite()].double().cpu()
        if not len(known):
            return
        ratios = (-known).clamp(max=MAX_LOG_RATIO).exp()
        sums = [values.sum() for values in (known.abs(), known, ratios, ratios.square())]
        bins = torch.bucketize(ratios, self._ratio_edges)
        self._ratio_counts += torch.bincount(bins, minlength=len(self._ratio_counts))
        self._mismatch += torch.stack([torch.tensor(float(len(known)), dtype=torch.float64), *sums])
        maxima = torch.stack([known.abs().max(), -known.min()])
        self._maxima = torch.maximum(self._maxima, maxima)


class _Ratios:
    """The ratio learner / behaviour of tokens that the learner's own version sampled.

    It is 1 but for rounding, if the learner replays the distribution that was sampled. `sums` holds
    the sum of the ratios, and a histogram of |log ratio| whose bins are 5 % wide.
    """

    SMALLEST, WIDTH, BINS = 1e-9, math.log(1.05), 512  # the largest is 6e1

    def __init__(self, sums: torch.Tensor | None = None) -> None:
        empty = torch.zeros(1 + self.BINS, dtype=torch.float64)
        self.sums = empty if sums is None else sums

    def add(self, log_ratios: torch.Tensor) -> None:
        """Add tokens; those whose log-ratio is not known are left out."""
        known = log_ratios[log_ratios.isfinite()].double().cpu()
        self.sums[0] += (-known).clamp(max=MAX_LOG_RATIO).exp().sum()
        bins = (known.abs().clamp(min=self.SMALLEST) / self.SMALLEST).log() / self.WIDTH
        self.sums[1:] += torch.bincount(bins.long().clamp(max=self.BINS - 1), minlength=self.BINS)

    def metrics(self) -> dict[str, float]:
        """Return the mean ratio, and the 99.9th percentile of |log ratio|, rounded up by 5 %."""
        counts = self.sums[1:]
        if not (count := float(counts.sum())):
            return {}
        at = int((counts.cumsum(0) >= 0.999 * count).nonzero()[0])
        return {
            "off_policy/same_version/mean_ratio": float(self.sums[0]) / count,
            "off_policy/same_version/abs_log_ratio_p999": self.SMALLEST
            * math.exp(self.WIDTH * (at + 1)),
        }
