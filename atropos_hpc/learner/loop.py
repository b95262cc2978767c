"""The training loop. One optimizer step:

1. Wait for the batch that the trajectory server has formed for this policy version. It was leased
   ahead, during the previous step.
2. Turn the groups into flat token arrays, with advantages.
3. Compute log-probs of the old policy and of the frozen reference, where the groups lack them;
   importance weights and the KL penalty follow from these.
4. Update: forward, loss, backward, optimizer.
5. Publish the new version, in the background of the next step.
6. Every `checkpoint_every` steps, save a checkpoint in the background. Acknowledge the batches that
   no resume needs any more.
7. Write the metrics, and in the background the trained sequences.

Batch k is trained at policy version k and makes version k + 1. A learner that dies resumes from its
last durable step s and leases batches s, s+1, ... again, the same ones: no group is lost, and none
is trained on twice in the weights that survive.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from atropos_hpc.config import Config, environment_name, environments, micro_batch_tokens
from atropos_hpc.contracts.members import Done, TrainerState
from atropos_hpc.contracts.messages import ServerStatus
from atropos_hpc.contracts.metrics import Evaluation, Rollout
from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.learner.batch import Batch, BatchSettings, advantages_of, make_batch
from atropos_hpc.learner.batch_leaser import BatchLeaser, LeasedBatch
from atropos_hpc.learner.checkpoint import Checkpoints
from atropos_hpc.learner.collective import Collective, StopRequested
from atropos_hpc.learner.importance import correct
from atropos_hpc.learner.kl import next_coefficient, penalize
from atropos_hpc.learner.performance import Devices, device_name, peak_memory
from atropos_hpc.learner.periodic_export import TIMEOUT_S, PeriodicExport
from atropos_hpc.learner.publisher import Publisher
from atropos_hpc.learner.skipped_steps import SkippedSteps
from atropos_hpc.learner.state import TrainState
from atropos_hpc.observe.metrics import MetricsWriter, Phases, StepTimes
from atropos_hpc.observe.rollouts import RolloutWriter, rollouts_of
from atropos_hpc.runtime.deadlines import batch_timeout_s, write_timeout_s
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.run_dir import RunDir, last_records, write_struct
from atropos_hpc.trajectories.client import TrajectoryClient

log = logging.getLogger(__name__)


@dataclass
class TrainContext:
    """What one learner rank trains with. `metrics` is rank 0's."""

    config: Config
    run: RunDir
    member: Member[TrainerState]
    backend: Backend
    state: TrainState
    client: TrajectoryClient
    leaser: BatchLeaser
    checkpoints: Checkpoints
    publisher: Publisher
    collective: Collective
    metrics: MetricsWriter | None
    rollouts: RolloutWriter | None = None  # of one rank of those that hold the same groups
    exports: PeriodicExport | None = None  # rank 0's
    phases: Phases = field(default_factory=Phases)
    skipped: SkippedSteps = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = SkippedSteps(self.config.trainer.max_skipped_steps)

    @property
    def batch_settings(self) -> BatchSettings:
        config = self.config
        names: tuple[str, ...] = ()
        if config.more_environments:
            names = tuple(map(environment_name, environments(config)))
        return BatchSettings(
            config.algorithm,
            micro_batch_tokens(config),
            config.model.max_length,
            replicas=self.backend.world // self.backend.data_world,
            environments=names,
        )


def train(context: TrainContext) -> bool:
    """Train from the present version to the last step. Collective.

    Return True if the run is complete, False if it was asked to stop; it has saved in either case.
    Raises TimeoutError when a batch does not come in time, and NothingLearned when too many steps
    in a row were skipped.
    """
    state, config = context.state, context.config
    evaluation, launch = config.evaluation, config.launch
    try:
        context.publisher.publish(context.backend, state.version)
        if evaluation.before and state.version == 0:
            _await_evaluation(context, 0)  # training on would change what it evaluates
        context.leaser.start(state.version, state.version)
        timeout_s = batch_timeout_s(config, launch.start_timeout_s)
        while state.version < config.trainer.steps:
            _step(context, timeout_s)
            timeout_s = batch_timeout_s(config, launch.step_timeout_s)
            context.collective.check()
        _save_now(context)
        if evaluation.after:
            _await_evaluation(context, state.version)
        _await_export(context, state.version)
    except StopRequested:
        log.info("asked to stop at step %d: saving a checkpoint", state.version)
        _save_now(context)
        return False
    finally:
        context.leaser.close()
    if context.backend.rank == 0:
        write_struct(context.run.done, Done(version=state.version))
    return True


