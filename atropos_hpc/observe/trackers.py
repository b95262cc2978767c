"""Experiment trackers: Weights & Biases, TensorBoard, MLflow, Trackio.

Each shows one run over all its attempts. Its own store says what it holds; observe/tracker_feed.py
decides what it is given. The step that they show is the policy version.
"""

import importlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from atropos_hpc.config import Config, MlflowConf, TrackioConf, WandbConf
from atropos_hpc.contracts.metrics import Evaluation, Rollout, StepMetrics, Tracked
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.observe.history import flatten
from atropos_hpc.runtime.run_dir import RunDir

# The scalar that every line of a kind has.
MARKERS = {"step": "time/step", "evaluation": "eval/accuracy"}
BLOCK, HEADER = 32768, 7  # of W&B's files, which have the layout of LevelDB's log


class Ending(Enum):
    """How the learner ends: W&B's exit code and MLflow's status. A resume sets it back."""

    COMPLETE = 0, "FINISHED"
    STOPPED = 255, "KILLED"  # W&B's code of a run that was interrupted
    FAILED = 1, "FAILED"


class Tracker(Protocol):
    """What the feed reports to, from one thread."""

    def holds(self, line: Tracked) -> bool:
        """Tell whether the store has had this line since before it was opened."""

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        """Log a line and sequences of its step, as text. After a failure it is logged again."""

    def close(self, ending: Ending) -> None: ...


def step_scalars(line: StepMetrics) -> Mapping[str, float]:
    """Return the finite scalars and the times of a step under the names that trackers show."""
    phases = {f"time/{name}": seconds for name, seconds in line.phases.items()}
    return {**finite(line.scalars), **phases, MARKERS["step"]: line.step_s}


def evaluation_scalars(line: Evaluation) -> Mapping[str, float]:
    """Return the finite metrics of an evaluation and its accuracy."""
    return finite({**line.metrics, MARKERS["evaluation"]: line.accuracy})


def finite(scalars: Mapping[str, float | None]) -> dict[str, float]:
    """Return the scalars that are finite numbers."""
    return {
        key: value for key, value in scalars.items() if value is not None and math.isfinite(value)
    }


def as_markdown(samples: Sequence[Rollout]) -> str:
    return "\n\n---\n\n".join(
        f"score {s.score}\n\n{s.prompt}\n\n**{s.completion or s.tokens}**" for s in samples
    )


def open_later(run: RunDir, config: Config) -> dict[str, Callable[[], Tracker]]:
    """Return functions that open the trackers that the config asks for, and import their libraries.

    Raises ImportError.
    """
    chosen: dict[str, tuple[str, Callable[[], Tracker]]] = {}
    if config.wandb.mode != "disabled":
        chosen["W&B"] = "wandb", partial(WandbTracker, run, config.wandb)
    if config.tensorboard:
        chosen["TensorBoard"] = "torch.utils.tensorboard", partial(TensorBoardTracker, run)
    if config.mlflow.enabled:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        chosen["MLflow"] = "mlflow.tracking", partial(MlflowTracker, run, config.mlflow)
    if config.trackio.enabled:
        os.environ.setdefault("TRACKIO_DIR", str(run.path / "trackio"))
        chosen["Trackio"] = "trackio", partial(TrackioTracker, run, config.trackio)
    for module, _ in chosen.values():  # not in several threads, which may wait for each other
        importlib.import_module(module)
    return {name: tracker for name, (_, tracker) in chosen.items()}


def _info(run: RunDir) -> RunInfo:
    info = run.info()
    assert info is not None, "the learner starts after run.json is written"
    return info


