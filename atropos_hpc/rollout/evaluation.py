"""Held-out accuracy during a run: the environments' own `evaluate`, at the policy versions due.

    python -m atropos_hpc.rollout.evaluation --run-dir R

There is one process per run. Due are the version that the run starts from (evaluation.before; the
learner waits for it, so it is measured on exactly that version), every multiple of
evaluation.every, and the last (evaluation.after). For each, in order, it waits until all servers
serve that version or a later one, evaluates, and appends a line to evaluations.jsonl. Training does
not wait, so the line says which versions generated. Versions that training has passed meanwhile are
skipped, except the last; so are versions that have a line, which makes the process restartable.

In a run with several environments each is evaluated in turn. The accuracy is that of the first; the
metrics of the others carry their names.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from atropos_hpc.config import EvaluationConf, environment_name, environments
from atropos_hpc.contracts.members import EvaluatorState, Wait
from atropos_hpc.contracts.metrics import Evaluation, finite_numbers
from atropos_hpc.rollout.environment_process import (
    leave_out_torch,
    quiet_atropos,
    run_member,
    seed_everything,
)
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records

if TYPE_CHECKING:
    from atropos_hpc.rollout.stamping import Sampled

log = logging.getLogger(__name__)

POLL_S = 0.1
# Metrics that get the name of their environment.
NAMED = ("eval/pass@", "eval/length_mean", "eval/strict_", "eval/flexible_", "eval/sampled_")


def next_due(conf: EvaluationConf, served: int, last: int, done: set[int]) -> int | None:
    """Return the version to evaluate next, None when all is done.

    `served` is the version served now, `last` the run's last, `done` the versions that have a line.
    The answer may be ahead of `served`. Of several that are not, it is the newest; but the first
    evaluation of a run is of the version that is served.
    """
    if conf.before and not done:
        return min(served, last)
    due = set(range(conf.every, last, conf.every)) if conf.every else set()
    due |= {last} if conf.after else set()
    # Of a run that has resumed at an earlier checkpoint, later versions may have a line, too.
    newest = max((version for version in done if version <= served), default=-1)
    due = {version for version in due - done if version > newest}
    reached = [version for version in due if version <= served]
    return max(reached) if reached else min(due, default=None)


def numbers(metrics: Mapping[str, object]) -> dict[str, float | None]:
    """Return the finite numbers among an environment's metrics, except those about training."""
    found = finite_numbers(metrics)
    return {name: value for name, value in found.items() if not name.startswith("train")}


def with_name(metrics: Mapping[str, float | None], name: str) -> dict[str, float | None]:
    """Return the metrics of `NAMED` under the name of their environment.

    >>> with_name({"eval/pass@4": 0.5, "eval/percent_correct": 0.25}, "sums")
    {'eval/sums/pass@4': 0.5, 'eval/percent_correct': 0.25}
    """
    return {
        f"eval/{name}/{key[5:]}" if key.startswith(NAMED) else key: value
        for key, value in metrics.items()
    }


def mean_lengths(sampled: Sequence["Sampled"]) -> dict[str, float]:
    """Return the mean number of tokens of the answers; of sampled ones apart from greedy ones."""
    greedy = [len(each.tokens) for each in sampled if each.temperature == 0]
    others = [len(each.tokens) for each in sampled if each.temperature != 0]
    parts = {"eval/length_mean": greedy or others}
    if greedy:
        parts["eval/sampled_length_mean"] = others
    return {name: sum(part) / len(part) for name, part in parts.items() if part}


def as_evaluator(environment: type[Any]) -> type[Any]:
    """Make the class that evaluates on the run's servers and keeps its metrics in `reported`.

    Environments report with `evaluate_log` or in `wandb_log`, which ends in BaseEnv's. `Reported`
    is between an environment and BaseEnv in the MRO, so it is the environment's `super()`.
    """
    from atroposlib.envs.base import BaseEnv

    from atropos_hpc.rollout.vllm_client import VllmServer

    class Reported(BaseEnv):
        reported: dict[str, object]

        async def evaluate_log(
            self, metrics: dict[str, object], *args: object, **kwargs: object
        ) -> None:
            self.reported |= metrics
            if self.config.data_dir_to_save_evals is not None:
                await super().evaluate_log(metrics, *args, **kwargs)

        async def wandb_log(self, wandb_metrics: dict[str, object] | None = None) -> None:
            self.reported |= wandb_metrics or {}
            await super().wandb_log(wandb_metrics)

    return type(
        f"{environment.__name__}Evaluator",
        (environment, Reported),
        {"server_cls": VllmServer, "__doc__": environment.__doc__},
    )


