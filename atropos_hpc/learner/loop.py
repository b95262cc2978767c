"""The training loop. One optimizer step is

    1. wait for the batch that the trajectory server has formed for this policy version (leased ahead, while the step before ran)
    2. turn groups into flat token arrays, with advantages
    3. log-probs of the old policy and of the frozen reference, where the groups lack them; what these say about weights and rewards
    4. update: forward, loss, backward, optimizer
    5. publish the new version, in the background of the next step
    6. checkpoint now and then, in the background; acknowledge the batches that the checkpoint before it already holds
    7. write the figures

Batch k is trained at policy version k and makes version k + 1. A learner that dies goes back to its last durable step s, and
leases batches s, s+1, ... again, the same ones: no group is lost, and none counts twice in the weights that survive.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from atropos_hpc.config import AlgorithmConf, EvaluationConf, LaunchConf, ModelConf, TrainerConf
from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.members import Done, TrainerState
from atropos_hpc.contracts.metrics import Evaluation
from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.learner.batch import make_batch
from atropos_hpc.learner.checkpoint import Checkpoints
from atropos_hpc.learner.collective import StopAsked, Together
from atropos_hpc.learner.importance import correct
from atropos_hpc.learner.kl import Coefficient, penalize
from atropos_hpc.learner.publisher import Publisher
from atropos_hpc.observe.metrics import MetricsWriter, Phases, StepTimes
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.run_dir import RunDir, read_records, write_struct
from atropos_hpc.trajectories.client import TrajectoryClient

log = logging.getLogger(__name__)

LEASE_WAIT_S = 5.0  # one long poll; a lease is asked for again until it is there


@dataclass(frozen=True)
class Conf:
    """The sections that the loop itself reads."""

    model: ModelConf
    algorithm: AlgorithmConf
    trainer: TrainerConf
    evaluation: EvaluationConf
    launch: LaunchConf
    staleness_max: int
    environments: tuple[str, ...] = ()  # names, where there are several


class Batches:
    """This rank's groups of each batch, leased in a thread, one batch ahead: share `rank` of `world`. `client` is the thread's own."""

    def __init__(self, client: TrajectoryClient, rank: int, world: int, staleness_max: int) -> None:
        self.client, self.rank, self.world, self.staleness_max = client, rank, world, staleness_max
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lease")
        self._leased: Future[tuple[list[Group], dict[str, Any]]] | None = None
        self._closed = False

    def ask(self, number: int, version: int) -> None:
        """Start leasing batch `number`, to be trained at that version; the learner is at `version` now."""
        self._leased = self._thread.submit(self._lease, number, version)

    def ready(self) -> bool:
        """Is the batch here (or has leasing it failed)?"""
        assert self._leased is not None
        return self._leased.done()

    def take(self) -> tuple[list[Group], dict[str, Any]]:
        """The groups, and the trajectory server's figures at that moment. Raises what leasing raised."""
        assert self._leased is not None
        return self._leased.result()

    def _lease(self, number: int, version: int) -> tuple[list[Group], dict[str, Any]]:
        oldest = number - self.staleness_max
        while not self._closed:
            groups = self.client.lease(
                number, self.rank, self.world, oldest=oldest, version=version, wait_s=LEASE_WAIT_S
            )
            if groups is not None:
                status = self.client.status() if self.rank == 0 else None
                return groups, msgspec.structs.asdict(status) if status else {}
        return [], {}

    def close(self) -> None:
        """Leave a lease under way to its end."""
        self._closed = True
        self._thread.shutdown(wait=False)


