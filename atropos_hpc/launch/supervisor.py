"""The one process that starts a run's steps, watches them, restarts what may be restarted, and decides the end.

start every step
until the run is over:
    look at the members, and publish the roster; ask who hangs for its stacks, and end it
    for each step that has ended: apply restart_policy.TABLE
    start what is due again
    once the run is to end early (a person's wish, Slurm's warning, preemption): wait for the learner, which saves
end every process, whatever happened

It is the same on one machine and in a Slurm job, where steps are srun's. The rollout job of a split run has one of its own, for its one
node: it follows the roster instead of publishing it, and ends with the run.
"""

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atropos_hpc.config import LaunchConf
from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    EnvironmentState,
    EvaluatorState,
    RestartEvent,
    RolloutJobState,
    StopRequest,
    SupervisorState,
    TrainerState,
    TrajectoriesState,
)
from atropos_hpc.launch import restart_policy
from atropos_hpc.launch.restart_policy import Action
from atropos_hpc.launch.slurm.commands import SlurmError
from atropos_hpc.launch.slurm.slurm_job import Job
from atropos_hpc.launch.steps import Step
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member, RosterPublisher, post_request, withdraw_request
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.runtime.supervision import DUMP_S, Progress, Silence, waits

log = logging.getLogger(__name__)

TICK_S = 0.1
SLURM_AWAY_S = 5.0  # between tries while Slurm does not answer
FILES_AWAY_S = 600.0  # how long the run directory may be unusable: a full disk, a filesystem that is being repaired
HEALTHY_S = 300.0  # a step that has run this long has made progress: its restarts are counted anew
WHY = {
    Action.REQUEUE: "Slurm takes the nodes",
    Action.STOP: "asked to stop",
    Action.FAIL: "the run cannot go on",
}


@dataclass
class Running:
    """A step and its processes now."""

    step: Step
    children: list[process.Child] = field(default_factory=list)
    started: float = 0.0
    due: float | None = (
        0.0  # when to start it; None while it runs, and when it is not to be started any more
    )
    leave_by: float | None = (
        None  # once one process has left in peace: until when the others may take to follow
    )
    restarts: int = 0  # since the last progress
    progress: Any = None
    hung: bool = False  # it was found hanging, and ended

    @property
    def wanted(self) -> bool:
        """Does it run, or will it?"""
        return bool(self.children) or self.due is not None


