"""A journal that lost its end while the run was stopped: what is missing, what is trained again."""

import pytest

from atropos_hpc.learner.batch_leaser import missing_batches


@pytest.mark.parametrize(
    ("next_batch", "durable", "trained"), [(0, 0, 0), (4, 4, 4), (6, 4, 5), (5, 4, 5), (7, 4, 5)]
)
def test_a_whole_journal_is_not_reported(next_batch: int, durable: int, trained: int) -> None:
    assert missing_batches(next_batch, durable, trained) is None


@pytest.mark.parametrize(
    ("next_batch", "durable", "trained", "says"),
    [
        (0, 4, 4, ["batches 0 to 3", "before step 4 is in the checkpoint"]),
        (3, 4, 8, ["batches 3 to 7", "before step 4", "Steps 5 to 8 are trained again"]),
        (6, 4, 8, ["batches 6 to 7", "Steps 7 to 8 are trained again"]),
    ],
)
def test_a_cut_journal_is_reported_by_batches_and_steps(
    next_batch: int, durable: int, trained: int, says: list[str]
) -> None:
    text = missing_batches(next_batch, durable, trained) or ""
    assert [part for part in says if part not in text] == []
    assert ("in the checkpoint" in text) == (next_batch < durable)
    assert ("trained again" in text) == (trained > max(durable, next_batch))