def _step(context: TrainContext, timeout_s: float) -> None:
    """Make one optimizer step, and publish, save and report its outcome."""
    state, phases, config = context.state, context.phases, context.config
    version, steps = state.version, config.trainer.steps
    context.member.update(state="training", step=version)
    with phases("wait"):
        source = "the trajectory server"
        context.collective.wait(
            f"batch {version}",
            source,
            context.leaser.ready,
            timeout_s,
            lambda: context.publisher.alarm,
        )
        leased = context.leaser.take()
    if version + 1 < steps:
        context.leaser.start(version + 1, version)
    with phases("batch"):
        batch = make_batch(leased.groups, context.batch_settings, version)
    with phases("publish"):
        context.publisher.release()
    scalars = _optimize(context, batch, leased)
    scalars["skipped_steps"] = context.skipped.count(scalars["grad_norm"])
    state.version = version + 1
    state.kl_coef = next_coefficient(config.algorithm, state.kl_coef, scalars.get("kl_reference"))
    with phases("publish"):
        context.publisher.publish(context.backend, state.version)
    with phases("checkpoint"):
        if state.version % config.trainer.checkpoint_every == 0:
            context.checkpoints.save(context.backend, state)
        _acknowledge(context, context.checkpoints.newly_durable())
    _keep_rollouts(context, batch, leased)
    scalars["perf/peak_memory_gib"] = peak_memory() / 2**30
    if context.metrics is not None:
        times = phases.take()
        scalars |= _performance(context, batch, times)
        scalars["off_policy/staleness_limit"] = config.staleness.max
        found = _scalars(batch, scalars, leased.server)
        context.metrics.write(state.version, found, times, _histograms(context, batch))
    context.skipped.check(state.version)


def _keep_rollouts(context: TrainContext, batch: Batch, leased: LeasedBatch) -> None:
    """Write the sequences that were trained, and show the trackers some of them."""
    step, groups = context.state.version, leased.groups
    if not groups:
        return
    if context.rollouts is not None:
        context.rollouts.submit(step, groups, advantages_of(batch))
    if context.metrics is not None:
        steps = context.config.trainer.steps

        def first() -> list[Rollout]:
            every = rollouts_of(groups, step, advantages_of(batch))
            return every[: len(groups[0].lengths)]

        context.metrics.sample(step, steps, first)


def _optimize(context: TrainContext, batch: Batch, leased: LeasedBatch) -> dict[str, float]:
    """Complete the batch with log-probs, and update the weights. Return the step's scalars."""
    backend, state, algorithm = context.backend, context.state, context.config.algorithm
    with context.phases("log_probs"):
        if batch.needs_log_probs:
            batch.set_old_log_probs(backend.log_probs(batch))
        if batch.needs_reference:
            batch.set_reference_log_probs(backend.reference_log_probs(batch))
        importance = correct(batch, algorithm.correction)
        penalty = penalize(batch, leased.groups, algorithm, state.kl_coef)
    with context.phases("update"):
        updated = backend.update(batch, state.version, state.kl_coef)
    return {**importance, **penalty, **updated, "kl_coef": state.kl_coef}


def _acknowledge(context: TrainContext, durable: int | None) -> None:
    """When a step has become durable, acknowledge the batches that no resume needs any more.

    Its export is started if it is due.
    """
    safe_step = context.checkpoints.safe_step
    if durable is not None and safe_step > 0 and context.backend.rank == 0:
        context.client.ack(safe_step - 1)
    if context.exports is not None:
        context.exports.durable(durable)


def _save_now(context: TrainContext) -> None:
    """Make the present step durable and its version public."""
    version, publisher, checkpoints = context.state.version, context.publisher, context.checkpoints
    publisher.wait()
    if publisher.newest != version:  # it failed: retry now that nothing else is written
        publisher.publish(context.backend, version)
        publisher.wait()
    durable = checkpoints.wait()
    if checkpoints.last != version:  # else it was resumed from, and has made no step since
        checkpoints.save(context.backend, context.state)
        durable = checkpoints.wait()
    _acknowledge(context, durable)


def _await_evaluation(context: TrainContext, version: int) -> None:
    """Wait for the held-out evaluation of a version."""

    def done() -> bool:
        lines = last_records(context.run.evaluations, Evaluation, 8)  # in order of version
        return any(line.version == version for line in lines)

    what, timeout_s = f"the evaluation of version {version}", context.config.evaluation.timeout_s
    context.collective.wait(what, "the evaluator", done, timeout_s)


def _await_export(context: TrainContext, version: int) -> None:
    """Wait for the export of the last version, which has its evaluation. It may fail."""
    if not context.config.export.every:
        return
    exports = context.exports
    twice_s = 2 * write_timeout_s(context.config, TIMEOUT_S) + 60  # one may be under way

    def ended() -> bool:
        return exports is None or exports.last_done(version)

    context.collective.wait(f"the export of version {version}", "its process", ended, twice_s)


def _performance(context: TrainContext, batch: Batch, times: StepTimes) -> Mapping[str, float]:
    backend, tokens = context.backend, batch.statistics.sums["tokens"]
    devices = Devices(backend.world, device_name(), context.config.model.dtype)
    return devices.metrics(tokens, backend.computed, backend.flop_rates, times)


def _histograms(context: TrainContext, batch: Batch) -> dict[str, list[float]]:
    staleness = batch.statistics.staleness_counts()
    return {"ratio": context.backend.ratio_counts, "staleness": staleness}


def _scalars(
    batch: Batch, updated: dict[str, float], server: ServerStatus | None
) -> dict[str, float]:
    scalars = batch.statistics.metrics() | updated
    if server is not None:
        scalars["dropped_as_stale"] = server.stale
        scalars["queued_sequences"] = server.queued_sequences
        for name, counts in server.prompts.items():
            known = {k: n for k, n in msgspec.structs.asdict(counts).items() if n is not None}
            scalars |= {f"prompts/{name}/{what}": float(n) for what, n in known.items()}
    return scalars
