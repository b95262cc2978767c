"""From a config to a finished run: check, lock the directory, make the model, supervise, sum up.

On one machine all of a run is here. In a Slurm job this is the batch step, and the roles' steps run
on the job's nodes.
"""

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

import atropos_hpc
from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.checkpoint import LatestCheckpoint
from atropos_hpc.contracts.members import (
    AnyMember,
    AttemptRecord,
    AttemptStart,
    Done,
    Holder,
    Roster,
)
from atropos_hpc.contracts.metrics import Summary
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import base_model, preflight, storage_check
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.rollout_job import RolloutJob
from atropos_hpc.launch.slurm.slurm_job import Job, current_job
from atropos_hpc.launch.steps import SlurmSteps, Step, local_steps, trainer_python
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.observe.console import Console
from atropos_hpc.observe.summary import summarize
from atropos_hpc.observe.timeline import ActivityRecorder
from atropos_hpc.runtime import (
    cores,
    environment,
    private_tmp,
    process,
    restart_policy,
    shell,
    slurm,
)
from atropos_hpc.runtime.membership import read_members
from atropos_hpc.runtime.restart_policy import Action
from atropos_hpc.runtime.run_dir import (
    RunDir,
    Unreadable,
    read_intact,
    write_struct,
)
from atropos_hpc.runtime.waiting import Waiting
from atropos_hpc.validate import Refused, refuse

log = logging.getLogger(__name__)

EXIT = {Action.FINISH: 0, Action.FAIL: 1, Action.STOP: 75, Action.REQUEUE: 75}
OLD_MEMBERS_S = 20.0  # for the members of a killed supervisor to notice that and end
OLD_LOCK_S = 300.0  # for a filesystem to release the lock of a node that has died
ROLLOUT_KINDS = ("rollout_job", "agent", "environment", "evaluator")


def launch(
    config: Config, run_dir: Path, requeue: Callable[[], None], checked: bool = False
) -> int:
    """Start or resume a run and stay until its end. Returns train.py's exit code.

    `requeue` makes Slurm start this job again. It is called last, when no process of the run is
    left here and its lock is free. `checked`: the roles' environments were checked at submission,
    and are not again while nodes are held for it.
    """
    process.keep_files_private()
    config.run_dir = str(run_dir)  # which run.json has from before it was moved
    if dropped := environment.drop_from(os.environ):
        print(environment.describe(dropped), file=sys.stderr)
    try:
        action = _launch(config, RunDir(run_dir), checked)
    except Refused as error:
        return refuse(error.problems)
    except Unreadable as error:
        headline = "A file of the run is damaged; nothing was started."
        return refuse([Problem("run_dir", str(error))], headline)
    finally:
        private_tmp.sweep_private()  # a killed node agent has left its directory
    if action is Action.REQUEUE:
        try:
            slurm.retry(requeue)
        except slurm.SlurmError as error:
            print(
                f"cannot requeue the job ({error}); submit it again with"
                f" {shell.printed(shell.override('run_dir', run_dir))} to resume the run",
                file=sys.stderr,
            )
    return EXIT[action] if isinstance(action, Action) else action


def _launch(config: Config, run: RunDir, checked: bool) -> Action | int:
    """Return how the run ended, or an exit code if it did not start. Raises Refused."""
    try:
        job, known = _job(config), run.info()
        roles = not (checked or _is_requeued(run))
    except slurm.SlurmError as error:
        raise Refused(Problem("cluster", str(error))) from None
    try:
        with ExitStack() as stack:
            if known:
                # Before the slow checks, so that a second start is refused at once.
                stack.enter_context(_locked(run))
            if problems := preflight.check(config, run.path, known, roles=roles):
                raise Refused(*problems)
            if config.launch.dry_run:
                return _dry_run(config, run)
            if not known:
                run.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(run))
            return _run(config, run, job)
    except Timeout:
        holder = read_intact(run.holder, Holder) or Holder()
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
        who = f"{holder.what}, pid {holder.pid} on {holder.host}, since {since}"
        print(f"{run.path} is in use by {who}; nothing was started.", file=sys.stderr)
        return 2


