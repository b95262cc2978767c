"""The figures of a run: one line per optimizer step in metrics.jsonl, the same to W&B, and the time each phase took.

metrics.jsonl is the source for status, report and summary. A step that is done again after a crash replaces its old line, so
every step stands there once.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from atropos_hpc.config import WandbConf
from atropos_hpc.run_dir import RunDir, append_line, read_json, read_lines, write_file


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
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()} | {"time/step": now - self._since}
        self._seconds, self._since = {}, now
        return taken


class Metrics:
    """The writer, on the learner's rank 0. `resume_at`: the step the learner starts from; lines after it are of lost steps."""

    def __init__(self, run: RunDir, wandb: WandbConf, resume_at: int) -> None:
        self.run = run
        kept = [line for line in read_lines(run.metrics) if line["step"] <= resume_at]
        write_file(run.metrics, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
        self._evaluations = 0
        self._wandb = _start_wandb(run, wandb, resume_at) if wandb.mode != "disabled" else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's figures; with the accuracy of the last held-out evaluation, and its version, if one has come in since the last."""
        evaluations = self._new_evaluations()
        if evaluations:
            values = {**values, "accuracy": evaluations[-1]["accuracy"], "accuracy_version": evaluations[-1]["version"]}
        append_line(self.run.metrics, {"step": step, "time": time.time(), **values})
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def _new_evaluations(self) -> list[dict[str, Any]]:
        """What has come in since the last call; passed on to W&B at the version it is of."""
        lines = read_lines(self.run.evaluations)
        new = [line for line in lines[self._evaluations :] if line.get("accuracy") is not None]
        self._evaluations = len(lines)
        if self._wandb is not None:
            for line in new:
                self._wandb.log({"step": line["version"], "evaluation/accuracy": line["accuracy"], **line["metrics"]})
        return new

    def close(self) -> None:
        """Pass on what is left, and end the W&B run."""
        if self._wandb is not None:
            self._new_evaluations()
            self._wandb.finish()


def _start_wandb(run: RunDir, conf: WandbConf, resume_at: int) -> Any:
    """One W&B run per training run, over all its restarts: its id is the run's."""
    import wandb  # slow, and only where it is used

    about = read_json(run.run_json)
    started = wandb.init(
        mode=conf.mode,  # type: ignore[arg-type]  # one of the three, says the config check
        project=conf.project, entity=conf.entity, group=conf.group, tags=conf.tags, id=about["id"], resume="allow",
        name=run.path.name, dir=str(run.path), config=about["config"],
    )  # fmt: skip
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started
