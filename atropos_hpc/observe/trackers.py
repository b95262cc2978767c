"""Where figures go besides metrics.jsonl: Weights & Biases, TensorBoard. Each shows one run, over all its restarts and requeues."""

from collections.abc import Mapping
from typing import Any, Protocol

from atropos_hpc.config import WandbConf
from atropos_hpc.runtime.run_dir import RunDir, read_json


class Sink(Protocol):
    """What the learner's rank 0 passes on. Steps are policy versions."""

    def figures(self, step: int, values: Mapping[str, float]) -> None: ...

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A line of evaluations.jsonl, at the version it is of, which others may have passed."""

    def samples(self, rows: list[dict[str, Any]]) -> None:
        """Decoded samples: observe/samples.py."""

    def close(self) -> None: ...


class Wandb:
    """Its id is the run's, so that a requeued run goes on in the same one; the points of a sweep are a group."""

    def __init__(self, run: RunDir, conf: WandbConf) -> None:
        import wandb  # slow, and only where it is used

        about = read_json(run.run_json)
        self._table = wandb.Table
        self._run = wandb.init(
            mode=conf.mode,  # type: ignore[arg-type]  # one of the three, says the config check
            project=conf.project, entity=conf.entity, group=conf.group, tags=conf.tags, id=about["id"], resume="allow",
            name=run.path.name, dir=str(run.path), config=about["config"],
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._run.log(
            {"step": line["version"], "evaluation/accuracy": line["accuracy"], **line["metrics"]}
        )

    def samples(self, rows: list[dict[str, Any]]) -> None:
        columns = ["version", "policy_versions", "score", "prompt", "completion"]
        data = [
            [
                str(row[name]) if name in ("policy_versions", "prompt", "completion") else row[name]
                for name in columns
            ]
            for row in rows
        ]
        self._run.log(
            {"step": rows[0]["version"], "samples": self._table(columns=columns, data=data)}
        )

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard. What an earlier attempt wrote of steps that are done again is taken off the screen."""

    def __init__(self, run: RunDir, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow, and only where it is used

        self._writer = SummaryWriter(
            str(run.path / "tensorboard"), purge_step=resume_at + 1 if resume_at else None
        )

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._writer.add_scalar("evaluation/accuracy", line["accuracy"], line["version"])

    def samples(self, rows: list[dict[str, Any]]) -> None:
        text = "\n\n---\n\n".join(
            f"score {row['score']:g}\n\n{row['prompt']}\n\n**{row['completion']}**" for row in rows
        )
        self._writer.add_text("samples", text, rows[0]["version"])

    def close(self) -> None:
        self._writer.close()