def _dry_run(config: Config, run: RunDir) -> int:
    """Print what a run on this machine would start."""
    for step in local_steps(config, run.path):
        for spec in step.processes:
            variables = [f"{name}={value}" for name, value in spec.variables.items()]
            print(shell.printed("env", *variables, *spec.command))
    print("Nothing was started (launch.dry_run).")
    return 0


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """Hold the run's lock; the kernel releases it when this process ends, however it ends."""
    timeout = OLD_LOCK_S if _is_requeued(run) else 0
    with storage_check.locked(run.lock, timeout):
        holder = Holder(
            what="atropos_hpc.train",
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=os.environ.get("SLURM_RESTART_COUNT"),
        )
        write_struct(run.holder, holder)
        yield


def _is_requeued(run: RunDir) -> bool:
    """Tell whether Slurm has started this job again. A second command in the same start of a job,
    as in an interactive one, is something else."""
    job, holder = os.environ.get("SLURM_JOB_ID"), read_intact(run.holder, Holder)
    if job is None or holder is None or holder.job != job:
        return False
    return holder.restarts != os.environ.get("SLURM_RESTART_COUNT")


def _job(config: Config) -> Job | None:
    """The Slurm job that this process is the batch step of; None for a run on this machine.

    Raises Refused when there is no job, or one that does not match the config.
    """
    kind = config.launch.allocation
    if kind == "local":
        return None
    if "SLURM_JOB_ID" not in os.environ:
        how = "submit with -m hydra/launcher=submitit_slurm, or with sbatch and slurm/*.sbatch"
        raise Refused(Problem("launch.allocation", f"{kind} needs a job: {how}"))
    try:
        allocations = sbatch.allocated_nodes(config, os.environ, slurm.expand_nodes)
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        raise Refused(Problem(key, message)) from None
    return current_job(allocations)


def _run(config: Config, run: RunDir, job: Job | None) -> Action | int:
    run.create()
    attempt = run.new_attempt()
    split = config.launch.allocation == "split"
    _end_old_members(run, ROLLOUT_KINDS if split else ())
    console = Console(run, config.trainer.steps)
    with console.logging_to(attempt / "supervisor.log"):
        done = read_intact(run.done, Done)
        if done is not None and done.version >= config.trainer.steps:
            log.info("the run in %s is complete already, at step %d", run.path, done.version)
            return 0
        run.done.unlink(missing_ok=True)
        log.info("run directory %s", run.path)
        if (slow := cores.slow_dtype(config)) is not None:
            log.warning("%s: %s", slow.key, slow.message)
        if _requeued_too_often(config, run, attempt, job):
            return 1
        try:
            config.model.path = base_model.ensure(
                config.model, trainer_python(config), attempt / "make_base.log"
            )
            _write_run_json(config, run)
            steps = _steps(config, run, job, attempt)
            submit = split and config.launch.submit_rollout
            rollout_job = RolloutJob(config, run) if submit else None
        except (RuntimeError, OSError) as error:
            log.error("cannot start the run: %s", error)
            return 1
        return _supervise(config, run, Supervision(console, steps, job, rollout_job, attempt))


@dataclass(frozen=True)
class Supervision:
    """What one attempt at a run is supervised with."""

    console: Console
    steps: list[Step]
    job: Job | None
    rollout_job: RolloutJob | None
    attempt: Path  # its logs


