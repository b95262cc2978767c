"""Files of a run directory that are missing, cut or overwritten: a message, never a traceback."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import append_step

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import Done, Holder
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import preflight
from atropos_hpc.launch import run as launch
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.runtime.run_dir import RunDir, read_records, write_struct

DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "not JSON": lambda path: path.write_bytes(b"\x00\xff\n"),
    "another struct": lambda path: path.write_text('[{"other": 1}]\n'),
}


@pytest.fixture
def config(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A complete run of five steps: its start needs no process."""
    config = Config()
    config.run_dir, config.trainer.steps = str(run.path), 5
    config.launch.allocation = "local"
    run_directory = preflight._run_directory
    monkeypatch.setattr(preflight, "check", lambda _, path, *__, **___: [*run_directory(path)])
    write_struct(run.run_json, RunInfo(config, id="x"))
    write_struct(run.done, Done(version=5))
    write_struct(run.holder, Holder(what="test", host="elsewhere", pid=1, since=1.0))
    run.new_attempt()
    (run.logs / "start.json").write_text('{"job": null, "durable": 0}')
    (run.checkpoints / "step-5-0").mkdir()
    (run.checkpoints / "latest.json").write_text('{"step": 5, "directory": "step-5-0"}')
    return config


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "holder.json",
        "done.json",
        "checkpoints/latest.json",
        "policy/latest.json",
        "logs/latest/start.json",
        "rendezvous/roster.json",
    ],
)
def test_a_damaged_file_of_a_run_is_a_message(
    run: RunDir,
    config: Config,
    name: str,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def no_model(*_: object) -> str:
        raise RuntimeError("no model in this test")

    monkeypatch.setattr(launch.base_model, "ensure", no_model)
    DAMAGES[damage](run.path / name)
    code = launch.launch(config, run.path, lambda: None)
    printed = capfd.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in printed.err + printed.out
    if name == "run.json":
        assert code == 2 and "run.json is" in printed.err
    if name in ("holder.json", "policy/latest.json", "rendezvous/roster.json"):
        assert code == 0, "the run can do without it"
    if name == "done.json":
        assert code == 1 and "no model in this test" in printed.err + printed.out, "it goes on"


def test_a_run_directory_whose_first_start_failed_can_be_used_again(run: RunDir) -> None:
    assert not [*preflight._run_directory(run.path)], "created, but run.json was not written"
    run.secret.unlink()
    assert "no run" in str(*preflight._run_directory(run.path))


def test_a_start_that_makes_no_step_removes_no_metrics(run: RunDir) -> None:
    for step in (1, 2, 3):
        append_step(run, step)
    run.new_attempt()
    writer = MetricsWriter(run, {}, resume_at=0)
    assert [line.step for line in read_records(run.metrics, StepMetrics)] == [1, 2, 3]
    writer.write(1, {}, StepTimes(1.0, {}))
    assert [line.step for line in read_records(run.metrics, StepMetrics)] == [1]
