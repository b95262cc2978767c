"""From a config to a finished run on this machine: check, lock the run directory, make the model, supervise, sum up."""

import dataclasses
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import atropos_hpc
from atropos_hpc import process
from atropos_hpc.config import Config, Problem
from atropos_hpc.launch import base_model, preflight
from atropos_hpc.launch.allocation import local_steps, trainer_python
from atropos_hpc.launch.plan import Action
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.observe.console import Console
from atropos_hpc.observe.summary import summarize
from atropos_hpc.run_dir import RunDir, read_json, write_json

log = logging.getLogger(__name__)

EXIT = {Action.FINISH: 0, Action.FAIL: 1, Action.STOP: 75}
OLD_MEMBERS_S = 20.0  # how long what is left of a killed run may take to notice and end


def launch(config: Config, run_dir: Path) -> int:
    """Run to the end, or resume and run to the end. Returns train.py's exit code."""
    run = RunDir(run_dir)
    known = read_json(run.run_json)
    try:
        with ExitStack() as stack:
            if known:
                stack.enter_context(_held(run))  # before the slow checks: a second start is told at once who holds it
            found = preflight.check(config, run_dir, known.get("config", {}))
            if found:
                return _refused(found)
            if not known:
                run.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_held(run))
            return _run(config, run)
    except Timeout:
        holder = read_json(run.holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("since", 0)))
        who = f"{holder.get('what', 'somebody')}, pid {holder.get('pid')} on {holder.get('host')}, since {since}"
        print(f"{run_dir} is in use by {who}; nothing was started.", file=sys.stderr)
        return 2


def _refused(found: list[Problem]) -> int:
    print("The config was refused; nothing was started.", file=sys.stderr)
    for problem in found:
        print(f"  {problem}", file=sys.stderr)
    return 2


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """Hold the run's lock; the kernel gives it back when this process ends, however it ends."""
    with FileLock(run.lock, timeout=0, fallback_to_soft=False):
        holder = {"what": "atropos_hpc.train", "host": socket.gethostname(), "pid": os.getpid(), "since": time.time(),
                  "job": os.environ.get("SLURM_JOB_ID")}  # fmt: skip
        write_json(run.holder, holder)
        yield


def _run(config: Config, run: RunDir) -> int:
    started = time.time()
    run.create()
    attempt = run.new_attempt()
    _end_old_members(run)
    console = Console(run, config.trainer.steps)
    with console.logging_to(attempt / "supervisor.log"):
        done = read_json(run.done)
        if done and done["version"] >= config.trainer.steps:
            log.info("the run in %s is complete already, at step %d", run.path, done["version"])
            return 0
        run.done.unlink(missing_ok=True)
        log.info("run directory %s", run.path)
        try:
            config.model.path = base_model.ensure(config.model, trainer_python(config), attempt / "make_base.log")
        except RuntimeError as error:
            log.error("%s", error)
            return 1
        _write_run_json(config, run)
        supervisor = Supervisor(run, config.launch, local_steps(config, run.path), console.show)
        action = supervisor.supervise()
        record = {"started": started, "ended": time.time(), "outcome": action.name.lower(), "events": supervisor.events}
        write_json(attempt / "attempt.json", record)
        summary = summarize(run)
        write_json(run.summary, summary)
        console.end(action.name.lower(), summary)
    return EXIT[action]


def _write_run_json(config: Config, run: RunDir) -> None:
    """What every member reads. A resumed run keeps its id and date; its config may differ in what may differ."""
    known = read_json(run.run_json)
    write_json(run.run_json, {
        "id": known.get("id") or secrets.token_hex(4),
        "created": known.get("created") or time.time(),
        "version": atropos_hpc.__version__,
        "command": sys.argv,
        "config": dataclasses.asdict(config),
    })  # fmt: skip


def _end_old_members(run: RunDir) -> None:
    """Members of a supervisor that was killed notice it and end; give them time, then end them, and clear the rendezvous."""
    deadline = time.monotonic() + OLD_MEMBERS_S
    while (left := _alive_here(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        log.warning("ending pid %d, left from an earlier attempt", pid)
        process.kill(pid)
    for path in run.members.glob("*.json"):
        path.unlink()
    write_json(run.roster, {})


def _alive_here(run: RunDir) -> list[int]:
    """Pids on this machine of members of this run: by their record, and only if their command line names the run directory."""
    found = []
    for path in run.members.glob("*.json"):
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            command = Path(f"/proc/{state['pid']}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if state["host"] == socket.gethostname() and state["pid"] != os.getpid() and str(run.path).encode() in command:
            found.append(state["pid"])
    return found
