"""Checkpoints: bit-equal resume, other numbers of ranks, and a crash at each point of a save."""

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import learner_ranks  # noqa: E402
import torch  # noqa: E402
from learner_ranks import MAX_LENGTH, on_ranks, same, state_of, whole  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner import checkpoint, checkpoint_files  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.learner.state import TrainState  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir, read_json, write_json  # noqa: E402


def backend_of(path: Path, learning_rate: float = 1e-3) -> VerlBackend:
    trainer = TrainerConf(learning_rate=learning_rate, warmup_steps=2, schedule="cosine", steps=20)
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH)
    return VerlBackend(model, trainer, AlgorithmConf(kl_coef=0), 0, reference=False)


def train(backend: VerlBackend, steps: int) -> list[dict[str, float]]:
    """Steps, with what each generator of random numbers gave before."""
    metrics = []
    for _ in range(steps):
        drawn = {
            "drawn0": float(torch.rand(())),
            "drawn1": random.random(),
            "drawn2": float(np.random.rand()),
        }
        metrics.append({**learner_ranks.train(backend, 1)[0], **drawn})
    return metrics


def weights_of(backend: VerlBackend) -> dict[str, torch.Tensor]:
    return whole(backend.module.state_dict())


def two_steps_saved(rank: int, world: int, path: Path, run: RunDir) -> Any:
    """Save at step 2, train on while that is written; return weights and metrics of steps 3, 4."""
    backend, checkpoints = backend_of(path), Checkpoints(run, keep=2)
    random.seed(rank)
    train(backend, 2)
    state_of(backend).kl_coef = 0.25
    assert checkpoints.newly_durable() is None
    at_save = weights_of(backend)
    checkpoints.save(backend, state_of(backend))
    metrics = train(backend, 2)
    assert checkpoints.wait() == 2
    assert checkpoints.newly_durable() is None, "reported once"
    return at_save, metrics, weights_of(backend)


def resumed(
    rank: int, world: int, path: Path, run: RunDir, steps: int = 2, save: bool = False
) -> Any:
    """Goes on from the newest checkpoint for some steps, and saves, if asked."""
    random.seed(99)
    backend, checkpoints = backend_of(path), Checkpoints(run, keep=2)
    assert checkpoints.load_latest(backend, state_of(backend))
    assert state_of(backend).kl_coef == 0.25
    loaded, start = weights_of(backend), state_of(backend).version
    metrics = train(backend, steps)
    if save:
        checkpoints.save(backend, state_of(backend))
        checkpoints.wait()
    return loaded, metrics, weights_of(backend), start


def test_a_resume_is_bit_equal(small_model: Path, run: RunDir) -> None:
    at_save, metrics, after = on_ranks(1, two_steps_saved, small_model, run)[0]
    loaded, again, end, start = on_ranks(1, resumed, small_model, run)[0]
    assert start == 2 and same(at_save, loaded)
    assert metrics == again and same(after, end)


def test_a_checkpoint_is_not_copied_where_memory_is_short(
    small_model: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(*_: Any, **__: Any) -> None:
        raise AssertionError("the state was copied")

    monkeypatch.setattr(checkpoint, "free_memory", lambda: 0)
    monkeypatch.setattr(checkpoint, "async_save", copies)
    at_save, metrics, after = on_ranks(2, two_steps_saved, small_model, run)[0]
    loaded, again, end, start = on_ranks(2, resumed, small_model, run)[0]
    assert start == 2 and same(at_save, loaded) and metrics == again and same(after, end)


def test_other_numbers_of_ranks(small_model: Path, run: RunDir) -> None:
    both = on_ranks(2, two_steps_saved, small_model, run)
    at_save, metrics, after = both[0]
    ranks = on_ranks(2, resumed, small_model, run)
    assert [rank[1] for rank in ranks] == [rank[1] for rank in both] and same(after, ranks[0][2]), (
        "2 ranks again: bit-equal"
    )

    # 2 ranks -> 1, which takes a step and saves -> 2 again; each compared with the run that was
    # never stopped
    loaded, on_one, end, _ = on_ranks(1, resumed, small_model, run, 1, True)[0]
    assert same(at_save, loaded) and on_one[0]["lr"] == metrics[0]["lr"]
    assert on_one[0]["loss"] == pytest.approx(metrics[0]["loss"], abs=1e-6)
    loaded, on_two, _, start = on_ranks(2, resumed, small_model, run, 1)[0]
    assert start == 3 and same(end, loaded) and on_two[0]["lr"] == metrics[1]["lr"]
    assert on_two[0]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-6)
    assert read_json(run.checkpoints / "latest.json") == {"step": 3, "directory": "step-3-0"}


def places_of_saves(rank: int, world: int, path: Path, run: RunDir) -> Any:
    """Save twice; return the addresses of the staged weights, and what was saved last."""
    backend, checkpoints = backend_of(path), Checkpoints(run, keep=2, keep_staging=True)
    assert checkpoints._stager is not None
    stage, places = checkpoints._stager.stage, []

    def watched(state: Any) -> Any:
        staged = stage(state)
        places.append([tensor.to_local().data_ptr() for tensor in staged["model"].values()])
        return staged

    checkpoints._stager.stage = watched  # type: ignore[method-assign]
    for _ in range(2):
        train(backend, 1)
        checkpoints.save(backend, state_of(backend))
        at_save = weights_of(backend)
        train(backend, 1)
        checkpoints.wait()
    checkpoints.load_latest(backend, TrainState())
    return places, at_save, weights_of(backend)


