"""From a config to a finished run: check, lock the run directory, make the model, supervise, sum up.

On one machine all of a run is here. In a Slurm job this is its batch step, and the roles' steps run on the job's nodes.
"""

import json
import logging
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import atropos_hpc
from atropos_hpc.config import Config
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
from atropos_hpc.launch import base_model, preflight, restart_policy
from atropos_hpc.launch.restart_policy import Action
from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.launch.slurm.rollout_job import RolloutJob
from atropos_hpc.launch.slurm.slurm_job import Job, current_job
from atropos_hpc.launch.steps import SlurmSteps, Step, local_steps, trainer_python
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.observe.console import Console
from atropos_hpc.observe.summary import summarize
from atropos_hpc.observe.timeline import ActivityRecorder
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import (
    RunDir,
    Unreadable,
    read_json,
    read_struct,
    write_struct,
)
from atropos_hpc.validate import Problem

log = logging.getLogger(__name__)

EXIT = {Action.FINISH: 0, Action.FAIL: 1, Action.STOP: 75, Action.REQUEUE: 75}
OLD_MEMBERS_S = 20.0  # how long what is left of a killed run may take to notice and end
OLD_LOCK_S = 300.0  # how long a filesystem may hold the lock of a node that has died
ROLLOUT_KINDS = ("rollout_job", "agent", "environment", "evaluator")


def launch(config: Config, run_dir: Path, requeue: Callable[[], None]) -> int:
    """Run to the end, or resume and run to the end. Returns train.py's exit code.

    `requeue` has Slurm start this job again; called last, when nothing of the run is left here and its lock is free.
    """
    action = _launch(config, run_dir)
    if action is Action.REQUEUE:
        try:
            commands.retry(requeue)
        except commands.SlurmError as error:
            print(
                f"the job cannot be requeued ({error}); submitted again with run_dir={run_dir}, it resumes",
                file=sys.stderr,
            )
    return EXIT[action] if isinstance(action, Action) else action


def _launch(config: Config, run_dir: Path) -> Action | int:
    """How the run ended, or an exit code if it did not start."""
    run = RunDir(run_dir)
    try:
        job = _job(config)
    except commands.SlurmError as error:
        return _refused([Problem("cluster", str(error))])
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        return _refused([Problem(key, message)])
    try:
        known = run.info()
    except Unreadable as error:
        return _refused([Problem("run_dir", str(error))])
    try:
        with ExitStack() as stack:
            if known:
                stack.enter_context(
                    _held(run)
                )  # before the slow checks: a second start is told at once who holds it
            found = preflight.check(config, run_dir, known)
            if found:
                return _refused(found)
            if config.launch.dry_run:
                return _dry_run(config, run)
            if not known:
                run.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_held(run))
            return _run(config, run, job)
    except Timeout:
        holder = read_struct(run.holder, Holder) or Holder()
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
        who = f"{holder.what}, pid {holder.pid} on {holder.host}, since {since}"
        print(f"{run_dir} is in use by {who}; nothing was started.", file=sys.stderr)
        return 2


def _refused(found: list[Problem]) -> int:
    print("The config was refused; nothing was started.", file=sys.stderr)
    for problem in found:
        print(f"  {problem}", file=sys.stderr)
    return 2


def _dry_run(config: Config, run: RunDir) -> int:
    """Show what a run on this machine would start."""
    for step in local_steps(config, run.path):
        for each in step.processes:
            print(
                " ".join(
                    [
                        *(f"{name}={value}" for name, value in each.variables.items()),
                        shlex.join(each.command),
                    ]
                )
            )
    print("Nothing was started (launch.dry_run).")
    return 0


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """Hold the run's lock; the kernel gives it back when this process ends, however it ends."""
    job = os.environ.get("SLURM_JOB_ID")
    ours = (
        job is not None and (read_struct(run.holder, Holder) or Holder()).job == job
    )  # this job, before Slurm started it again
    with FileLock(run.lock, timeout=OLD_LOCK_S if ours else 0, fallback_to_soft=False):
        holder = Holder(
            what="atropos_hpc.train",
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            job=job,
        )
        write_struct(run.holder, holder)
        yield


def _job(config: Config) -> Job | None:
    """The Slurm job that this process is the batch step of; None for a run on this machine.

    Raises ValueError, "key: message", when there is none and there should be, or when it is not what the config says.
    """
    kind = config.launch.allocation
    if kind == "local":
        return None
    if "SLURM_JOB_ID" not in os.environ:
        raise ValueError(
            f"launch.allocation: {kind} needs a job: submit with -m hydra/launcher=submitit_slurm, or with sbatch and slurm/*.sbatch"
        )
    return current_job(sbatch.allocated_nodes(config, os.environ, commands.expand_nodes))