class Supervisor:
    """One supervision of one run. `watch` is called at every look, and may end the run; `job` is the Slurm job around us.

    `leads`: publishes the roster. There is one supervisor that does.
    """

    def __init__(
        self, run: RunDir, launch: LaunchConf, steps: list[Step], watch: Callable[[dict[str, AnyMember]], Action | None],
        job: Job | None = None, leads: bool = True,
    ) -> None:  # fmt: skip
        self.run, self.launch, self.watch, self.job, self.leads = run, launch, watch, job, leads
        self.steps = {step.name: Running(step) for step in steps}
        self.leader = RosterPublisher(run)
        self.events: list[RestartEvent] = []  # what died and what was done, for the summary
        self.silence, self.learning = (
            Silence(),
            Progress(launch.start_timeout_s, launch.step_timeout_s),
        )
        self.wishes = 0  # signals to stop, so far
        self.warned = False  # by Slurm, of the time limit
        self.ending: Action | None = None  # how the run ends once the learner has saved
        self.patience = 0.0  # until when it may take to save, monotonic
        self.away_since: float | None = None  # the run directory, monotonic

    def supervise(self) -> Action:
        """Run to the end. Returns FINISH, STOP, REQUEUE or FAIL; no process of the run is left when it does.

        Raises OSError when the run directory has been unusable for FILES_AWAY_S.
        """
        process.adopt_orphans()
        if self.leads:
            withdraw_request(self.run, StopRequest)
        previous = {
            number: signal.signal(number, self._wish)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        }
        job = self.job.id if self.job else None
        member: Member[SupervisorState] | Member[RolloutJobState]
        if self.leads:
            member = Member(self.run, SupervisorState(state="running", job=job), "trainer0")
        else:
            member = Member(
                self.run, RolloutJobState(state="running", job=job), next(iter(self.steps))
            )
        end: Action | None = None
        try:
            while end is None:
                end = self._round()
                time.sleep(TICK_S)
        finally:
            member.update(state="ending")
            self._publish()
            self._end_all()
            member.leave(outcome=end.name.lower() if end else None)
            self._publish()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return end

    def _round(self) -> Action | None:
        """One look at everything. While the run directory cannot be used, only what people and Slurm ask for is met."""
        try:
            end = self._meet_wishes() or self._look()
        except OSError as error:
            now = time.monotonic()
            if self.away_since is None:
                log.error(
                    "the run directory cannot be used: %s; it is tried again for %.0f s",
                    error,
                    FILES_AWAY_S,
                )
                self.away_since = now
            if now - self.away_since > FILES_AWAY_S:
                raise
            return None
        self.away_since = None
        return end

    def _look(self) -> Action | None:
        """Members, then steps: how the run ends, once that is decided."""
        members = self.leader.publish() if self.leads else {}
        end = self.watch(members)
        if end is Action.FINISH:
            return end
        if end is not None:
            self._begin_ending(end)
        self._end_what_hangs(members)
        for running in self.steps.values():
            if (end := self._look_at(running)) is not None:
                return end
            if running.due is not None and time.monotonic() >= running.due:
                self._start(running)
        return None

    def _publish(self) -> None:
        """The roster, once more; at the end of a run it no longer matters whether it can be written."""
        if self.leads:
            with contextlib.suppress(OSError):
                self.leader.publish(at_once=True)

    # --- steps

    def _start(self, running: Running) -> None:
        """Start all processes of a step. The step id tells this start's members from an earlier one's."""
        if self.job is not None and running.step.nodes and running.started:
            try:
                self.job.end_step(running.step.name)  # its srun may have been killed without it
            except SlurmError as error:  # Slurm does not answer; sooner or later it will
                log.warning("%s is not started yet: %s", running.step.name, error)
                running.due = time.monotonic() + SLURM_AWAY_S
                return
        running.progress, running.hung = self._progress(), False
        identity = f"{running.step.name}-{time.time_ns()}"
        for each in running.step.processes:
            variables = {**each.variables, "ATROPOS_HPC_STEP": identity, "PYTHONUNBUFFERED": "1"}
            log_path = self.run.logs / f"{each.name}.log"
            running.children.append(
                process.start(each.name, each.command, log_path, variables, end_by=each.end_by)
            )
        running.due, running.started, running.leave_by = None, time.monotonic(), None
        where = f" on {', '.join(running.step.nodes)}" if running.step.nodes else ""
        log.info(
            "started %s%s, pid %s",
            running.step.name,
            where,
            ", ".join(str(child.pid) for child in running.children),
        )

    def _look_at(self, running: Running) -> Action | None:
        """What has become of a step: None while it runs or may run again, or while the learner saves; else how the run ends."""
        if all(child.poll() is None for child in running.children):  # there may be none
            return None
        done = bool(read_json(self.run.done))
        died = self._first_dead(running, done)
        if died is None:
            return None
        code = died.process.returncode
        if code == process.STUCK:
            self._shake_up(running)
        self._clear_away(running, self.launch.grace_s if done or code == process.STOPPED else 0.5)
        if self._progress() != running.progress or time.monotonic() - running.started > HEALTHY_S:
            running.restarts = 0
        fate = self.job.fate(running.step.nodes) if self.job is not None else None
        ended = restart_policy.how_it_ended(
            running.step.kind,
            code,
            done=done,
            tries_left=self.launch.restarts - running.restarts,
            fate=fate,
        )
        if (
            ended == "crashed too often"
            and self.job is not None
            and (running.hung or code == process.STUCK)
        ):
            ended = "hung too often"
        end = self._apply(running, died, ended)
        running.children = []
        return end

    def _first_dead(self, running: Running, done: bool) -> process.Child | None:
        """The process whose end is the end of its step; None while the step goes on: ranks leave in peace one after the other."""
        ended = [child for child in running.children if child.poll() is not None]
        failed = [child for child in ended if child.poll()]
        if len(ended) < len(running.children) and (done or not failed):
            now = time.monotonic()
            running.leave_by = running.leave_by or now + self.launch.save_timeout_s
            if now < running.leave_by:
                return None
        return (failed or ended)[0]

    def _clear_away(self, running: Running, grace_s: float) -> None:
        """End what is left of a step, and tell the others that its members are gone."""
        process.end(running.children, grace_s)
        process.end_orphans(child for other in self.steps.values() for child in other.children)
        self.leader.mark_ended(
            *(
                name
                for name, member in self.leader.members.items()
                if _belongs(member, running.step)
            )
        )

    def _apply(self, running: Running, died: process.Child, ended: str) -> Action | None:
        """The table's answer to a step that has ended. What ends the run waits for the learner to save, where there still is one."""
        kind, code = running.step.kind, died.process.returncode
        others = [
            other
            for other in self.steps.values()
            if other.step.kind == "agent" and other is not running and other.wanted
        ]
        action = restart_policy.TABLE[
            "last agent" if kind == "agent" and not others else kind, ended
        ]
        if self.ending is not None and action is not Action.FINISH and kind != "trajectories":
            if kind == "trainer" and code != process.STOPPED:
                log.error(
                    "the learner ended with exit code %d instead of saving; the end of its log:\n%s",
                    code,
                    process.tail(died.log),
                )
            return self.ending if kind == "trainer" else None
        self._tell(died, ended, action)
        if action is Action.RESTART:
            running.due = time.monotonic() + process.backoff(
                self.launch.backoff_s, running.restarts
            )
            running.restarts += 1
        elif action is Action.FINISH or kind == "trainer":
            return action
        elif action is not Action.DROP:
            self._begin_ending(action)
        return None

    def _tell(self, died: process.Child, ended: str, action: Action) -> None:
        """Log what ended, how, and what is done about it; with the end of its log when it went wrong."""
        if action is Action.FINISH:
            log.info("the learner is done")
            return
        code = died.process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        log.warning("%s %s (%s): %s", died.name, how, ended, action.value)
        if action is Action.RESTART:
            self.events.append(
                RestartEvent(time=time.time(), who=died.name, how=how, done=action.value)
            )
        if action is Action.FAIL or (code > 0 and code != process.STOPPED):
            for path in (died.log, _task_log(died.log)):
                if path is not None:
                    log.error("the end of %s:\n%s", path, process.tail(path))

    def _progress(self) -> Any:
        """What grows as the run gets on: the newest durable step."""
        return read_json(self.run.checkpoints / "latest.json").get("step")

    # --- what hangs

    def _end_what_hangs(self, members: dict[str, AnyMember]) -> None:
        """Have each step that hangs tell its stacks, and end it; `_look_at` then sees to the rest."""
        own = [
            m
            for m in members.values()
            if isinstance(m, (TrainerState, AgentState, TrajectoriesState))
        ]
        found: dict[str, tuple[AnyMember, str]] = {
            m.name: (m, "has given no sign for too long") for m in self.silence.hung(own)
        }
        ranks = [m for m in own if isinstance(m, TrainerState) and m.alive]
        if (missing := self.learning.missing_s(ranks)) is not None:
            found |= {
                m.name: (
                    m,
                    f"has been in state {m.state}, step {m.step}, for {missing:.0f} s",
                )
                for m in ranks
            }
        for member, why in found.values():
            running = next(
                (r for r in self.steps.values() if r.children and _belongs(member, r.step)), None
            )
            if running is None or running.hung:
                continue
            log.error("%s %s: it tells its stacks in its log, and is ended", member.name, why)
            self._tell_waits()
            running.hung = True
            self._ask_for_stacks([running])
            for child in running.children:
                child.signal(signal.SIGKILL)

    def _shake_up(self, stuck: Running) -> None:
        """The learner waited in vain: the others tell what they wait for, and their stacks; then the rollout nodes start anew, too."""
        self._tell_waits()
        others = [running for running in self.steps.values() if running is not stuck]
        self._ask_for_stacks(others)
        for running in others:
            if running.step.kind == "agent":
                for child in running.children:
                    child.ask_to_end()

    def _ask_for_stacks(self, steps: list[Running]) -> None:
        """Under Slurm these processes are sruns, which pass the signal on. An agent passes it on to all on its node."""
        for running in steps:
            for child in running.children:
                process.request_stacks(child.pid)
        time.sleep(DUMP_S)

    def _tell_waits(self) -> None:
        for line in waits(self.leader.members.values(), time.time()):
            log.error("%s", line)

    # --- ending early

    def _wish(self, number: int, _frame: Any) -> None:
        if number == signal.SIGUSR2:
            self.warned = True
        else:
            self.wishes += 1

    def _meet_wishes(self) -> Action | None:
        """A first signal asks the learner for a checkpoint and gives it time; a second one to stop ends the run at once."""
        if self.warned:
            self._begin_ending(Action.REQUEUE)
        if self.wishes and self.ending is None:
            self._begin_ending(Action.STOP)
            if self.job is not None and self.job.fate(()) == "preempted":
                self.ending = Action.REQUEUE
        if self.ending is None:
            return None
        trainer = self.steps.get("trainer")
        if trainer is None or not trainer.children:
            return self.ending
        if self.wishes > 1 or time.monotonic() > self.patience:
            log.warning(
                "the learner is not waited for any longer; a resume goes back to the last checkpoint that it wrote"
            )
            return self.ending
        return None

    def _begin_ending(self, action: Action) -> None:
        """From now on the learner saves and leaves, and then the run ends that way. What was decided first stays."""
        if self.ending is not None:
            return
        self.ending, self.patience = action, time.monotonic() + self.launch.save_timeout_s
        if self.leads:
            log.warning(
                "%s: the learner saves a checkpoint, at most %.0f s (%s)",
                WHY[action],
                self.launch.save_timeout_s,
                action.value,
            )
            try:
                post_request(self.run, StopRequest())
            except OSError as error:  # a full disk; a signal tells the learner the same
                log.warning("cannot write the request to stop: %s", error)
                for child in self.steps["trainer"].children:
                    child.ask_to_end()

    def _end_all(self) -> None:
        """Have every process of the run end, the trajectory server last; then what they may have left."""
        for last in (False, True):
            steps = [
                running
                for running in self.steps.values()
                if (running.step.kind == "trajectories") == last
            ]
            process.end(
                (child for running in steps for child in running.children), self.launch.grace_s
            )
        while process.end_orphans([]):
            pass


def _belongs(member: AnyMember, step: Step) -> bool:
    if step.kind == "agent":
        node = step.processes[0].variables["ATROPOS_HPC_NODE"]
        return member.node == node and isinstance(
            member, (AgentState, EnvironmentState, EvaluatorState)
        )
    return member.kind == step.kind


def _task_log(srun_log: Path) -> Path | None:
    """The log of the task that srun says went wrong first, where the process was an srun."""
    name = srun_log.name.removesuffix(".srun.log")
    if name == srun_log.name:
        return None
    first = re.search(r"error: .*task (\d+): ", process.tail(srun_log, 50))
    task = srun_log.with_name(f"{name}-{first[1] if first else 0}.log")
    return task if task.exists() else srun_log.with_name(f"{name}.log")
