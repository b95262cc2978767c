"""The process that runs a run's steps: it starts, watches and restarts them, and decides the end.

    start every step
    until the run is over:
        publish the roster; kill steps that hang
        for each step that has ended: apply restart_policy.TABLE
        start what is due
        once the run is to end early (a signal, preemption): wait for the learner, which saves
    end every process, whatever happened

It is the same on one machine and in a Slurm job, where steps are srun's. Each rollout job of a
split run has a supervisor of its own, for its one node: it follows the roster instead of publishing
it, and ends with the run. The mechanics are in runtime/supervision.py.
"""

import contextlib
import logging
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import (
    AgentState,
    AnyMember,
    Done,
    EnvironmentState,
    EvaluatorState,
    RestartEvent,
    RolloutJobState,
    StopRequest,
    SupervisorState,
    TrainerState,
    TrajectoriesState,
    Wait,
)
from atropos_hpc.launch import failure_cause
from atropos_hpc.launch.run_progress import RunProgress
from atropos_hpc.launch.slurm.slurm_job import Job
from atropos_hpc.launch.steps import Step
from atropos_hpc.runtime import process, restart_policy
from atropos_hpc.runtime.deadlines import save_timeout_s
from atropos_hpc.runtime.hang_detection import ProgressWatch, SilenceWatch, describe_waits
from atropos_hpc.runtime.membership import (
    Member,
    RosterPublisher,
    post_request,
    read_members,
    withdraw_request,
)
from atropos_hpc.runtime.process import ProcessSpec
from atropos_hpc.runtime.restart_policy import Action, Event, ExitFacts, Kind, Phase, RunEnding
from atropos_hpc.runtime.run_dir import RunDir, read_intact
from atropos_hpc.runtime.slurm import SlurmError
from atropos_hpc.runtime.supervision import (
    Exit,
    Limits,
    ManagedProcess,
    NotReady,
    SupervisionEngine,
)

log = logging.getLogger(__name__)

TICK_S = 0.1
UNUSABLE_S = 600.0  # how long the run directory may be unusable, by a full disk or repairs
REASONS = {
    Action.REQUEUE: "Slurm takes the nodes",
    Action.STOP: "asked to stop",
    Action.FAIL: "the run cannot go on",
}

Watch = Callable[[dict[str, AnyMember]], Action | None]