def _run(config: Config, run: RunDir, job: Job | None) -> Action | int:
    started = time.time()
    run.create()
    attempt = run.new_attempt()
    split = config.launch.allocation == "split"
    _end_old_members(run, ROLLOUT_KINDS if split else ())
    console = Console(run, config.trainer.steps)
    with console.logging_to(attempt / "supervisor.log"):
        done = read_struct(run.done, Done)
        if done is not None and done.version >= config.trainer.steps:
            log.info("the run in %s is complete already, at step %d", run.path, done.version)
            return 0
        run.done.unlink(missing_ok=True)
        log.info("run directory %s", run.path)
        if _given_up(config, run, attempt, job):
            return 1
        try:
            config.model.path = base_model.ensure(
                config.model, trainer_python(config), attempt / "make_base.log"
            )
            _write_run_json(config, run)
            steps = _steps(config, run, job, attempt)
            rollout_job = (
                RolloutJob(config, run) if split and config.launch.submit_rollout else None
            )
        except (RuntimeError, OSError) as error:
            log.error("%s", error)
            return 1

        activity = ActivityRecorder(run)

        def watch(members: dict[str, AnyMember]) -> Action | None:
            console.show(members)
            activity.observe(members)
            return rollout_job.poll() if rollout_job is not None else None

        supervisor = Supervisor(run, config.launch, steps, watch, job)
        action = supervisor.supervise()
        if rollout_job is not None and action is not Action.REQUEUE:
            rollout_job.end(at_once=action is not Action.FINISH)
        record = AttemptRecord(
            started=started,
            ended=time.time(),
            outcome=action.name.lower(),
            events=supervisor.events,
        )
        _keep(attempt / "attempt.json", record)
        summary = summarize(run)
        _keep(run.summary, summary)
        console.end(action.name.lower(), summary)
        if config.wandb.mode == "offline" and action is not Action.REQUEUE:
            log.info(
                "to send this run to W&B, from a machine with a network: wandb sync %s",
                run.path / "wandb" / "offline-run-*",
            )
    return action


def _keep(path: Path, record: AttemptRecord | Summary) -> None:
    """Write what is only told afterwards: a full disk does not change how a run has ended."""
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


def _given_up(config: Config, run: RunDir, attempt: Path, job: Job | None) -> bool:
    """Note this start, and tell whether Slurm has started the run too often without progress."""
    durable = read_json(run.checkpoints / "latest.json").get("step", 0)
    write_struct(attempt / "start.json", AttemptStart(job=job.id if job else None, durable=durable))
    attempts = sorted(
        (run.path / "logs").glob("attempt-*/start.json"),
        key=lambda path: int(path.parent.name.removeprefix("attempt-")),
    )
    records = [read_struct(path, AttemptStart) for path in attempts]
    starts = [(start.job, start.durable) for start in records if start is not None]
    if not restart_policy.requeued_too_often(starts, config.launch.requeues):
        return False
    log.error("Slurm has started this job %d times again, and each time it ended before a step after %d was durable "
              "(launch.requeues: %d): it is not run again", config.launch.requeues + 1, durable, config.launch.requeues)  # fmt: skip
    return True


def _write_run_json(config: Config, run: RunDir) -> None:
    """What every member reads. A resumed run keeps its id, date and first command; its config may differ in what may differ."""
    known = run.info()
    info = RunInfo(
        config,
        id=(known and known.id) or secrets.token_hex(4),
        created=(known and known.created) or time.time(),
        version=atropos_hpc.__version__,
        command=(known and known.command) or sys.argv,
    )
    write_struct(run.run_json, info)


def _end_old_members(run: RunDir, spared: tuple[str, ...]) -> None:
    """Members of a supervisor that was killed notice it and end; give them time, then end them, and clear the rendezvous.

    Members of the kinds `spared` belong to another job, and stay.
    """
    deadline = time.monotonic() + OLD_MEMBERS_S
    while (left := _alive_here(run, spared)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        log.warning("ending pid %d, left from an earlier attempt", pid)
        process.kill(pid)
    for path in run.members.glob("*.json"):
        if not path.name.startswith(spared):
            path.unlink()
    write_struct(run.roster, Roster())


def _alive_here(run: RunDir, spared: tuple[str, ...]) -> list[int]:
    """Pids on this machine of members of this run: by their record, and only if their command line names the run directory."""
    found = []
    for path in run.members.glob("*.json"):
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            command = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        here = (
            state["host"] == socket.gethostname()
            and state["pid"] != os.getpid()
            and state["kind"] not in spared
        )
        if here and str(run.path).encode() in command:
            found.append(state["pid"])
    return found