def test_every_save_is_staged_in_the_same_host_memory(small_model: Path, run: RunDir) -> None:
    for (first, second), at_save, loaded in on_ranks(2, places_of_saves, small_model, run):
        assert first == second and len(set(first)) > 4 and same(at_save, loaded)


def saved_at_zero(rank: int, world: int, path: Path, run: RunDir) -> Any:
    ends = []
    for save in (False, True):
        backend, checkpoints = backend_of(path), Checkpoints(run, keep=1)
        if save:
            checkpoints.save(backend, state_of(backend))
            checkpoints.wait()
        train(backend, 2)
        ends.append(weights_of(backend))
    backend = backend_of(path)
    checkpoints.load_latest(backend, state_of(backend))
    train(backend, 2)
    return [*ends, weights_of(backend)]


def test_saving_before_the_first_step_changes_nothing(small_model: Path, run: RunDir) -> None:
    never, saved, resumed_from_it = on_ranks(1, saved_at_zero, small_model, run)[0]
    assert same(never, saved) and same(never, resumed_from_it)


def another_rate(rank: int, world: int, path: Path, run: RunDir) -> float:
    backend = backend_of(path, learning_rate=0.5)
    Checkpoints(run, keep=2).load_latest(backend, state_of(backend))
    return train(backend, 1)[0]["lr"]


def test_the_learning_rate_is_the_configs(small_model: Path, run: RunDir) -> None:
    _, metrics, _ = on_ranks(1, two_steps_saved, small_model, run)[0]
    assert on_ranks(1, another_rate, small_model, run)[0] == pytest.approx(500 * metrics[0]["lr"])


class Numbers:
    """A backend of one tensor, for what doesn't depend on models."""

    def __init__(self, step: int = 0) -> None:
        self.values = torch.full((1000,), float(step))

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def save_steps(rank: int, world: int, run: RunDir, steps: list[int], keep: int = 2) -> list[str]:
    checkpoints = Checkpoints(run, keep)
    for step in steps:
        numbers = Numbers(step)
        checkpoints.save(numbers, TrainState(step))  # type: ignore[arg-type]
        numbers.values.fill_(-1)  # training goes on
        assert checkpoints.wait() == step
    checkpoints.close()
    return sorted(name for name in os.listdir(run.checkpoints) if name.startswith("step-"))


def load_numbers(rank: int, world: int, run: RunDir) -> Any:
    numbers = Numbers()
    state = TrainState()
    if not Checkpoints(run, 2).load_latest(numbers, state):  # type: ignore[arg-type]
        return None
    assert (numbers.values == state.version).all()
    return state.version


def test_the_newest_are_kept_and_what_is_no_use_goes(run: RunDir) -> None:
    assert on_ranks(1, load_numbers, run) == [None]
    assert on_ranks(2, save_steps, run, [1, 2, 3])[0] == ["step-2-0", "step-3-0"]
    (run.checkpoints / "step-9-0").mkdir()  # incomplete
    (
        run.checkpoints / "step-8-0"
    ).mkdir()  # complete, but never named: left by a crash before latest.json
    (run.checkpoints / "step-8-0" / "manifest.json").write_text(
        '{"step": 8, "ranks": 1, "files": []}'
    )
    assert on_ranks(1, load_numbers, run) == [3]
    assert on_ranks(1, save_steps, run, [3, 4])[0] == ["step-3-1", "step-4-0"], (
        "a second attempt at 3 is newer than the first"
    )


def save_with_milestones(rank: int, world: int, run: RunDir, steps: list[int]) -> list[str]:
    checkpoints = Checkpoints(run, keep=1, keep_every=4)
    for step in steps:
        checkpoints.save(Numbers(step), TrainState(step))  # type: ignore[arg-type]
        checkpoints.wait()
    checkpoints.close()
    return sorted(name for name in os.listdir(run.checkpoints) if name.startswith("step-"))


def test_milestones_stay_in_their_last_attempt(run: RunDir) -> None:
    assert on_ranks(1, save_with_milestones, run, [2, 4, 6, 8, 8, 9])[0] == [
        "step-4-0",
        "step-8-1",
        "step-9-0",
    ]
    assert (
        checkpoint_files.find(run.checkpoints, 8)[0].name == "step-8-1"
        and checkpoint_files.find(run.checkpoints)[0].name == "step-9-0"
    )
    with pytest.raises(FileNotFoundError, match=r"step 6.*there are: 4, 8, 9"):
        checkpoint_files.find(run.checkpoints, 6)