class WandbTracker:
    """The W&B run has the id of this run, so a requeued run continues in the same one.

    Its internal step is the number of the line. Online, the server says how far it got; offline,
    the files of earlier attempts do.
    """

    def __init__(self, run: RunDir, conf: WandbConf) -> None:
        import wandb

        info = _info(run)
        self._table = wandb.Table
        numbers = (n for path in run.path.glob("wandb/*run-*/*.wandb") for n in wandb_steps(path))
        self._held = max(numbers, default=-1) + 1 if conf.mode == "offline" else 0
        self._run = wandb.init(
            mode=conf.mode,  # type: ignore[arg-type]  # the config check has validated it
            project=conf.project,
            entity=conf.entity,
            group=conf.group,
            tags=conf.tags,
            id=info.id,
            resume="allow",
            name=run.path.name,
            dir=str(run.path),
            config=msgspec.to_builtins(info.config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if conf.mode == "online":
            self._held = self._run.step

    def holds(self, line: Tracked) -> bool:
        return line.number < self._held

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        columns = ["step", "policy_versions", "score", "prompt", "completion"]
        rows = [
            [s.step, str(s.policy_versions), s.score, s.prompt or "", s.completion or str(s.tokens)]
            for s in samples
        ]
        table = {"samples": self._table(columns=columns, data=rows)} if rows else {}
        content = {"step": line.step, **line.scalars, **table}
        self._run.log(content, step=line.number, commit=True)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=ending.value[0])


def wandb_steps(path: Path) -> Iterator[int]:
    """Yield W&B's internal step of each line of history in a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file; one that was cut off by a crash is left out."""
    at, whole = HEADER, b""  # W&B's own header is as long as that of a record
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        if at + HEADER + length > len(data):
            return
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last of several parts
            yield whole
            whole = b""


class TensorBoardTracker:
    """Event files in RUN/tensorboard. What a crash left of a line is purged from the display."""

    def __init__(self, run: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = run.path / "tensorboard"
        self._newest = newest_in_events(directory)
        purge_step = self._newest["step"] + 1 if directory.exists() else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def holds(self, line: Tracked) -> bool:
        return line.step <= self._newest[line.kind]

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        for name, value in line.scalars.items():  # the marker is the last
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, line.step)
        if samples:
            self._writer.add_text("samples", as_markdown(samples), line.step)
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()


def newest_in_events(directory: Path) -> dict[str, int]:
    """Return the newest step of each kind of line that TensorBoard's files have; -1 for none."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    kinds = {marker: kind for kind, marker in MARKERS.items()}
    newest = dict.fromkeys(MARKERS, -1)
    for path in directory.glob("events.*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if (kind := kinds.get(value.tag)) is not None:
                    newest[kind] = max(newest[kind], event.step)
    return newest


class MlflowTracker:
    """A run of an MLflow server, or of an SQLite file in the run directory.

    It is found again by a tag. A line that is logged twice is there once: MLflow ignores a metric
    with the same step, time and value. It has no `@` in names, so pass@4 becomes pass_at_4.
    """

    def __init__(self, run: RunDir, conf: MlflowConf) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        info, home = _info(run), run.path / "mlflow"
        self._metric = Metric
        artifacts = None
        if conf.tracking_uri is None:
            home.mkdir(exist_ok=True)
            artifacts = str(home / "artifacts")
        self._client = MlflowClient(conf.tracking_uri or f"sqlite:///{home}/mlflow.db")
        found = self._client.get_experiment_by_name(conf.experiment)
        experiment = (
            self._client.create_experiment(conf.experiment, artifacts)
            if found is None
            else found.experiment_id
        )
        runs = self._client.search_runs([experiment], f"tags.atropos_hpc = '{info.id}'")
        if runs:
            self._id = runs[0].info.run_id
        else:
            tags = {"atropos_hpc": info.id}
            made = self._client.create_run(experiment, tags=tags, run_name=run.path.name)
            self._id = made.info.run_id
            config = flatten(msgspec.to_builtins(info.config))
            params = [Param(mlflow_name(key), str(value)) for key, value in config.items()]
            self._client.log_batch(self._id, params=params)
        self._client.update_run(self._id, "RUNNING")
        self._newest = {kind: self._newest_step(marker) for kind, marker in MARKERS.items()}

    def _newest_step(self, key: str) -> int:
        history = self._client.get_metric_history(self._id, key)
        return max((metric.step for metric in history), default=-1)

    def holds(self, line: Tracked) -> bool:
        return line.step <= self._newest[line.kind]

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        at = int(line.time * 1000)
        scalars = line.scalars.items()
        metrics = [self._metric(mlflow_name(key), value, at, line.step) for key, value in scalars]
        self._client.log_batch(self._id, metrics=metrics)
        if samples:
            name = f"samples/step-{line.step}.md"
            self._client.log_text(self._id, as_markdown(samples), name)

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, ending.value[1])


def mlflow_name(key: str) -> str:
    """Return a metric's name as MLflow takes it.

    >>> mlflow_name("eval/sums/pass@4"), mlflow_name("env/a+b/x")
    ('eval/sums/pass_at_4', 'env/a_b/x')
    """
    return re.sub(r"[^\w./: -]", "_", key.replace("@", "_at_"))


class TrackioTracker:
    """A project in Trackio's SQLite file in RUN/trackio, or where TRACKIO_DIR says."""

    def __init__(self, run: RunDir, conf: TrackioConf) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        info = _info(run)
        name = f"{run.path.name}-{info.id}"
        self._markdown = trackio.Markdown
        logs = SQLiteStorage.get_logs(conf.project, name)
        self._newest = {
            kind: max((each["step"] for each in logs if marker in each), default=-1)
            for kind, marker in MARKERS.items()
        }
        self._run = trackio.init(
            conf.project,
            name=name,
            resume="allow",
            config=msgspec.to_builtins(info.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def holds(self, line: Tracked) -> bool:
        return line.step <= self._newest[line.kind]

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        text = {"samples": self._markdown(as_markdown(samples))} if samples else {}
        self._run.log({**line.scalars, **text}, step=line.step)

    def close(self, ending: Ending) -> None:
        self._run.finish()
