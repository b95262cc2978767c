"""A sweep that is submitted again: which points are the same, and what its directory holds."""

from pathlib import Path

import pytest
from config_parts import composed

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import new_directory, resubmission


def points(*overrides: str) -> list[tuple[str, Config]]:
    """One point per override string, in the directories that a multirun gives them."""
    return [(f"/s/{num}", composed(*each.split())) for num, each in enumerate(overrides)]


@pytest.mark.parametrize(
    "before, now, places",
    [
        (["seed=0", "seed=1"], ["seed=0", "seed=1"], ["/s/0", "/s/1"]),
        (["seed=0", "seed=1"], ["seed=0", "seed=1", "seed=2"], ["/s/0", "/s/1", "/s/2"]),
        (["seed=0", "seed=1"], ["seed=1"], ["/s/1"]),
        (["seed=0", "seed=1"], ["seed=1", "seed=0"], ["/s/1", "/s/0"]),
        (["seed=0"], ["seed=0 trainer.steps=9"], ["/s/0"]),  # more steps
        (["seed=0"], ["seed=0 launch.minutes=99 wandb.project=x"], ["/s/0"]),
        (["trainer.steps=4", "trainer.steps=5"], ["trainer.steps=5"], ["/s/1"]),
        (["launch.restarts=1"], ["launch.restarts=1", "launch.restarts=2"], ["/s/0", "/s/1"]),
    ],
)
def test_a_point_of_a_resubmitted_sweep_is_what_its_config_says(
    before: list[str], now: list[str], places: list[str]
) -> None:
    assert resubmission.match(points(*now), dict(points(*before))) == places


@pytest.mark.parametrize(
    "before, now, key",
    [
        (["seed=0", "seed=1"], ["seed=2", "seed=1"], "seed"),
        (["staleness.max=0"], ["staleness.max=2"], "staleness.max"),  # a run may change it, too
        (["trainer.steps=4", "trainer.steps=5"], ["trainer.steps=6"], "trainer.steps"),
        (["algorithm.kl_coef=0"], ["algorithm.kl_coef=1 algorithm.clip_low=0.1"], "algorithm."),
        (["seed=0"], ["seed=0 environment.config.eval_problems=3"], "environment.config."),
    ],
)
def test_other_values_in_the_place_of_a_point_are_refused_by_key(
    before: list[str], now: list[str], key: str
) -> None:
    found = resubmission.match(points(*now), dict(points(*before)))[0]
    assert isinstance(found, Problem) and found.key.startswith(key) and "/s/0" in found.message


def test_a_made_model_is_the_same_after_it_has_got_a_path() -> None:
    begun = composed("seed=0")
    begun.model.path = "/cache/model"
    assert resubmission.match(points("seed=0"), {"/s/0": begun}) == ["/s/0"]


def test_two_commands_of_one_second_get_different_default_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = []
    for _ in range(3):
        monkeypatch.setattr(new_directory, "_claimed", [])
        claimed.append(new_directory.claim(str(tmp_path / "runs" / "2026-01-01_00-00-00")))
        assert new_directory.claim("anything") == claimed[-1]  # one per command
    assert len(set(claimed)) == 3 and all(Path(each).is_dir() for each in claimed)
    new_directory.remove_unused()
    assert not Path(claimed[-1]).exists() and Path(claimed[0]).exists()


def test_a_second_submission_into_one_directory_is_refused(tmp_path: Path) -> None:
    with (
        resubmission.locked(tmp_path),
        pytest.raises(resubmission.Refused, match="another submission"),
        resubmission.locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("fails", [True, False])
def test_a_refused_multirun_leaves_its_directory_as_it_was(tmp_path: Path, fails: bool) -> None:
    old, new = tmp_path / "old", tmp_path / "a" / "b"
    old.mkdir()
    (old / "multirun.yaml").write_text("before")
    (old / "jobs.json").write_text("[]")
    for directory in (old, new):
        with pytest.raises(SystemExit), new_directory.left_as_found(directory):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "multirun.yaml").write_text("after")
            raise SystemExit(2 if fails else 0)
    assert (old / "multirun.yaml").read_text() == "before"
    assert not (tmp_path / "a").exists()
