"""Experiment trackers: Weights & Biases, TensorBoard.

Each shows one run over all its attempts. Steps are policy versions. A run that resumes makes some
steps again: TensorBoard purges those and shows the new ones; W&B cannot, and keeps the first ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from atropos_hpc.config import WandbConf
from atropos_hpc.contracts.metrics import Evaluation, Rollout, StepMetrics
from atropos_hpc.runtime.run_dir import RunDir


class Tracker(Protocol):
    """What the learner's rank 0 reports to. `again`: an earlier attempt has reported it."""

    def step(self, line: StepMetrics, again: bool = False) -> None: ...

    def evaluation(self, evaluation: Evaluation, again: bool = False) -> None:
        """Report an evaluation at its own version; later steps may have been reported before."""

    def samples(self, samples: Sequence[Rollout], again: bool = False) -> None:
        """Report sequences of one step, as text where they could be decoded."""

    def close(self) -> None: ...


def flat_scalars(line: StepMetrics) -> Mapping[str, float]:
    """Return the finite scalars and the times of a step under the names that trackers show."""
    scalars = {
        name: value
        for name, value in line.scalars.items()
        if value is not None and math.isfinite(value)
    }
    phases = {f"time/{name}": seconds for name, seconds in line.phases.items()}
    return {**scalars, **phases, "time/step": line.step_s}


class WandbTracker:
    """The W&B run has the id of this run, so a requeued run continues in the same one."""

    def __init__(self, run: RunDir, conf: WandbConf) -> None:
        import wandb  # slow, and needed only here

        info = run.info()
        assert info is not None, "the learner starts after run.json is written"
        self._table = wandb.Table
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

    def step(self, line: StepMetrics, again: bool = False) -> None:
        if not again:
            self._run.log({"step": line.step, **flat_scalars(line)})

    def evaluation(self, evaluation: Evaluation, again: bool = False) -> None:
        if again:
            return
        accuracy = {"step": evaluation.version, "eval/accuracy": evaluation.accuracy}
        self._run.log({**accuracy, **evaluation.metrics})

    def samples(self, samples: Sequence[Rollout], again: bool = False) -> None:
        if again:
            return
        columns = ["step", "policy_versions", "score", "prompt", "completion"]
        rows = [
            [s.step, str(s.policy_versions), s.score, s.prompt or "", s.completion or str(s.tokens)]
            for s in samples
        ]
        table = self._table(columns=columns, data=rows)
        self._run.log({"step": samples[0].step, "samples": table})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """Event files in RUN/tensorboard. Steps that are repeated are purged from the display."""

    def __init__(self, run: RunDir, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and needed only here

        self._resume_at = resume_at
        purge_step = resume_at + 1 if resume_at else None
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge_step)

    def step(self, line: StepMetrics, again: bool = False) -> None:
        for name, value in flat_scalars(line).items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, line.step)

    def evaluation(self, evaluation: Evaluation, again: bool = False) -> None:
        if again and evaluation.version <= self._resume_at:  # was not purged
            return
        scalars = {"eval/accuracy": evaluation.accuracy, **evaluation.metrics}
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, evaluation.version)

    def samples(self, samples: Sequence[Rollout], again: bool = False) -> None:
        text = "\n\n---\n\n".join(
            f"score {s.score}\n\n{s.prompt}\n\n**{s.completion or s.tokens}**" for s in samples
        )
        self._writer.add_text("samples", text, samples[0].step)

    def close(self) -> None:
        self._writer.close()
