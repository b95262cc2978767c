"""Held-out accuracy while a run goes on: the environments' own `evaluate`, at the policy versions that are due.

    python -m atropos_hpc.rollout.evaluation --run-dir R

One process per run. Due are the version that the run starts from (evaluation.before; the learner waits for this one, so
that it is measured on just that version), every multiple of evaluation.every, and the last (evaluation.after). For each, in order:
wait until all servers serve it or a later one, evaluate, and append a line to evaluations.jsonl. Training does not wait, so the line
tells which versions really generated. Versions that training has passed meanwhile are left out, the last never. Versions that have
a line already are left out too, so the process can be started again at any time. It ends with the last.

Of a run with several environments each is evaluated, one after the other. The accuracy is that of the first, and the others' metrics bear
their names.
"""

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
import time
from numbers import Number
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from atropos_hpc.config import EvaluationConf, environment_name, environments
from atropos_hpc.contracts.members import EvaluatorState, Wait
from atropos_hpc.contracts.metrics import Evaluation
from atropos_hpc.rollout.env_worker import live, quiet_atropos, seed_everything
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records

log = logging.getLogger(__name__)

POLL_S = 0.1


def next_due(conf: EvaluationConf, served: int, last: int, done: set[int]) -> int | None:
    """The version to evaluate next, given the one that is served now, or None when all is done.

    `last`: the run's last version. `done`: versions that have a line. The answer may lie ahead of `served`; of several that do not, it is
    the newest, except that a run's first evaluation, with nothing done yet, is of what is served.
    """
    if conf.before and not done:
        return min(served, last)
    due = set(range(conf.every, last, conf.every)) if conf.every else set()
    due |= {last} if conf.after else set()
    due = {version for version in due - done if version > max(done, default=-1)}
    reached = [version for version in due if version <= served]
    return max(reached) if reached else min(due, default=None)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The finite numbers among an environment's metrics, without those about training."""
    found = {}
    for name, value in metrics.items():
        if hasattr(value, "item") and getattr(value, "size", 1) == 1:  # numpy's and torch's scalars
            value = value.item()
        if (
            isinstance(value, Number)
            and not name.startswith("train")
            and math.isfinite(float(value))  # type: ignore[arg-type]
        ):
            found[name] = float(value)  # type: ignore[arg-type]
    return found