async def evaluate(env: Any, version: int, timeout_s: float) -> Evaluation:
    """Evaluate once. Raises what the environment raises, and TimeoutError."""
    from atropos_hpc.rollout.stamping import record_generations

    env.reported = {}
    try:
        with record_generations(for_training=False) as sampled:
            async with asyncio.timeout(timeout_s):
                await env.evaluate()
                await asyncio.gather(*env.eval_workers)
    finally:
        for left in list(env.eval_workers):
            left.cancel()
    pending = getattr(env, "eval_metrics", None)
    if isinstance(pending, list):  # most environments put (name, value) there, for wandb_log
        pairs = (item for item in pending if isinstance(item, tuple | list) and len(item) == 2)
        env.reported |= {name: value for name, value in pairs}
    await env.wandb_log()
    versions = [version for each in sampled for version in each.versions]
    metrics = numbers(env.reported)
    metrics |= mean_lengths(sampled)
    return Evaluation(
        version,
        metrics=metrics,
        sequences=len(sampled),
        served=(min(versions), max(versions)) if versions else None,
    )


class Evaluator:
    """The evaluations of one run."""

    def __init__(self, run: RunDir, member: Member[EvaluatorState]) -> None:
        config = run.config()
        self.run, self.member, self.config = run, member, config
        self.metric = config.environment.metric
        self.conf = config.evaluation
        self.last = config.trainer.steps

    def build(self) -> Mapping[str, Any]:
        """Build each environment, by its key. Raises TargetError."""
        from atropos_hpc.rollout import env_loader

        seed_everything(self.config.seed)
        env_loader.patch_atropos()
        quiet_atropos()
        built = {}
        for key in environments(self.config):
            environment, env_config, servers = env_loader.of_run(self.run, key, self.config.seed)
            # Hundreds of requests are sent at once and queue: evaluation.timeout_s bounds them all.
            for server in servers:
                server.timeout = max(server.timeout, round(self.conf.timeout_s))
            built[key] = as_evaluator(environment)(env_config, servers, slurm=False)
        return built

    async def work(self) -> None:
        """Evaluate until the last due version is done."""
        envs = self.build()
        for env in envs.values():
            await env.setup()
        pool = envs["environment"].server.servers[0].pool
        pool.watch()
        try:
            while True:
                served, due = pool.served_version(), None
                if served is not None:
                    done = {line.version for line in self._lines()}
                    due = next_due(self.conf, served, self.last, done)
                    if due is None:
                        return
                if served is None or due is None or due > served:
                    self._show_wait(due)
                    await asyncio.sleep(POLL_S)
                    continue
                await self.evaluate_all(envs, due)
        finally:
            await pool.close()

    def _lines(self) -> list[Evaluation]:
        return read_records(self.run.evaluations, Evaluation)

    def _show_wait(self, due: int | None) -> None:
        """Show the wait in the roster. It has no deadline: it lasts as long as training takes."""
        what, from_whom = f"policy version {due}", "the learner"
        if due is None:
            what, from_whom = "a vLLM server", "the node agents"
        self.member.update_if_changed(state="idle")
        self.member.show_wait(Wait(what, from_whom, time.time()))

    async def evaluate_all(self, envs: Mapping[str, Any], version: int) -> None:
        """Evaluate all environments and append the line.

        A failed evaluation is reported in the line, and not repeated.
        """
        self.member.update(state=f"evaluating version {version}", waiting=None)
        start, line = time.time(), Evaluation(version)
        for key, env in envs.items():
            try:
                found = await evaluate(env, version, self.conf.timeout_s)
            except Exception as error:  # whatever the environment raises
                log.exception("evaluation of version %d failed on %s", version, key)
                line = replace(line, error=f"{key}: {error!r}")
                continue
            name = environment_name(key)
            served, metrics = found.served, with_name(found.metrics, name)
            log.info("version %d on %s, generated by %s: %s", version, key, served, metrics)
            if key == "environment":
                line = replace(
                    line,
                    accuracy=self._accuracy(found),
                    metrics={**line.metrics, **metrics},
                    sequences=found.sequences,
                    served=served,
                )
            else:
                others = {
                    metric if metric.startswith(f"eval/{name}/") else f"{name}/{metric}": value
                    for metric, value in metrics.items()
                }
                line = replace(line, metrics={**line.metrics, **others})
        if any(each.version == version for each in self._lines()):
            return  # another node has taken over
        now = time.time()
        append_record(self.run.evaluations, replace(line, wall_s=round(now - start, 3), time=now))

    def _accuracy(self, found: Evaluation) -> float | None:
        """Return the metric that environment.metric names; None if it is not reported."""
        if self.metric not in found.metrics:
            log.warning(
                "environment.metric=%s is not among the environment's metrics (%s): this "
                "evaluation has no accuracy",
                self.metric,
                ", ".join(sorted(found.metrics)) or "none",
            )
        return found.metrics.get(self.metric)


def main() -> int:
    """Run the evaluator's process."""
    process.die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    options = parser.parse_args()
    process.log_to_stderr()
    run = RunDir(options.run_dir)
    config = run.config()
    leave_out_torch(config, *environments(config))
    member = Member(run, EvaluatorState(), os.environ.get(process.NODE, "local"))
    return run_member(member, lambda: Evaluator(run, member).work())


if __name__ == "__main__":
    sys.exit(main())
