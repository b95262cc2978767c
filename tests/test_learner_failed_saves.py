"""A save that fails or is killed: all ranks hear of it, and it leaves nothing on the disk."""

import json
import os
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

from learner_ranks import on_ranks  # noqa: E402
from test_learner_checkpoint import Numbers, save_steps  # noqa: E402

from atropos_hpc.learner import checkpoint  # noqa: E402
from atropos_hpc.learner.checkpoint import CheckpointFailed, Checkpoints  # noqa: E402
from atropos_hpc.learner.state import TrainState  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402


def full_disk(rank: int, world: int, run: RunDir) -> Any:
    """Rank 1 can't write; both must hear of it, and can save again later."""
    checkpoints = Checkpoints(run, 2, timeout_s=20)
    write = checkpoint.FileSystemWriter.write_data

    def fails(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    if rank == 1:
        checkpoint.FileSystemWriter.write_data = fails
    checkpoints.save(Numbers(1), TrainState(1))  # type: ignore[arg-type]
    with pytest.raises(CheckpointFailed, match="step-1-0"):
        checkpoints.wait()
    if rank == 0:
        assert os.listdir(run.checkpoints) == ["latest.json"], "what was written is gone"
    checkpoint.FileSystemWriter.write_data = write
    checkpoints.save(Numbers(2), TrainState(2))  # type: ignore[arg-type]
    return checkpoints.wait()


@pytest.mark.parametrize("copied", [True, False])
def test_a_full_disk_on_one_rank_is_heard_of_on_all(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    if not copied:
        monkeypatch.setattr(checkpoint, "free_memory", lambda: 0)
    assert on_ranks(2, full_disk, run) == [2, 2]
    assert sorted(json.loads((run.checkpoints / "latest.json").read_text()).items()) == [
        ("directory", "step-2-0"),
        ("step", 2),
    ]


def present_at_write(rank: int, world: int, run: RunDir) -> list[str]:
    """Save; return what is in the directory when the first bytes are written."""
    write, seen = checkpoint.FileSystemWriter.write_data, []

    def watched(*arguments: Any) -> Any:
        seen.extend(os.listdir(run.checkpoints))
        return write(*arguments)

    checkpoint.FileSystemWriter.write_data = watched
    save_steps(rank, world, run, [8])
    return sorted(seen)


def test_what_a_killed_save_has_written_takes_no_space_from_the_next(run: RunDir) -> None:
    on_ranks(1, save_steps, run, [5])
    (run.checkpoints / "step-7-0").mkdir()
    assert on_ranks(1, present_at_write, run)[0] == ["latest.json", "step-5-0", "step-8-0"]
