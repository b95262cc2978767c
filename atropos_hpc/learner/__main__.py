"""One learner rank: `python -m atropos_hpc.learner --run-dir DIR`, with RANK, WORLD_SIZE, ... (or Slurm's) in its environment.

Joins the others through the rendezvous, builds the backend, goes back to the last durable step, and trains. Exit codes: 0 the run
is complete; 75 it was asked to stop, and has saved; 70 somebody it waited for did not deliver in time; 2 the config cannot work, and
starting again is no use; 1 anything else.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, environment_name, environments
from atropos_hpc.contracts.members import TrainerState
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import (
    Member,
    RosterReader,
)
from atropos_hpc.runtime.network import keep_to_interface, own_host
from atropos_hpc.runtime.process import DONE, REFUSED, STOPPED, STUCK
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.waiting import wait_for

log = logging.getLogger(__name__)

GONE = (
    "{}. The checkpoint that training went back to is older than what was acknowledged: newer ones are damaged, or were taken away. Restore"
    " one of them; or, to go on from this one with new groups, move the run's trajectories/ away"
)
LEASE_PATIENCE_S = 600.0  # how long the trajectory server may be away


def variable(name: str, slurm: str, default: str) -> int:
    """A number that torchrun's names or Slurm's give."""
    return int(os.environ.get(name) or os.environ.get(slurm) or default)


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one rank, from start to end."""
    process.die_with_parent(signal.SIGKILL)
    process.dump_stacks_on_request()
    parser = argparse.ArgumentParser(description="One rank of the learner.")
    parser.add_argument("--run-dir", type=Path, required=True)
    run = RunDir(parser.parse_args(arguments).run_dir)
    process.log_to_stderr()
    config = run.config()
    rank, world = variable("RANK", "SLURM_PROCID", "0"), variable("WORLD_SIZE", "SLURM_NTASKS", "1")
    trainer = config.trainer
    if trainer.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(trainer.threads)
    if Path(config.model.path or "").exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    node, step_id = os.environ.get("ATROPOS_HPC_NODE", "local"), os.environ.get("ATROPOS_HPC_STEP")
    member = Member(run, TrainerState(rank=rank, step_id=step_id), node, rank)
    try:
        return DONE if _train(run, config, member, rank, world) else STOPPED
    except ValueError:
        log.exception("this cannot work with the present config")
        return REFUSED
    except TimeoutError:
        log.exception("waited in vain")
        return STUCK
    except BaseException as error:
        traceback.print_exc()
        if getattr(error, "status", None) == HTTPStatus.GONE:
            log.error("%s", GONE.format(error))
            return REFUSED
        return 1
    finally:
        member.leave()
        sys.stdout.flush()
        sys.stderr.flush()


def _train(
    run: RunDir, config: Config, member: Member[TrainerState], rank: int, world: int
) -> bool:
    import torch

    from atropos_hpc.contracts.messages import Registration
    from atropos_hpc.learner.backends import cpu_platform  # noqa: F401  before anything else of verl
    from atropos_hpc.learner.checkpoint import Checkpoints
    from atropos_hpc.learner.collective import Together
    from atropos_hpc.learner.kl import Coefficient
    from atropos_hpc.learner.loop import Batches, Conf, train
    from atropos_hpc.learner.publisher import Publisher, ReaderLink, take_request
    from atropos_hpc.observe.metrics import MetricsWriter, open_trackers
    from atropos_hpc.trajectories.client import TrajectoryClient, UpstreamClient

    model, algorithm, trainer = config.model, config.algorithm, config.trainer
    launch = config.launch
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    host = own_host(config.cluster.host)
    keep_to_interface(config.cluster.host)
    join(run, member, rank, world, host, launch.start_timeout_s)
    member.update(state="loading")
    backend = backend_class(trainer.backend)(model, trainer, algorithm, config.seed)
    checkpoints = Checkpoints(run, trainer.keep_checkpoints, trainer.keep_checkpoints_every)
    progress = checkpoints.load_latest(backend) or {}
    log.info("rank %d of %d starts at step %d", rank, world, backend.step_count)

    Client = UpstreamClient if config.trajectories.server == "atropos" else TrajectoryClient
    find = RosterReader(run.roster).trajectory_server
    leasing, client = (
        Client(find, run.token(), LEASE_PATIENCE_S) for _ in range(2)
    )  # the thread's, and the loop's own
    if rank == 0:
        leasing.register(
            Registration(
                batch_size=algorithm.batch_size,
                max_token_len=model.max_length,
                starting_step=backend.step_count,
                num_steps=trainer.steps,
                vocab_size=backend.vocab_size,
                checkpoint_dir=str(run.path / "environments"),
                wandb_project=config.wandb.project,
                wandb_group=config.wandb.group or "",
            )
        )
    at = backend.step_count
    metrics = None
    if rank == 0:
        trackers = open_trackers(run, config.wandb, config.tensorboard, at)
        metrics = MetricsWriter(run, trackers, at)
    link = ReaderLink(partial(take_request, run), lambda alarm: member.update(alarm=alarm))
    publishing = Publisher(run.policy, config.policy, model.dtype, link)
    batches = Batches(leasing, backend.data_rank, backend.data_world, config.staleness.max)
    names = tuple(map(environment_name, environments(config))) if config.more_environments else ()
    conf = Conf(
        model,
        algorithm,
        trainer,
        config.evaluation,
        launch,
        config.staleness.max,
        names,
    )
    kl = Coefficient(algorithm, progress.get("kl_coef"))
    try:
        return train(
            conf,
            run,
            backend,
            client,
            batches,
            checkpoints,
            publishing,
            metrics,
            Together(run, member),
            member,
            kl,
        )
    finally:
        if metrics is not None:
            metrics.close()


def backend_class(name: str) -> Any:
    """The backend of that name in trainer.backend. Imported here: each drags in its own large library."""
    if name == "deepspeed":
        from atropos_hpc.learner.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend
    from atropos_hpc.learner.backends.verl import VerlBackend

    return VerlBackend


def join(
    run: RunDir, member: Member[TrainerState], rank: int, world: int, host: str, timeout_s: float
) -> None:
    """Make the default process group. Rank 0 opens a store at a free port and says where in the rendezvous; the others look there.

    The step id tells this start's rank 0 from an earlier one's. Raises TimeoutError, naming rank 0.
    """
    import torch
    import torch.distributed as dist

    timeout = timedelta(
        seconds=timeout_s + 600
    )  # ranks load and wait at different speeds; a lost one ends the step anyway
    if rank == 0:
        listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        port = listener.getsockname()[
            1
        ]  # bound here, because the store itself would listen on every interface
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

        def opened() -> tuple[str, int] | None:
            ranks = roster.members(TrainerState)
            return next(
                (m.store for m in ranks if m.rank == 0 and m.store and m.step_id == step_id),
                None,
            )

        address, port = wait_for(
            "the ranks' store", "trainer rank 0", opened, timeout_s, member=member
        )
        store = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


if __name__ == "__main__":
    # Not sys.exit: the threads of torch's process group and of a publish under way would meet the interpreter's end, which now and then
    # makes the C++ runtime abort, and the exit code would tell of that and not of the run. What had to be written has been waited for.
    os._exit(main())