class Supervisor:
    """One supervision of one run.

    `watch` is called at every look at the members and may end the run. `job` is the Slurm job that
    this process is in. `leads`: publishes the roster, which one supervisor of a run does.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        steps: Sequence[Step],
        watch: Watch,
        job: Job | None = None,
        leads: bool = True,
    ) -> None:
        self.run, self.watch, self.job, self.leads = run, watch, job, leads
        launch = self.launch = config.launch
        self.save_timeout_s = save_timeout_s(config)
        self.engine = SupervisionEngine(run.logs, RunProgress(run).read, self._is_done)
        limits = Limits(
            restarts=launch.restarts,
            backoff_s=launch.backoff_s,
            grace_s=launch.grace_s,
            leave_s=self.save_timeout_s,
        )
        self.steps = {step.name: step for step in steps}
        for step in steps:
            # A learner may take long to load and for a step: only its steps count.
            own = replace(limits, healthy_s=math.inf) if step.kind == "trainer" else limits
            # A node agent passes requests for stack traces on, also from behind an srun.
            managed = ManagedProcess(
                step.name, step.kind, self._specs_of(step), own, forwards_dumps=True
            )
            self.engine.add(managed)
        self.roster = RosterPublisher(run)
        self.events: list[RestartEvent] = []  # restarts, for the summary
        self.error: str | None = None  # why the run fails, once it does
        self.silence = SilenceWatch()
        self.progress = ProgressWatch(launch.start_timeout_s, launch.step_timeout_s)
        self.ending = RunEnding(self.save_timeout_s)
        self.member: Member[SupervisorState] | Member[RolloutJobState] | None = None
        self.stop_signals = 0
        self.warned = False  # by Slurm, of the time limit
        self._unusable_since: float | None = None

    def supervise(self) -> Action:
        """Run to the end. Returns FINISH, STOP, REQUEUE or FAIL, when no process is left.

        Raises OSError when the run directory has been unusable for UNUSABLE_S.
        """
        process.adopt_orphans()
        if self.leads:
            withdraw_request(self.run, StopRequest)
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, self._on_signal) for number in signals}
        member = self.member = self._join()
        end: Action | None = None
        try:
            while end is None:
                end = self._round()
                self.roster.await_change(TICK_S)
        finally:
            member.update(state="ending")
            self._publish()
            self.engine.end_all(self.launch.grace_s, last=Kind.TRAJECTORIES.value)
            failed = end is Action.FAIL
            member.leave(
                outcome=end.name.lower() if end else None, error=self.error if failed else None
            )
            self._publish()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return end

    def _join(self) -> Member[SupervisorState] | Member[RolloutJobState]:
        job = self.job.id if self.job else None
        if self.leads:
            return Member(self.run, SupervisorState(state="running", job=job), "trainer0")
        return Member(self.run, RolloutJobState(state="running", job=job), next(iter(self.steps)))

    def _round(self) -> Action | None:
        """One look at everything. While the run directory is unusable, only signals are handled."""
        try:
            end = self._handle_signals() or self._look()
        except OSError as error:
            now = time.monotonic()
            if self._unusable_since is None:
                log.error(
                    "cannot use the run directory: %s; trying again for %.0f s", error, UNUSABLE_S
                )
                self._unusable_since = now
            if now - self._unusable_since > UNUSABLE_S:
                raise
            return None
        self._unusable_since = None
        return end

    def _look(self) -> Action | None:
        """Look at members and steps. Returns how the run ends, once that is decided."""
        members = self.roster.publish() if self.leads else {}
        end = self.watch(members)
        if end is Action.FINISH:
            return end
        if end is Action.FAIL and self.error is None:
            self.error = self._explain("the rollout nodes have ended", lambda member: True)
        if end is not None:
            self._begin_ending(end)
        for managed in self.engine.processes:
            managed.ready = managed.ready or self._has_reported(managed, members.values())
        self._kill_hung(members)
        for ended in self.engine.poll():
            if (end := self._on_exit(ended)) is not None:
                return end
        return None

    def _publish(self) -> None:
        """Publish the roster once more; at the end of a run it may fail."""
        if self.leads:
            with contextlib.suppress(OSError):
                self.roster.publish(at_once=True)

    # --- steps

    def _specs_of(self, step: Step) -> Callable[[], Sequence[ProcessSpec]]:
        started = False

        def specs() -> Sequence[ProcessSpec]:
            """What to start. Before a restart, kill what a killed srun has left of the step."""
            nonlocal started
            if self.job is not None and step.nodes and started:
                try:
                    self.job.end_step(step.name)
                except SlurmError as error:
                    raise NotReady(str(error)) from None
            started = True
            return step.processes

        return specs

    def _on_exit(self, ended: Exit) -> Action | None:
        """Apply the restart policy. Returns how the run ends, if it ends now."""
        step = self.steps[ended.managed.name]
        names = [m.name for m in self.roster.members.values() if _belongs(m, step)]
        self.roster.mark_ended(*names)
        kind = self._kind_of(ended.managed)
        cause = self.job.termination_cause(step.nodes) if self.job is not None else None
        facts = ExitFacts(
            ended.code,
            hung=ended.hung,
            done=self._is_done(),
            restarts_left=ended.managed.life.restarts_left,
            cause=cause,
            slurm=self.job is not None,
        )
        event = restart_policy.classify(kind, facts)
        action = restart_policy.TABLE[kind, event, self._phase(ended)]
        self._log_exit(ended, event, action)
        if action is Action.FAIL and self.error is None:
            how = f"{ended.child.name} {ended.how} ({event.label})"
            self.error = self._explain(how, lambda member: _belongs(member, step))
        if ended.code == process.STUCK:
            self._explain_wait_timeout(ended.managed)
        if action is Action.RESTART_ALL:
            for managed in self.engine.processes:
                if managed.kind == Kind.AGENT.value:
                    self.engine.recycle(managed)
        if action in (Action.RESTART, Action.RESTART_ALL):
            ended.managed.life.restart(time.monotonic())
        elif action is Action.FINISH:
            return action
        elif action is Action.END:
            return self.ending.action
        elif action is not Action.DROP:
            self._begin_ending(action)
            return None if self._learner_runs() else self.ending.action
        return None

    def _explain(self, how: str, is_own: Callable[[AnyMember], bool]) -> str:
        members = read_members(self.run)
        return failure_cause.explain(how, [m for m in members if is_own(m)], members)

    def _kind_of(self, managed: ManagedProcess) -> Kind:
        others = (m for m in self.engine.processes if m is not managed and m.active)
        if managed.kind == Kind.AGENT.value and all(m.kind != managed.kind for m in others):
            return Kind.LAST_AGENT
        return Kind(managed.kind)

    def _phase(self, ended: Exit) -> Phase:
        if self.ending.action is not None:
            return Phase.ENDING
        return Phase.RUNNING if ended.ready else Phase.STARTING

    def _log_exit(self, ended: Exit, event: Event, action: Action) -> None:
        """Log what ended, how, and what is done about it; with the end of its log if it crashed."""
        if action is Action.FINISH:
            log.info("the learner is done")
            return
        name = ended.child.name
        log.warning("%s %s (%s): %s", name, ended.how, event.label, action.value)
        if action in (Action.RESTART, Action.RESTART_ALL):
            self.events.append(
                RestartEvent(time=time.time(), who=name, how=ended.how, done=action.value)
            )
        if action is Action.FAIL or ended.crashed:
            for path in (ended.child.log, _task_log(ended.child.log)):
                if path is not None:
                    log.error("the end of %s:\n%s", path, process.tail(path))

    def _is_done(self) -> bool:
        return read_intact(self.run.done, Done) is not None

    # --- hangs

    def _has_reported(self, managed: ManagedProcess, members: Iterable[AnyMember]) -> bool:
        step = self.steps[managed.name]
        return any(m.alive and m.reported and _belongs(m, step) for m in members)

    def _kill_hung(self, members: dict[str, AnyMember]) -> None:
        """Kill each step that hangs; its exit is handled as any other."""
        own_kinds = (TrainerState, AgentState, TrajectoriesState)
        own = [member for member in members.values() if isinstance(member, own_kinds)]
        found: list[tuple[AnyMember, str]] = [
            (member, "has sent no heartbeat for too long") for member in self.silence.hung(own)
        ]
        ranks = [member for member in own if isinstance(member, TrainerState) and member.alive]
        if (stalled_s := self.progress.stalled_s(ranks)) is not None:
            for rank in ranks:
                why = f"has been in state {rank.state}, step {rank.step}, for {stalled_s:.0f} s"
                found.append((rank, why))
        for member, why in found:
            for managed in self.engine.processes:
                own_step = _belongs(member, self.steps[managed.name]) and managed.children
                if own_step and self.engine.kill_hung(managed, f"{member.name} {why}"):
                    self._log_waits()

    def _explain_wait_timeout(self, waited: ManagedProcess) -> None:
        """Log who waits for whom, and have the processes that were waited for dump their stacks."""
        self._log_waits()
        self.engine.dump_stacks(m for m in self.engine.processes if m is not waited)

    def _log_waits(self) -> None:
        for line in describe_waits(self.roster.members.values(), time.time()):
            log.error("%s", line)

    # --- ending early

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGUSR2:
            self.warned = True
        else:
            self.stop_signals += 1

    def _handle_signals(self) -> Action | None:
        """The first signal asks the learner for a checkpoint; a second one ends the run at once."""
        if self.warned:
            self._begin_ending(Action.REQUEUE)
        if self.stop_signals and self.ending.action is None:
            cause = self.job.termination_cause(()) if self.job is not None else None
            self._begin_ending(Action.REQUEUE if cause is Event.PREEMPTED else Action.STOP)
        if not self._learner_runs():
            return self.ending.action
        if self.stop_signals > 1 or self.ending.expired(time.monotonic()):
            log.warning(
                "ending without waiting for the learner to save: a resume starts from the last"
                " checkpoint; launch.save_timeout_s is the time that it had"
            )
            return self.ending.action
        return None

    def _learner_runs(self) -> bool:
        return any(m.kind == Kind.TRAINER.value and m.children for m in self.engine.processes)

    def _begin_ending(self, action: Action) -> None:
        """Have the learner save and leave, after which the run ends. The first decision stays."""
        first = self.ending.request(action, time.monotonic())
        if not first or not self.leads or not self._learner_runs():
            return
        log.warning(
            "%s: the learner saves a checkpoint, for at most %.0f s; then: %s",
            REASONS[action],
            self.save_timeout_s,
            action.value,
        )
        if self.member is not None:
            now = time.time()
            deadline = now + self.save_timeout_s
            self.member.show_wait(Wait("a checkpoint", "the learner", now, deadline))
        try:
            post_request(self.run, StopRequest())
        except OSError as error:  # a full disk
            log.warning("cannot write the request to stop: %s; sending a signal instead", error)
            for managed in self.engine.processes:
                if managed.kind == Kind.TRAINER.value:
                    for child in managed.children:
                        child.ask_to_end()


def _belongs(member: AnyMember, step: Step) -> bool:
    if step.kind == Kind.AGENT.value:
        on_node = isinstance(member, (AgentState, EnvironmentState, EvaluatorState))
        return on_node and member.node == step.processes[0].variables[process.NODE]
    return member.kind == step.kind


def _task_log(srun_log: Path) -> Path | None:
    """The log of the task that failed first according to srun, if this is the log of an srun."""
    name = srun_log.name.removesuffix(".srun.log")
    if name == srun_log.name:
        return None
    first = re.search(r"error: .*task (\d+): ", process.tail(srun_log, 50))
    task = srun_log.with_name(f"{name}-{first[1] if first else 0}.log")
    return task if task.exists() else srun_log.with_name(f"{name}.log")