def _supervise(config: Config, run: RunDir, parts: Supervision) -> Action:
    """Supervise the run to its end and write what came of it."""
    started, activity = time.time(), ActivityRecorder(run)

    def watch(members: dict[str, AnyMember]) -> Action | None:
        parts.console.show(members)
        activity.observe(members)
        return parts.rollout_job.poll() if parts.rollout_job is not None else None

    supervisor = Supervisor(run, config, parts.steps, watch, parts.job)
    action = supervisor.supervise()
    if parts.rollout_job is not None and action is not Action.REQUEUE:
        parts.rollout_job.end(at_once=action is not Action.FINISH)
    outcome = action.name.lower()
    error = supervisor.error if action is Action.FAIL else None
    record = AttemptRecord(
        started=started, ended=time.time(), outcome=outcome, events=supervisor.events, error=error
    )
    _write_record(parts.attempt / "attempt.json", record)
    try:
        summary = summarize(run)
        _write_record(run.summary, summary)
        parts.console.end(outcome, summary)
    except Unreadable as error:
        log.error("the run has ended (%s), but cannot be summed up: %s", outcome, error)
    if config.wandb.mode == "offline" and action is not Action.REQUEUE:
        sync = f"{shell.printed('wandb', 'sync', run.path / 'wandb')}/offline-run-*"
        log.info("to upload this run to W&B, on a machine with a network: %s", sync)
    if error is not None:
        log.error("the run failed: %s", error)  # the last line, so that nobody has to search
    return action


def _write_record(path: Path, record: AttemptRecord | Summary) -> None:
    """Write a record of how the run ended; a full disk does not change how it has ended."""
    try:
        write_struct(path, record)
    except OSError as error:
        log.error("cannot write %s: %s", path, error)


def _steps(config: Config, run: RunDir, job: Job | None, attempt: Path) -> list[Step]:
    if job is None:
        return local_steps(config, run.path)
    nodes = "; ".join(f"{role} on {', '.join(a.nodes)}" for role, a in job.allocations.items())
    log.info("job %s: %s", job.id, nodes)
    addresses = job.addresses(config.cluster.host)
    return SlurmSteps(config, run.path, job.allocations, addresses, attempt).all()


def _requeued_too_often(config: Config, run: RunDir, attempt: Path, job: Job | None) -> bool:
    """Record this start; return whether Slurm has started the run too often without progress."""
    latest = read_intact(run.checkpoints / "latest.json", LatestCheckpoint)
    durable = latest.step if latest else 0
    by_hand = job is not None and "SUBMITIT_EXECUTOR" not in os.environ
    script = slurm.command_of(job.id) if job is not None and by_hand else None
    start = AttemptStart(job=job.id if job else None, durable=durable, script=script)
    write_struct(attempt / "start.json", start)
    records = [read_intact(path / "start.json", AttemptStart) for path in run.attempts()]
    starts = [(start.job, start.durable) for start in records if start is not None]
    requeues = config.launch.requeues
    if not restart_policy.requeued_too_often(starts, requeues):
        return False
    log.error(
        "Slurm has started this job %d times again without a durable step after step %d"
        " (launch.requeues: %d): giving up",
        requeues + 1,
        durable,
        requeues,
    )
    return True


def _write_run_json(config: Config, run: RunDir) -> None:
    """Write run.json. A resumed run keeps its id, date and first command."""
    known = run.info()
    info = RunInfo(
        config,
        id=(known and known.id) or secrets.token_hex(4),
        created=(known and known.created) or time.time(),
        version=atropos_hpc.__version__,
        command=(known and known.command) or sys.argv,
    )
    run.write_info(info)


def _end_old_members(run: RunDir, spared: tuple[str, ...]) -> None:
    """Clear the rendezvous of an earlier attempt. Members of a killed supervisor notice that and
    end; kill those that do not. Members of the kinds `spared` belong to another job and stay."""
    waiting = Waiting("the end of an earlier attempt", "its members", OLD_MEMBERS_S)
    while (left := _old_pids(run, spared)) and not waiting.expired:
        time.sleep(0.2)
    for pid in left:
        log.warning("killing pid %d, which is left from an earlier attempt", pid)
        process.kill(pid)
    for path in run.members.glob("*.json"):
        if not path.name.startswith(spared):
            path.unlink()
    write_struct(run.roster, Roster())


def _old_pids(run: RunDir, spared: tuple[str, ...]) -> list[int]:
    """Pids on this machine of members of this run, according to their member files. Only those
    whose command line names the run directory: pids are reused."""
    found = []
    for member in read_members(run):
        here = member.host == socket.gethostname() and member.pid != os.getpid()
        is_old = here and member.kind not in spared
        if is_old and str(run.path) in process.command_line(member.pid):
            found.append(member.pid)
    return found
