"""All experiment trackers show every step and evaluation once, over kills and resumes.

What arrived is read from each tracker's own store on disk, by its own library.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.config import Config, MlflowConf, TrackioConf, WandbConf
from atropos_hpc.contracts.metrics import Rollout, Tracked
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.observe.tracker_feed import TrackerFeed
from atropos_hpc.observe.trackers import Ending, _wandb_records, mlflow_name, newest_in_events
from atropos_hpc.runtime.run_dir import RunDir, read_records
from atropos_hpc.runtime.waiting import wait_for

pytestmark = pytest.mark.verl  # the trackers' libraries are packages of the trainer
PARTS = Path(__file__).with_name("tracker_parts.py")
Shown = set[tuple[str, int, float]]  # (name, step, value)


def attempt(run: RunDir, *arguments: str) -> int:
    """Run one attempt of tracker_parts.py and return its exit code."""
    quiet = {"WANDB_SILENT": "true", "TRACKIO_DIR": str(run.path / "trackio")}
    code = subprocess.run(
        [sys.executable, str(PARTS), str(run.path), *arguments],
        env={**os.environ, **quiet, "PYTHONPATH": str(PARTS.parent.parent)},
        check=False,
    ).returncode
    ended = int(time.time())
    while int(time.time()) == ended:  # W&B names its directories by the second
        time.sleep(0.05)
    return code


def in_wandb(run: RunDir) -> Iterator[tuple[str, int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        records = [Record.FromString(each) for each in _wandb_records(path.read_bytes())]
        numbers = [record.num for record in records if record.num]
        assert numbers == list(range(1, len(numbers) + 1)), "the reader has left out a record"
        for record in records:
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("step", None)
            for name, value in items.items():
                if isinstance(value, float | int) and not name.startswith(("_", "samples.")):
                    yield name, step, value


def in_tensorboard(run: RunDir) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard"))
    shown.Reload()
    for name in shown.Tags()["scalars"]:
        for event in shown.Scalars(name):
            yield name, event.step, event.value


def in_mlflow(run: RunDir) -> Iterator[tuple[str, int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("atropos_hpc")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["trainer.steps"] == "100"
    for name in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, name):
            yield name, metric.step, metric.value


def in_trackio(run: RunDir) -> Iterator[tuple[str, int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("atropos_hpc")
    for line in SQLiteStorage.get_logs("atropos_hpc", name):
        for key, value in line.items():
            if isinstance(value, float | int) and key != "step":
                yield key, line["step"], value


def test_all_trackers_show_the_same_values_and_each_step_once_over_kills_and_resumes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        wandb=WandbConf(mode="offline"),
        tensorboard=True,
        mlflow=MlflowConf(enabled=True),
        trackio=TrackioConf(enabled=True),
    )
    run.write_info(RunInfo(config, "run-id"))
    assert attempt(run, "1", "5", "0", "4", "--kill") == -9
    assert attempt(run, "3", "8", "6") == 0  # resumed at step 2: repeats 3, 4 and 5

    lines = read_records(run.tracked, Tracked)
    assert [line.step for line in lines if line.kind == "step"] == list(range(1, 9))
    assert [line.step for line in lines if line.kind == "evaluation"] == [0, 4, 6]
    given = [(name, line.step, value) for line in lines for name, value in line.scalars.items()]
    assert ("reward/mean", 5, 5.0) in given, "the first value of a repeated step"
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", run.path / "trackio")
    readers: list[Callable[[RunDir], Iterator[Any]]] = [in_wandb, in_tensorboard, in_trackio]
    for reader in readers:
        assert sorted(reader(run)) == sorted(given), reader.__name__
    assert sorted(in_mlflow(run)) == sorted((mlflow_name(n), *rest) for n, *rest in given)
    assert list((run.path / "mlflow/artifacts").rglob("step-8.md")), "samples"


class Recorder:
    """A tracker that keeps what it is given, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.steps: list[int] = []
        self.failures = failures

    def holds(self, line: Tracked) -> bool:
        return False

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host")
        self.steps.append(line.step)

    def close(self, ending: Ending) -> None: ...


@pytest.mark.parametrize(
    ("ending", "exit_code", "status"),
    [
        (Ending.COMPLETE, 0, "FINISHED"),
        (Ending.STOPPED, 255, "KILLED"),
        (Ending.FAILED, 1, "FAILED"),
    ],
)
def test_trackers_show_how_a_run_has_ended(
    run: RunDir, ending: Ending, exit_code: int, status: str
) -> None:
    from mlflow.tracking import MlflowClient
    from wandb.proto.wandb_internal_pb2 import Record

    config = Config(wandb=WandbConf(mode="offline"), mlflow=MlflowConf(enabled=True))
    run.write_info(RunInfo(config, "run-id"))
    assert attempt(run, "1", "1", ending.name) == 0
    (path,) = run.path.glob("wandb/offline-run-*/*.wandb")
    records = (Record.FromString(each) for each in _wandb_records(path.read_bytes()))
    (exited,) = (each.exit for each in records if each.WhichOneof("record_type") == "exit")
    assert exited.exit_code == exit_code
    client = MlflowClient(f"sqlite:///{run.path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("atropos_hpc")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == status


def test_a_tracker_that_fails_gets_what_it_missed_and_disturbs_no_other(run: RunDir) -> None:
    failing, other = Recorder(failures=1), Recorder()
    feed = TrackerFeed(run, {"failing": lambda: failing, "other": lambda: other})
    for step in (1, 2, 3, 4):
        feed.add("step", step, 0.0, {"time/step": 1.0})
    wait_for("the failure", "the tracker", lambda: not failing.failures, 30.0)
    feed.close(Ending.COMPLETE)
    assert failing.steps == other.steps == [1, 2, 3, 4]


def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    released, other = threading.Event(), Recorder()

    def hang() -> Recorder:
        released.wait()
        return Recorder()

    hanging = {f"hanging {number}": hang for number in range(5)}
    feed = TrackerFeed(run, {**hanging, "other": lambda: other})
    for step in (1, 2):
        feed.add("step", step, 0.0, {"time/step": 1.0})
    wait_for("both steps", "the other tracker", lambda: other.steps == [1, 2], 30.0)
    started = time.monotonic()
    feed.close(Ending.COMPLETE, timeout_s=1.0)
    assert time.monotonic() - started < 3.0, "one deadline for all"
    released.set()
    assert all(f"{name} lacks 2 of 2 lines" in caplog.text for name in hanging)
    assert "other lacks" not in caplog.text


def test_a_line_that_a_crash_cut_off_is_given_again(run: RunDir) -> None:
    feed = TrackerFeed(run, {"recorder": Recorder})
    for step in (1, 2):
        feed.add("step", step, 0.0, {"time/step": 1.0})
    feed.close(Ending.COMPLETE)
    run.tracked.write_bytes(run.tracked.read_bytes()[:-9])
    recorder = Recorder()
    feed = TrackerFeed(run, {"recorder": lambda: recorder})
    assert feed.knows("step", 1) and not feed.knows("step", 2)
    feed.add("step", 2, 0.0, {"time/step": 1.0})
    feed.close(Ending.COMPLETE)
    assert recorder.steps == [1, 2]
    assert [line.number for line in read_records(run.tracked, Tracked)] == [0, 1]


def test_the_newest_step_in_tensorboard_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    assert newest_in_events(tmp_path) == {"step": -1, "evaluation": -1}
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("time/step", 1.0, 3)
    writer.add_scalar("reward/mean", 1.0, 4)  # and killed
    writer.close()
    assert newest_in_events(tmp_path) == {"step": 3, "evaluation": -1}
