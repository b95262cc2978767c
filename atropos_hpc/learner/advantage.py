"""From the scores of one group to one advantage per sequence.

The estimators are those of verl's registry, by name. They run in float64: GRPO divides by the group's standard deviation, and in
float32 the rounding of the mean gives 15 equal scores of 0.97 advantages of 0.19.
"""

import functools
import inspect
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]

# Of verl's estimators, those that need nothing but one score per sequence. Others use lengths, values or log-probs as well.
ESTIMATORS = ("grpo", "rloo")


def group_relative(scores: Scores, estimator: str = "grpo", normalize_by_std: bool = True) -> Scores:
    """Advantages of one group, float64 [G] from float64 [G].

    `estimator` grpo: (score - mean) / (std + 1e-6), without the division if not `normalize_by_std` (arXiv 2402.03300, 2503.20783);
    rloo: score - mean of the others (arXiv 2402.14740). A group whose scores are all equal says nothing about its sequences and
    gets exact zeros. So does a group of one, for which verl would return the raw score. Raises ValueError for another estimator.
    """
    compute = _estimator(estimator, normalize_by_std)
    if len(scores) < 2 or bool((scores == scores[0]).all()):
        return np.zeros(len(scores))
    return compute(scores)


@functools.cache
def _estimator(name: str, normalize_by_std: bool) -> Callable[[Scores], Scores]:
    if name not in ESTIMATORS:
        raise ValueError(f"algorithm.advantage={name}: not an estimator on scores alone; use one of {', '.join(ESTIMATORS)}")
    import torch

    from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl

    # isort: split
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimate = get_adv_estimator_fn(name)
    options = {"norm_adv_by_std_in_grpo": normalize_by_std} if "norm_adv_by_std_in_grpo" in inspect.signature(estimate).parameters else {}

    def compute(scores: Scores) -> Scores:
        rewards = torch.tensor(scores, dtype=torch.float64)[:, None]  # one token per response, so that the mask is a column of ones
        index = np.zeros(len(scores), dtype=np.int64)
        advantages, _ = estimate(token_level_rewards=rewards, response_mask=torch.ones_like(rewards), index=index, **options)
        return advantages[:, 0].numpy()

    return compute
