"""Experiment trackers show every step and evaluation once, over a kill and a resume.

What arrived is read from each tracker's own files on disk.
"""

import json
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.config import Config, WandbConf
from atropos_hpc.contracts.metrics import Evaluation
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.observe.trackers import TensorBoardTracker, WandbTracker
from atropos_hpc.runtime.run_dir import RunDir, append_record

pytestmark = pytest.mark.verl  # W&B and TensorBoard are packages of the trainer
pytest.importorskip("wandb")

BLOCK, HEADER = 32768, 7  # of W&B's files, which have the layout of LevelDB's log


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield Record.FromString(whole)
            whole = b""


def logged(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yield what was logged to W&B, over all attempts."""
    for path in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}


def attempt(run: RunDir, steps: range, evaluations: list[int]) -> None:
    """Train from steps.start - 1 on, and end without closing anything but W&B's own process."""
    wandb = WandbTracker(run, WandbConf(mode="offline", project="p"))
    board = TensorBoardTracker(run, steps.start - 1)
    writer = MetricsWriter(run, [wandb, board], resume_at=steps.start - 1)
    for version in evaluations:
        append_record(run.evaluations, Evaluation(version, accuracy=version / 10))
    for step in steps:
        writer.write(step, {"reward/mean": step / 10 + 1}, StepTimes(1.0, {}))
    wandb.close()
    board._writer.flush()
    ended = int(time.time())
    while int(time.time()) == ended:  # W&B names its directories by the second
        time.sleep(0.05)


def test_a_step_that_is_made_again_is_shown_once(run: RunDir, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run.write_info(RunInfo(Config(), "run-id"))
    attempt(run, range(1, 6), [0, 4])
    attempt(run, range(3, 8), [6])  # the learner was killed after step 5, and resumes at step 2

    lines = list(logged(run))
    steps = Counter(line["step"] for line in lines if "reward/mean" in line)
    assert steps == dict.fromkeys(range(1, 8), 1)
    evaluated = Counter(line["step"] for line in lines if "eval/accuracy" in line)
    assert evaluated == dict.fromkeys((0, 4, 6), 1)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run.path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("reward/mean")] == list(range(1, 8))
    assert sorted(e.step for e in shown.Scalars("eval/accuracy")) == [0, 4, 6]
