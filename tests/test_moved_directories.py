"""The directory of a sweep or a run that was moved, or copied to another machine."""

from pathlib import Path

import pytest
from config_parts import composed
from run_files import append_step

from atropos_hpc.cli import main
from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import preflight, resubmission
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import report
from atropos_hpc.runtime.run_dir import RunDir, write_struct


def sweep(directory: Path, points: int) -> list[Point]:
    """Make a sweep of which each point but the last has made num + 1 steps."""
    configs = [composed(f"seed={num}", "trainer.steps=9") for num in range(points)]
    made = [Point(num, [], config, directory / str(num)) for num, config in enumerate(configs)]
    rows = []
    for point in made:
        point.config.run_dir = str(point.run_dir)
        log = str(directory / ".submitit" / f"{point.num}.out")
        rows.append(SweepPoint(point.num, [], str(point.run_dir), 9, str(point.num), log=log))
    directory.mkdir()
    write_struct(directory / "jobs.json", rows)
    resubmission.record(directory, made)
    for point in made[:-1] or made:
        run = RunDir(point.run_dir)
        run.create()
        run.write_info(RunInfo(point.config))
        for step in range(point.num + 1):
            append_step(run, step + 1)
    return made


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("copied", [True, False])
def test_a_moved_or_copied_sweep_is_read_where_it_is(
    tmp_path: Path, points: int, copied: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    made = sweep(old, points)
    old.rename(new)
    if copied:
        sweep(old, points)
    (new / "0" / "metrics.jsonl").write_text("")
    append_step(RunDir(new / "0"), 7)
    rows = report.require_points(new)
    assert [row.run_dir for row in rows] == [str(new / str(num)) for num in range(points)]
    assert rows[0].log == str(new / ".submitit" / "0.out")
    assert report.point_status(rows[0], {}).step == 7
    assert report.require_points(new / "0")[0].job == "0"
    known = resubmission.known_configs(new, [row.run_dir for row in rows])
    assert [known[row.run_dir].seed for row in rows] == [point.config.seed for point in made]


def test_a_sweep_below_a_link_keeps_its_paths(tmp_path: Path) -> None:
    sweep(tmp_path / "real", 2)
    (tmp_path / "link").symlink_to("real")
    rows = report.require_points(tmp_path / "link")
    assert [row.run_dir for row in rows] == [str(tmp_path / "real" / num) for num in "01"]


def test_a_moved_run_is_resumed_with_its_new_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "old")
    run.create()
    run.write_info(RunInfo(composed(f"run_dir={run.path}")))
    run.path.rename(tmp_path / "new")
    seen: list[str] = []

    def check(config: Config, *_: object, **__: object) -> list[Problem]:
        seen.append(config.run_dir)
        return [Problem("x", "y")]

    monkeypatch.setattr(preflight, "check", check)
    assert main(["resume", str(tmp_path / "new")]) == 2
    assert seen == [str(tmp_path / "new")]
