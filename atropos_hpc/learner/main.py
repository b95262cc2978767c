"""One learner rank: `python -m atropos_hpc.learner --run-dir DIR`.

RANK, WORLD_SIZE, ... or Slurm's variables are in its environment. The rank joins the others through
the rendezvous, builds the backend, restores the last durable step, and trains. Exit codes:

    0   the run is complete
    75  it was asked to stop, and has saved a checkpoint
    70  something it waited for did not come in time
    2   the config cannot work or a file of the run is damaged, so a restart would fail as well
    1   anything else
"""

import argparse
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import TrainerState
from atropos_hpc.contracts.messages import Registration
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.learner.checkpoint_files import BadCheckpoint
from atropos_hpc.learner.skipped_steps import NothingLearned
from atropos_hpc.runtime import cores, process
from atropos_hpc.runtime.deadlines import write_timeout_s
from atropos_hpc.runtime.devices import (
    keep_own_instance,
    local_device,
    require_gpus,
    stay_near,
    visible_devices,
)
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.membership import Member, RosterReader
from atropos_hpc.runtime.network import group_host, keep_to_interface
from atropos_hpc.runtime.position_limit import require_positions
from atropos_hpc.runtime.private_tmp import compile_caches
from atropos_hpc.runtime.process import DONE, REFUSED, STOPPED, STUCK
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, last_records
from atropos_hpc.runtime.signed_objects import sign_object_collectives
from atropos_hpc.runtime.sizing import GIB, free_memory, recomputes_activations
from atropos_hpc.runtime.waiting import wait_for

if TYPE_CHECKING:
    from atropos_hpc.learner.backends.base import Backend
    from atropos_hpc.learner.loop import TrainContext
    from atropos_hpc.observe.rollouts import RolloutWriter
    from atropos_hpc.trajectories.client import TrajectoryClient

log = logging.getLogger(__name__)

GONE = (
    "%s. The checkpoint that was restored is older than the acknowledged batches: newer checkpoints"
    " are damaged or were removed. Restore one of them; or, to continue from this one with new"
    " groups, move the run's trajectories/ away"
)
WRITE_TIMEOUT_S = 1800.0  # of a policy version or a checkpoint of a small model, by all ranks
SERVER_TIMEOUT_S = 600.0  # how long the trajectory server may be unreachable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank, and return its exit code."""
    process.die_with_parent(signal.SIGKILL)
    process.dump_stacks_on_request()
    parser = argparse.ArgumentParser(description="One rank of the learner.")
    parser.add_argument("--run-dir", type=Path, required=True)
    run = RunDir(parser.parse_args(arguments).run_dir)
    process.log_to_stderr()
    config = run.config()
    _set_environment(config)
    rank = _variable("RANK", "SLURM_PROCID", "0")
    step_id = os.environ.get(process.STEP_ID)
    state = TrainerState(rank=rank, step_id=step_id)
    member = Member(run, state, os.environ.get(process.NODE, "local"), rank)
    failure: str | None = None
    try:
        return DONE if _train(run, config, member) else STOPPED
    except (BadCheckpoint, NothingLearned, Unreadable) as error:
        failure = str(error)
        log.error("%s", error)
        return REFUSED
    except ValueError as error:
        failure = describe_error(error)
        log.exception("the config cannot work; not to be restarted")
        return REFUSED
    except TimeoutError as error:
        failure = describe_error(error)
        log.exception("a wait has timed out")
        return STUCK
    except BaseException as error:
        failure = describe_error(error)
        traceback.print_exc()
        if getattr(error, "status", None) == HTTPStatus.GONE:
            log.error(GONE, error)
            return REFUSED
        return 1
    finally:
        member.leave(error=failure)
        sys.stdout.flush()
        sys.stderr.flush()


def backend_class(name: str) -> Any:
    """Return the backend that trainer.backend names. Only its own library is imported."""
    if name == "deepspeed":
        from atropos_hpc.learner.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend
    from atropos_hpc.learner.backends.verl import VerlBackend

    return VerlBackend