def test_damage_is_noticed_and_an_older_one_taken(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    on_ranks(1, save_steps, run, [1, 2])
    manifest = read_json(run.checkpoints / "step-2-0" / "manifest.json")
    assert {entry["file"] for entry in manifest["files"]} == {
        ".metadata",
        "__0_0.distcp",
    } and manifest["ranks"] == 1
    shard = run.checkpoints / "step-2-0" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
    assert on_ranks(2, load_numbers, run) == [1, 1]
    (run.checkpoints / "step-1-0" / ".metadata").unlink()
    with pytest.raises(
        AssertionError,
        match=r"BadCheckpoint.*step-2-0.*the manifest says.*step-1-0/.metadata: missing",
    ):
        on_ranks(2, load_numbers, run)


def test_a_damaged_manifest_is_noticed_too(run: RunDir) -> None:
    on_ranks(1, save_steps, run, [1, 2])
    manifest = run.checkpoints / "step-2-0" / "manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    assert on_ranks(2, load_numbers, run) == [1, 1]
    with pytest.raises(checkpoint_files.BadCheckpoint, match=r"step-2-0/manifest.json"):
        checkpoint_files.find(run.checkpoints, 2)


LATEST_CASES = {
    "missing": lambda latest: latest.unlink(),
    "empty": lambda latest: latest.write_bytes(b""),
    "no checkpoint named": lambda latest: latest.write_text("{}"),
    "cut to half": lambda latest: os.truncate(latest, latest.stat().st_size // 2),
    "another file": lambda latest: latest.write_text('{"step": 2, "directory": "../policy"}'),
    "not JSON": lambda latest: latest.write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("case", LATEST_CASES)
def test_a_damaged_latest_json_loses_no_checkpoint(
    run: RunDir, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    on_ranks(1, save_steps, run, [1, 2])
    (run.checkpoints / "step-3-0").mkdir()  # of a save that did not end
    LATEST_CASES[case](run.checkpoints / "latest.json")
    assert on_ranks(1, load_numbers, run) == [2]
    assert checkpoint_files.find(run.checkpoints)[0].name == "step-2-0"
    assert "resuming from step-2-0, because: " in caplog.text and "latest.json" in caplog.text
    assert {"step-1-0", "step-2-0"} < set(os.listdir(run.checkpoints)), "nothing was removed"
    assert on_ranks(1, save_steps, run, [3])[0] == ["step-2-0", "step-3-1"]


def test_a_damaged_latest_json_without_a_checkpoint_is_refused(run: RunDir) -> None:
    (run.checkpoints / "latest.json").write_bytes(b"\xff")
    with pytest.raises(checkpoint_files.BadCheckpoint, match=r"latest.json.*Nothing was changed"):
        checkpoint_files.find(run.checkpoints)


def test_a_checkpoint_with_damaged_content_is_passed_over(run: RunDir) -> None:
    on_ranks(1, save_steps, run, [1, 2])
    metadata = run.checkpoints / "step-2-0" / ".metadata"
    metadata.write_bytes(b"\0" * metadata.stat().st_size)
    assert on_ranks(2, load_numbers, run) == [1, 1]


def learner_with_no_valid_checkpoint(rank: int, world: int, run: RunDir) -> str:
    """Run a rank's main as far as its checkpoints; return exit code and log."""
    from atropos_hpc.learner import main as learner

    def fails(*_: Any) -> bool:
        checkpoint_files.find(run.checkpoints)
        raise AssertionError("found one")

    learner._train = fails
    with (run.path / "stderr").open("w+") as output, contextlib.redirect_stderr(output):
        code = learner.main(["--run-dir", str(run.path)])
        output.seek(0)
        return f"{code} {output.read()}"


def test_checkpoints_that_are_all_damaged_end_the_learner_with_a_message(run: RunDir) -> None:
    on_ranks(1, save_steps, run, [1])
    (run.checkpoints / "step-1-0" / "__0_0.distcp").unlink()
    write_json(run.run_json, {"id": "x", "config": {}})
    printed = on_ranks(1, learner_with_no_valid_checkpoint, run)[0]
    assert printed.startswith("2 ") and "step-1-0/__0_0.distcp: missing" in printed
    assert "Traceback" not in printed


def crash_at(rank: int, world: int, run: RunDir, function: str, call: int) -> None:
    """The process ends right before `call` of a function that a save uses, after one whole save."""
    original, calls = getattr(checkpoint, function), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os._exit(0)
        return original(*arguments, **options)

    save_steps(rank, world, run, [5])
    setattr(checkpoint, function, counted)
    save_steps(rank, world, run, [10])


@pytest.mark.parametrize(
    "function, call, survives",
    [
        ("write_struct", 1, 5),  # before the manifest
        ("sync_directory", 1, 5),
        ("write_struct", 2, 5),  # between manifest and latest.json
        ("remove_obsolete", 1, 10),  # after latest.json
    ],
)
def test_a_crash_leaves_the_last_durable_step(
    run: RunDir, function: str, call: int, survives: int
) -> None:
    with pytest.raises(FileNotFoundError):  # no result: the process was gone
        on_ranks(1, crash_at, run, function, call)
    assert on_ranks(1, load_numbers, run) == [survives]
    assert on_ranks(1, save_steps, run, [survives + 1], 1)[0] == [f"step-{survives + 1}-0"], (
        "leftovers go with the next save"
    )
