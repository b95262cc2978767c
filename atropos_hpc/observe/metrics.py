"""The figures of a run: one line per optimizer step in metrics.jsonl, the same to W&B or TensorBoard, and the time each phase took.

metrics.jsonl is the source for status, report and summary. A step that is done again after a crash replaces its old line, so
every step stands there once.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from atropos_hpc.config import WandbConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.observe import samples
from atropos_hpc.observe.trackers import Sink, TensorBoard, Wandb
from atropos_hpc.runtime.run_dir import RunDir, append_line, read_lines, write_file


class Phases:
    """Seconds spent in each named phase since the last `take`. Wraps steps from outside: `with phases("wait"): ...`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def take(self) -> dict[str, float]:
        """{"time/<phase>": s, ..., "time/step": s since the last take}, and start anew."""
        now = time.monotonic()
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()} | {
            "time/step": now - self._since
        }
        self._seconds, self._since = {}, now
        return taken


class Metrics:
    """The writer, on the learner's rank 0. `resume_at`: the step the learner starts from; lines after it are of lost steps."""

    def __init__(self, run: RunDir, sinks: Sequence[Sink], resume_at: int) -> None:
        self.run, self._sinks = run, sinks
        for path, key in (
            (run.metrics, "step"),
            (run.samples, "version"),
        ):  # what is trained on at version k makes step k + 1
            kept = [line for line in read_lines(path) if line[key] < resume_at + (key == "step")]
            write_file(path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
        self._evaluations = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's figures; with the accuracy of the last held-out evaluation, and its version, if one has come in since the last."""
        evaluations = self._new_evaluations()
        if evaluations:
            values = {
                **values,
                "accuracy": evaluations[-1]["accuracy"],
                "accuracy_version": evaluations[-1]["version"],
            }
        append_line(self.run.metrics, {"step": step, "time": time.time(), **values})
        for sink in self._sinks:
            sink.figures(step, values)

    def sample(self, version: int, steps: int, groups: Sequence[Group]) -> None:
        """Keep some of what is trained on at this version, now and then in a run of so many steps."""
        if not groups or not samples.due(version, steps):
            return
        lines = samples.choose(groups[0], version)
        for line in lines:
            append_line(self.run.samples, line)
        if self._sinks:
            rows = samples.decoded(lines, self.run.config().model.path or "")
            for sink in self._sinks:
                sink.samples(rows)

    def _new_evaluations(self) -> list[dict[str, Any]]:
        """What has come in since the last call; passed on at the version it is of."""
        lines = read_lines(self.run.evaluations)
        new = [line for line in lines[self._evaluations :] if line.get("accuracy") is not None]
        self._evaluations = len(lines)
        for line in new:
            for sink in self._sinks:
                sink.evaluation(line)
        return new

    def close(self) -> None:
        """Pass on what is left, and end the sinks."""
        if self._sinks:
            self._new_evaluations()
        for sink in self._sinks:
            sink.close()


def sinks(run: RunDir, wandb: WandbConf, tensorboard: bool, resume_at: int) -> list[Sink]:
    """Those that the config asks for."""
    chosen: list[Sink] = []
    if wandb.mode != "disabled":
        chosen.append(Wandb(run, wandb))
    if tensorboard:
        chosen.append(TensorBoard(run, resume_at))
    return chosen