def join(run: RunDir, member: Member[TrainerState], host: str, timeout_s: float) -> None:
    """Make the default process group.

    Of several ranks, rank 0 opens a store at a free port and announces it in its member file; the
    others read it there. The step id distinguishes this start's rank 0 from an earlier one's.
    Raises TimeoutError.
    """
    import torch
    import torch.distributed as dist

    sign_object_collectives(run.token())
    rank, world = member.state.rank, _variable("WORLD_SIZE", "SLURM_NTASKS", "1")
    store: dist.Store
    # Ranks load and wait at different speeds; a lost rank ends the Slurm step anyway.
    timeout = timedelta(seconds=timeout_s + 600)
    if world == 1:
        store = dist.HashStore()  # needs no port
        member.update(state="joining")
    elif rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Bound here because the store itself would listen on every interface.
        listener = socket.create_server((host, 0), family=family)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
        member.update(state="joining", store=(host, port))
    else:
        roster, step_id = RosterReader(run.roster), member.state.step_id

        def announced() -> tuple[str, int] | None:
            ranks = roster.members(TrainerState)
            stores = (m.store for m in ranks if m.rank == 0 and m.step_id == step_id)
            return next((store for store in stores if store), None)

        what = "the address of the process group's store"
        address, port = wait_for(what, "trainer rank 0", announced, timeout_s, member=member)
        store = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    backend, device = "gloo", None
    if torch.cuda.is_available():
        index = local_device(_local_rank(), torch.cuda.device_count())
        visible = visible_devices(os.environ, torch.cuda.device_count())
        stay_near(visible[index : index + 1])
        torch.cuda.set_device(index)  # before anything allocates on another device
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", index)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device
    )


def _set_environment(config: Config) -> None:
    """Set what libraries read from the environment when they are imported."""
    if config.trainer.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.trainer.threads)
    keep_own_instance(os.environ, _local_rank())
    if not config.roles.trainer.gpus_per_node:
        for name, value in cores.PASSIVE_WAITING.items():
            os.environ.setdefault(name, value)
    log.info("computes with %s", cores.bind())
    # Packs differ in length from step to step; fixed-size segments would leave a fragment for each.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for name, path in compile_caches().items():
        os.environ.setdefault(name, path)
    if Path(config.model.path or "").exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _train(run: RunDir, config: Config, member: Member[TrainerState]) -> bool:
    """Join the other ranks and train. Return False if the run was asked to stop."""
    import torch

    from atropos_hpc.learner.loop import train
    from atropos_hpc.learner.periodic_export import TIMEOUT_S, PeriodicExport
    from atropos_hpc.observe.trackers import Ending

    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    require_gpus("trainer", config.roles.trainer.gpus_per_node)
    host = group_host(config.cluster.host, config.roles.trainer.nodes)
    keep_to_interface(host)
    join(run, member, host, config.launch.start_timeout_s)
    member.update(state="loading")
    context = _build_context(run, config, member)
    if member.state.rank == 0:
        timeout_s = write_timeout_s(config, TIMEOUT_S)
        context.exports = PeriodicExport(run, config.export, timeout_s)
    ending = Ending.FAILED
    try:
        complete = train(context)
        ending = Ending.COMPLETE if complete else Ending.STOPPED
        return complete
    finally:
        if context.exports is not None:
            context.exports.close()
        if context.rollouts is not None:
            context.rollouts.close()
        if context.metrics is not None:
            context.metrics.close(ending)


def recompute_activations(config: Config, free_bytes: float) -> bool:
    """Decide trainer.gradient_checkpointing for all ranks; this one's node has so much memory free.

    Recomputation gathers sharded parameters again, so ranks that differed would wait for ever.
    """
    from atropos_hpc.learner.collective import Collective

    wanted = recomputes_activations(config, free_bytes)
    (recompute,) = Collective.on_any_rank(wanted)
    log.info(
        "activations are %s; %.1f GiB of memory are free",
        "recomputed in the backward pass" if recompute else "stored",
        free_bytes / GIB,
    )
    return recompute


