"""End a run that learns nothing: one whose steps are all skipped for their gradients.

A backend leaves the weights as they are where the gradient norm is NaN or infinite. One such step
is an accident; many in a row would complete the run with the weights that it had before them.
"""

import math


class NothingLearned(Exception):
    """Too many steps in a row left the weights unchanged; a restart would repeat them."""


class SkippedSteps:
    """Counts the steps in a row that were skipped. All ranks see the same gradient norm."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def count(self, grad_norm: float) -> int:
        """Count a step; return how many in a row were skipped, this one included."""
        self.in_a_row = 0 if math.isfinite(grad_norm) else self.in_a_row + 1
        return self.in_a_row

    def check(self, step: int) -> None:
        """Raise NothingLearned if the limit is reached."""
        if self.in_a_row >= self.limit:
            raise NothingLearned(
                f"the gradients of the last {self.in_a_row} steps, up to step {step}, were not"
                " finite, so these steps changed nothing: the run ends"
                " (trainer.max_skipped_steps). Lower trainer.learning_rate, or look at the rewards"
                " and log-probs in `atropos-hpc samples`; resume with another config from the last"
                " checkpoint, or start anew"
            )