def train(
    conf: Conf,
    run: RunDir,
    backend: Backend,
    client: TrajectoryClient,
    batches: Batches,
    checkpoints: Checkpoints,
    publishing: Publisher,
    metrics: MetricsWriter | None,
    together: Together,
    member: Member[TrainerState],
    kl: Coefficient,
) -> bool:
    """From the backend's present step to the last. True: the run is complete; False: it was asked to stop, and has saved.

    Collective. `metrics` is rank 0's. Raises TimeoutError when a batch does not come in time.
    """
    phases = Phases()
    try:
        publishing.publish(backend, backend.step_count)
        _evaluated(run, 0, conf.evaluation.before and backend.step_count == 0, conf, together)
        batches.ask(backend.step_count, backend.step_count)
        patience = conf.launch.start_timeout_s
        while (version := backend.step_count) < conf.trainer.steps:
            member.update(state="training", step=version)
            with phases("wait"):
                together.wait(f"batch {version}", "the trajectory server", batches.ready, patience)
                groups, server = batches.take()
            patience = conf.launch.step_timeout_s
            if version + 1 < conf.trainer.steps:
                batches.ask(version + 1, version)
            with phases("batch"):
                budget, copies = (
                    conf.trainer.tokens_per_micro_batch,
                    backend.world // backend.data_world,
                )
                batch = make_batch(
                    groups,
                    conf.algorithm,
                    budget,
                    conf.model.max_length,
                    version,
                    copies,
                    conf.environments,
                )
            with phases("log_probs"):
                if batch.needs_log_probs:
                    batch.set_old_log_probs(backend.log_probs(batch))
                if batch.needs_reference:
                    batch.set_reference_log_probs(backend.reference_log_probs(batch))
                off_policy = correct(batch, conf.algorithm.correction)
                penalty = penalize(batch, groups, conf.algorithm, kl.value)
            with phases("update"):
                updated = {
                    **off_policy,
                    **penalty,
                    **backend.update(batch, kl.value),
                    "kl_coef": kl.value,
                }
            kl.update(updated.get("kl_reference"))
            with phases("publish"):
                publishing.publish(backend, version + 1)
            with phases("checkpoint"):
                if (version + 1) % conf.trainer.checkpoint_every == 0:
                    checkpoints.save(backend, {"kl_coef": kl.value})
                _acknowledge(client, checkpoints.durable(), checkpoints.safe, backend.rank)
            if metrics is not None:
                metrics.sample(version, conf.trainer.steps, groups)
                times = phases.take()
                scalars = _scalars(
                    batch.statistics.metrics(), updated, times, server, conf.staleness_max
                )
                metrics.write(version + 1, scalars, times)
            together.check()
        _save_now(backend, client, checkpoints, publishing, kl)
        _evaluated(run, backend.step_count, conf.evaluation.after, conf, together)
    except StopAsked:
        log.info("asked to stop at step %d: saving", backend.step_count)
        _save_now(backend, client, checkpoints, publishing, kl)
        return False
    finally:
        batches.close()
    if backend.rank == 0:
        write_struct(run.done, Done(version=backend.step_count))
    return True


def _acknowledge(client: TrajectoryClient, durable: int | None, safe: int, rank: int) -> None:
    """When a step has become durable, tell the trajectory server which batches nobody will go back to before."""
    if durable is not None and safe > 0 and rank == 0:
        client.ack(safe - 1)


def _save_now(
    backend: Backend,
    client: TrajectoryClient,
    checkpoints: Checkpoints,
    publishing: Publisher,
    kl: Coefficient,
) -> None:
    """Make the present step durable, and its version public, before anything else."""
    publishing.wait()
    if (
        publishing.newest != backend.step_count
    ):  # it failed: once more, now that nothing else is written
        publishing.publish(backend, backend.step_count)
        publishing.wait()
    durable = checkpoints.wait()
    if durable != backend.step_count:
        checkpoints.save(backend, {"kl_coef": kl.value})
        durable = checkpoints.wait()
    _acknowledge(client, durable, checkpoints.safe, backend.rank)


def _evaluated(run: RunDir, version: int, wanted: bool, conf: Conf, together: Together) -> None:
    """Wait for the held-out evaluation of a version. Training before the first one would change what it evaluates."""
    if wanted:
        there = lambda: any(e.version == version for e in read_records(run.evaluations, Evaluation))  # noqa: E731
        together.wait(
            f"the evaluation of version {version}",
            "the evaluator",
            there,
            conf.evaluation.timeout_s,
        )


def _scalars(
    batch: dict[str, float],
    updated: dict[str, float],
    times: StepTimes,
    server: dict[str, Any],
    staleness_max: int,
) -> dict[str, float]:
    """Return the scalars of one step."""
    return {
        "reward": batch.pop("reward_mean"),
        **batch,
        **updated,
        "tokens_per_s": batch["tokens"] / times.step_s,
        "staleness_limit": staleness_max,
        "dropped_as_stale": server.get("stale", 0),
        "queued_sequences": server.get("queued_sequences", 0),
    }