def _build_context(run: RunDir, config: Config, member: Member[TrainerState]) -> "TrainContext":
    """Build the backend, restore the last durable step, and register with the trajectory server."""
    from atropos_hpc.learner.batch_leaser import BatchLeaser
    from atropos_hpc.learner.checkpoint import Checkpoints
    from atropos_hpc.learner.collective import Collective, MicroBatchCounter
    from atropos_hpc.learner.loop import TrainContext
    from atropos_hpc.learner.publisher import Intervals, Publisher, ReaderLink, take_request
    from atropos_hpc.learner.state import TrainState
    from atropos_hpc.observe.metrics import MetricsWriter
    from atropos_hpc.observe.trackers import open_later
    from atropos_hpc.trajectories.client import TrajectoryClient, UpstreamClient

    require_positions(config.model)
    trainer = replace(
        config.trainer, gradient_checkpointing=recompute_activations(config, free_memory())
    )
    rank = member.state.rank
    backend = backend_class(trainer.backend)(
        config.model,
        trainer,
        config.algorithm,
        config.seed,
        reference=config.algorithm.needs_reference,
    )
    process.return_freed_memory()
    backend.on_micro_batch(MicroBatchCounter(member))
    write_s = write_timeout_s(config, WRITE_TIMEOUT_S)
    keep = trainer.keep_checkpoints, trainer.keep_checkpoints_every
    checkpoints = Checkpoints(run, *keep, write_s)
    state = TrainState(kl_coef=config.algorithm.kl_coef)
    checkpoints.load_latest(backend, state)
    if config.algorithm.kl_target is None:
        state.kl_coef = config.algorithm.kl_coef  # the config may have changed since the save
    log.info("rank %d of %d starts at step %d", rank, backend.world, state.version)

    Client = UpstreamClient if config.trajectories.server == "atropos" else TrajectoryClient
    address = RosterReader(run.roster).trajectory_server
    # One for the leasing thread, one for this one: a client is not thread-safe.
    leasing, client = (Client(address, run.token(), SERVER_TIMEOUT_S) for _ in range(2))
    metrics = None
    if rank == 0:
        register(run, config, leasing, backend.vocab_size, state.version)
        metrics = MetricsWriter(run, open_later(run, config), state.version)
    link = ReaderLink(partial(take_request, run), lambda alarm: member.update(alarm=alarm))
    return TrainContext(
        config=config,
        run=run,
        member=member,
        backend=backend,
        state=state,
        client=client,
        leaser=BatchLeaser(leasing, backend.data_rank, backend.data_world, config.staleness.max),
        checkpoints=checkpoints,
        publisher=Publisher(
            run.policy, config.policy, config.model.dtype, link, Intervals(timeout=write_s)
        ),
        collective=Collective(run, member),
        metrics=metrics,
        rollouts=_rollout_writer(run, config, backend, state.version),
    )


def _rollout_writer(
    run: RunDir, config: Config, backend: "Backend", resume_at: int
) -> "RolloutWriter | None":
    """Open the writer of this rank, if it is the first of those that hold the same groups."""
    from atropos_hpc.observe.rollouts import Part, RolloutWriter
    from atropos_hpc.observe.samples import decoder

    max_bytes = config.trajectories.rollouts_max_bytes
    if not max_bytes or backend.rank % (backend.world // backend.data_world):
        return None
    part, texts = Part(backend.data_rank, backend.data_world), decoder(config.model.path or "")
    return RolloutWriter(run.rollouts, part, max_bytes, resume_at, texts)


def register(
    run: RunDir, config: Config, client: "TrajectoryClient", vocabulary: int, version: int
) -> None:
    """Register with the trajectory server, and warn if it lacks batches that were trained on."""
    from atropos_hpc.learner.batch_leaser import missing_batches

    if config.trajectories.server == "durable":  # Atropos' own keeps nothing over a restart
        trained = max((line.step for line in last_records(run.metrics, StepMetrics, 1)), default=0)
        if missing := missing_batches(client.status().next_batch, version, trained):
            log.warning("%s", missing)
    client.register(
        Registration(
            batch_size=config.algorithm.batch_size,
            max_token_len=config.model.max_length,
            starting_step=version,
            num_steps=config.trainer.steps,
            vocab_size=vocabulary,
            checkpoint_dir=str(run.path / "environments"),
            save_checkpoint_interval=config.trainer.checkpoint_every,
            wandb_project=config.wandb.project,
            wandb_group=config.wandb.group or "",
        )
    )


def _local_rank() -> int:
    return _variable("LOCAL_RANK", "SLURM_LOCALID", "0")


def _variable(name: str, slurm: str, default: str) -> int:
    """Return a number from torchrun's variable, else from Slurm's."""
    return int(os.environ.get(name) or os.environ.get(slurm) or default)
