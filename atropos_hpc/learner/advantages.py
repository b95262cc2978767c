"""Compute one advantage per sequence from the scores of its group.

The estimators are those of verl's registry, by name. They run group by group, in float64: GRPO
divides by the group's standard deviation, and in float32 the rounding error of the mean gives 15
equal scores of 0.97 advantages of 0.19. Two estimators scale over the whole batch. verl scales over
what one process holds; here it is over all ranks, so that advantages do not depend on how groups
were distributed.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from atropos_hpc.learner.backends.verl_api import get_adv_estimator_fn

Scores = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

# Those of verl's estimators that need only scores and lengths. Others use values, log-probs or
# several rewards.
IN_GROUP = ("grpo", "grpo_passk", "rloo", "opo")
OVER_BATCH = ("gpg", "reinforce_plus_plus_baseline")
ESTIMATORS = (*IN_GROUP, *OVER_BATCH)


def batch_advantages(
    scores: Sequence[Scores],
    trained: Sequence[Counts],
    estimator: str,
    normalize_by_std: bool,
    replicas: int = 1,
) -> list[Scores]:
    """Return the advantages of this rank's groups, float64 [G] for each.

    `scores`, [G], and `trained`, [G] numbers of trained tokens, are given per group; `replicas` is
    the number of ranks that hold each group. Collective for an estimator of OVER_BATCH, which
    changes what `group_advantages` returns:
      gpg: multiplied by sequences / sequences whose score is not 0 (arXiv 2504.02546);
      reinforce_plus_plus_baseline: whitened over all trained tokens (arXiv 2501.03262).
    """
    groups = [
        group_advantages(s, estimator, normalize_by_std, t)
        for s, t in zip(scores, trained, strict=True)
    ]
    if estimator == "gpg":
        local = [sum(map(len, scores)), sum(int(np.count_nonzero(s)) for s in scores)]
        sequences, nonzero = _over_ranks(local, replicas)
        groups = [group * sequences / max(1, nonzero) for group in groups]
    if estimator == "reinforce_plus_plus_baseline":
        pairs = list(zip(groups, trained, strict=True))
        sums = [(float(t.sum()), float(a @ t), float(a * a @ t)) for a, t in pairs]
        local = np.sum(sums, axis=0).tolist() if sums else [0, 0, 0]
        tokens, total, squares = _over_ranks(local, replicas)
        if tokens > 1:
            mean = total / tokens
            variance = (squares - total * mean) / (tokens - 1)
            groups = [(group - mean) / math.sqrt(max(0, variance) + 1e-8) for group in groups]
    return groups


def group_advantages(
    scores: Scores,
    estimator: str = "grpo",
    normalize_by_std: bool = True,
    trained: Counts | None = None,
) -> Scores:
    """Return the advantages of one group, float64 [G], from its scores, float64 [G].

    grpo: (score - mean) / (std + 1e-6); without the division if not `normalize_by_std`
        (arXiv 2402.03300, 2503.20783)
    grpo_passk: best score - second best, for the best sequence only, divided likewise
        (arXiv 2503.19595)
    rloo: score - mean of the others (arXiv 2402.14740)
    opo: score - mean weighted by `trained`, [G] tokens (arXiv 2505.23585)
    gpg, reinforce_plus_plus_baseline: score - mean

    A group whose scores are all equal has no signal and gets exact zeros. So does a group of one,
    for which verl would return the raw score. Raises ValueError for another estimator.
    """
    compute = _estimator(estimator, normalize_by_std)
    if len(scores) < 2 or bool((scores == scores[0]).all()):
        return np.zeros(len(scores))
    return compute(scores, np.ones(len(scores), np.int64) if trained is None else trained)


@functools.cache
def _estimator(name: str, normalize_by_std: bool) -> Callable[[Scores, Counts], Scores]:
    if name not in ESTIMATORS:
        raise ValueError(
            f"algorithm.advantage={name} is not an estimator on scores alone: use one of"
            f" {', '.join(ESTIMATORS)}"
        )
    centred = name in OVER_BATCH
    estimate = get_adv_estimator_fn("grpo" if centred else name)
    options = {"norm_adv_by_std_in_grpo": normalize_by_std and not centred}
    parameters = inspect.signature(estimate).parameters
    accepted: dict[str, object] = {k: value for k, value in options.items() if k in parameters}
    if name == "grpo_passk":  # reads the option from its config
        accepted = {"config": SimpleNamespace(get=options.get)}

    def compute(scores: Scores, trained: Counts) -> Scores:
        # Only opo looks at lengths; for the others one column is enough.
        longest = max(1, int(trained.max())) if name == "opo" else 1
        mask = torch.ones(len(scores), 1)
        if name == "opo":
            mask = torch.arange(longest) < torch.from_numpy(trained)[:, None]
        rewards = torch.zeros(len(scores), longest, dtype=torch.float64)
        rewards[:, 0] = torch.from_numpy(scores)
        index = np.zeros(len(scores), dtype=np.int64)
        advantages, _ = estimate(
            token_level_rewards=rewards, response_mask=mask.double(), index=index, **accepted
        )
        return advantages[:, 0].numpy()

    return compute


def _over_ranks(sums: Sequence[float], replicas: int) -> list[float]:
    totals = torch.tensor([float(value) for value in sums], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return [float(total) / replicas for total in totals]