def as_evaluator(environment: type[Any]) -> type[Any]:
    """The class with the run's servers, and with its metrics kept in `reported` instead of sent to Weights & Biases.

    Environments report by `evaluate_log`, or in `wandb_log`, which ends in BaseEnv's. `Reported` comes between an environment and
    BaseEnv in the order of resolution, so it is what the environment's `super()` finds.
    """
    from atroposlib.envs.base import BaseEnv

    from atropos_hpc.rollout.vllm_client import VllmServer

    class Reported(BaseEnv):
        reported: dict[str, Any]

        async def evaluate_log(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self.reported |= metrics
            if self.config.data_dir_to_save_evals is not None:
                await super().evaluate_log(metrics, *args, **kwargs)

        async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
            self.reported |= wandb_metrics or {}
            await super().wandb_log(wandb_metrics)

    return type(
        f"{environment.__name__}Evaluator",
        (environment, Reported),
        {"server_cls": VllmServer, "__doc__": environment.__doc__},
    )


async def evaluate(env: Any, timeout_s: float) -> dict[str, Any]:
    """One evaluation: its metrics, which versions generated, how many sequences. Raises what the environment raises, and TimeoutError."""
    from atropos_hpc.rollout.stamping import record_generations

    async def complete() -> None:
        await env.evaluate()
        if env.eval_workers:
            await asyncio.gather(*env.eval_workers)

    env.reported = {}
    with record_generations() as generations:
        await asyncio.wait_for(complete(), timeout_s)
    kept = getattr(env, "eval_metrics", None)
    if isinstance(
        kept, list
    ):  # most environments put (name, value) there, for their wandb_log to send
        env.reported |= {
            item[0]: item[1] for item in kept if isinstance(item, tuple | list) and len(item) == 2
        }
    await env.wandb_log()
    versions = [version for generation in generations for version in generation.versions]
    return {
        "served": (min(versions), max(versions)) if versions else None,
        "metrics": numbers(env.reported),
        "sequences": len(generations),
    }


def accuracy(metrics: dict[str, float], name: str) -> float | None:
    """The metric that environment.metric names; None, with a warning, when the environment does not report it."""
    if name not in metrics:
        log.warning(
            "environment.metric=%s is not among the environment's metrics: %s",
            name,
            ", ".join(sorted(metrics)) or "none",
        )
    return metrics.get(name)


class Evaluator:
    """The evaluations of one run."""

    def __init__(self, run: RunDir, member: Member) -> None:
        config = run.config()
        self.run, self.member, self.config = run, member, config
        self.metric = config.environment.metric
        self.conf = config.evaluation
        self.last = config.trainer.steps

    def build(self) -> dict[str, Any]:
        """Each environment, by its key. Raises TargetError when one cannot be used as configured."""
        from atropos_hpc.rollout import env_loader

        seed_everything(self.config.seed)
        env_loader.patch_chat_templates()
        quiet_atropos()
        built = {}
        for key in environments(self.config):
            environment, env_config, servers = env_loader.of_run(self.run, key, self.config.seed)
            built[key] = as_evaluator(environment)(env_config, servers, slurm=False)
        return built

    async def work(self) -> None:
        """Until the last due version has been evaluated."""
        envs = self.build()
        for env in envs.values():
            await env.setup()
        pool = envs["environment"].server.servers[0].pool
        pool.watch()
        try:
            while True:
                served = pool.served_version()
                done = {line.version for line in read_records(self.run.evaluations, Evaluation)}
                due = None if served is None else next_due(self.conf, served, self.last, done)
                if served is not None and due is None:
                    return
                if due is None or served is None or due > served:
                    self._show_wait(due)
                    await asyncio.sleep(POLL_S)
                    continue
                await self.line(envs, due)
        finally:
            await pool.close()

    def _show_wait(self, due: int | None) -> None:
        """Shown in the roster. It lasts as long as training takes, for which the supervisor has its own deadlines."""
        what, whom = (
            ("a vLLM server", "the node agents")
            if due is None
            else (f"policy version {due}", "the learner")
        )
        self.member.update_if_changed(state="idle")
        self.member.show_wait(Wait(what, whom, time.time()))

    async def line(self, envs: dict[str, Any], version: int) -> None:
        """Evaluate, and append the line. One that failed gets a line with the error: it is not tried again."""
        self.member.update(state=f"evaluating version {version}", waiting=None)
        start = time.time()
        line = Evaluation(version)
        for key, env in envs.items():
            try:
                found = await evaluate(env, self.conf.timeout_s)
            except Exception as error:  # whatever the environment raises
                log.exception("the evaluation of version %d failed on %s", version, key)
                line = replace(line, error=f"{key}: {error!r}")
                continue
            log.info(
                "version %d on %s: %s, by versions %s",
                version,
                key,
                found["metrics"],
                found["served"],
            )
            if key == "environment":
                value = accuracy(found["metrics"], self.metric)
                metrics = {**line.metrics, **found["metrics"]}
                line = replace(line, **{**found, "metrics": metrics}, accuracy=value)
            else:
                name = environment_name(key)
                others = {f"{name}/{metric}": value for metric, value in found["metrics"].items()}
                line = replace(line, metrics={**line.metrics, **others})
        known = read_records(self.run.evaluations, Evaluation)
        if any(each.version == version for each in known):
            return  # another node had taken the evaluation over
        now = time.time()
        append_record(self.run.evaluations, replace(line, wall_s=round(now - start, 3), time=now))


def main() -> int:
    process.die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    options = parser.parse_args()
    process.log_to_stderr()
    run = RunDir(options.run_dir)
    member = Member(run, EvaluatorState(), os.environ.get("ATROPOS_HPC_NODE", "local"))
    return live(member, lambda: Evaluator(run, member).work())


if __name__ == "__main__":
    sys.exit(main())
