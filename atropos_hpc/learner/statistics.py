"""Statistics of a batch over all ranks, for the metrics and for shapes that ranks must agree on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.metrics import HISTOGRAM_EDGES
from atropos_hpc.learner.sequences import Sequences

_STALENESS_EDGES = HISTOGRAM_EDGES["staleness"]
_STALENESS_BINS = len(_STALENESS_EDGES) + 1


@dataclass(frozen=True)
class Statistics:
    """Numbers about a batch: `sums` are added over ranks, `maxima` are the maxima over ranks."""

    sums: dict[str, float]
    maxima: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Return counts and means for the metrics, without means over nothing.

        Lengths and staleness are those of all sequences, trained or not.
        """
        sums, maxima = self.sums, self.maxima
        sequences = sums["sequences"] or math.nan
        mean = sums["reward"] / sequences
        counts = (
            "groups", "sequences", "trained_sequences", "tokens", "trained_tokens", "first_tokens",
            "zero_advantage_groups", "without_log_probs", "stale_sequences", "biased_sequences",
        )  # fmt: skip
        metrics = {name: sums[name] for name in counts} | {
            "reward/mean": mean,
            "reward/std": math.sqrt(max(0.0, sums["reward_squared"] / sequences - mean * mean)),
            "length_mean": sums["tokens"] / sequences,
            "length_max": maxima["length"],
            "response_length_mean": sums["trained_tokens"]
            / (sums["trained_sequences"] or math.nan),
            "truncated_fraction": sums["truncated"] / sequences,
            "off_policy/staleness_mean": sums["staleness"] / (sums["versions_known"] or math.nan),
            "off_policy/staleness_max": maxima["staleness"],
        }
        for key in sums:
            if key.startswith("reward/"):
                name = key.removeprefix("reward/")
                count = sums[f"sequences/{name}"]
                metrics[f"sequences/{name}"] = count
                metrics[f"{key}/mean"] = sums[key] / (count or math.nan)
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def staleness_counts(self) -> list[float]:
        """Return the sequences per bin, as in StepMetrics.histograms."""
        return [self.sums[f"staleness/{index}"] for index in range(_STALENESS_BINS)]


def local_statistics(
    groups: Sequence[Group],
    sequences: Sequences,
    max_length: int,
    version: int,
    environments: Sequence[str] = (),
) -> Statistics:
    """Return this rank's statistics. `version` is the learner's.

    Staleness is `version` minus the oldest version that produced a token of the sequence, where
    that is known. `environments` names those whose rewards are reported separately; every rank must
    give the same.
    """
    scores, lengths = np.zeros(0), np.zeros(0, np.uint32)
    if groups:
        lengths = np.concatenate([group.lengths for group in groups])
        scores = np.concatenate([group.scores for group in groups])
    staleness = np.array(
        [max(0, version - known[0]) for group in groups for known in group.policy_versions if known]
    )
    # The last token of a response is trained, so its log-prob is NaN only if it is not known.
    last = np.cumsum(sequences.lengths - sequences.starts) - 1
    sums = {
        "groups": len(groups),
        "sequences": lengths.size,
        "trained_sequences": sequences.lengths.size,
        "tokens": lengths.sum(),
        "trained_tokens": sequences.mask.sum(),
        "first_tokens": sequences.first_tokens,
        "reward": scores.sum(),
        "reward_squared": np.square(scores).sum(),
        "truncated": sum(_truncated(group, max_length) for group in groups),
        "zero_advantage_groups": sequences.zero_advantage_groups,
        "without_log_probs": np.isnan(sequences.behaviour[last]).sum(),
        "without_reference": np.isnan(sequences.reference[last]).sum(),
        "versions_known": staleness.size,
        "staleness": staleness.sum(),
        "stale_sequences": (staleness > 0).sum(),
        "biased_sequences": sum(len(group.lengths) for group in groups if _is_biased(group)),
    }
    counts = np.bincount(np.searchsorted(_STALENESS_EDGES, staleness), minlength=_STALENESS_BINS)
    sums |= {f"staleness/{index}": count for index, count in enumerate(counts)}
    for name in environments:
        own = [
            group.scores
            for group in groups
            if (group.generation_params or {}).get("environment") == name
        ]
        sums[f"sequences/{name}"] = sum(map(len, own))
        sums[f"reward/{name}"] = sum(float(scores.sum()) for scores in own)
    maxima = {
        "length": lengths.max(initial=0),
        "longest_trained": sequences.lengths.max(initial=0),
        "trained_sequences": sequences.lengths.size,
        "staleness": staleness.max(initial=0),
    }
    return Statistics(
        {name: float(value) for name, value in sums.items()},
        {name: float(value) for name, value in maxima.items()},
    )


def _truncated(group: Group, max_length: int) -> int:
    """Count the sequences that were cut off: at the limit of the answer, or of the model."""
    pairs = zip(group.finish_reasons, group.lengths, strict=True)
    return sum(reason == "length" or length >= max_length for reason, length in pairs)


def _is_biased(group: Group) -> bool:
    """Return whether the group is one that rollout.allow_biased_sampling let pass."""
    return bool((group.generation_params or {}).get("biased_sampling"))


def over_ranks(local: Statistics, replicas: int = 1) -> Statistics:
    """Combine the statistics of all ranks. `replicas` is the number of ranks that hold each group.

    The default process group must accept host tensors (gloo, alone or beside nccl).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    sums = torch.tensor(list(local.sums.values()), dtype=torch.float64)
    maxima = torch.tensor(list(local.maxima.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    sums /= replicas
    return Statistics(
        dict(zip(local.sums, sums.tolist(), strict=True)),
        dict(zip(local.maxima, maxima.tolist(), strict=True)),
    )
