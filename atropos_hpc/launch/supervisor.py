"""The one process that starts a run's steps, watches them, restarts what may be restarted, and decides the end.

start every step
until the run is over:
    look at the members, and publish the roster
    for each step that has ended: apply plan.TABLE
    start what is due again
    meet a person's or the system's wish to stop
end every process, whatever happened
"""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from atropos_hpc import process, rendezvous
from atropos_hpc.config import LaunchConf
from atropos_hpc.launch import plan
from atropos_hpc.launch.allocation import Step
from atropos_hpc.launch.plan import Action
from atropos_hpc.run_dir import RunDir, read_json

log = logging.getLogger(__name__)

TICK_S = 0.1
HEALTHY_S = 300.0  # a step that has run this long has made progress: its restarts are counted anew


@dataclass
class Running:
    """A step and its processes now."""

    step: Step
    children: list[process.Child] = field(default_factory=list)
    started: float = 0.0
    due: float | None = 0.0  # when to start it; None while it runs
    restarts: int = 0  # since the last progress
    progress: Any = None


class Supervisor:
    """One supervision of one run. `show` is called at every look with the members."""

    def __init__(self, run: RunDir, launch: LaunchConf, steps: list[Step], show: Callable[[dict[str, Any]], None]) -> None:
        self.run, self.launch, self.show = run, launch, show
        self.steps = {step.name: Running(step) for step in steps}
        self.leader = rendezvous.Leader(run)
        self.events: list[dict[str, Any]] = []  # what died and what was done, for the summary
        self.wishes = 0  # signals to stop, so far
        self.stop_deadline: float | None = None

    def supervise(self) -> Action:
        """Run to the end. Returns FINISH, STOP or FAIL; no process of the run is left when it does."""
        process.adopt_orphans()
        rendezvous.withdraw(self.run, "stop")
        previous = {number: signal.signal(number, self._wish) for number in (signal.SIGINT, signal.SIGTERM)}
        member = rendezvous.Member(self.run, "supervisor", "trainer0", state="running")
        try:
            while True:
                self.show(self.leader.look())
                for running in self.steps.values():
                    if (end := self.look_at(running)) is not None:
                        return end
                    if running.due is not None and time.monotonic() >= running.due:
                        self.start(running)
                if (end := self.meet_wishes()) is not None:
                    return end
                time.sleep(TICK_S)
        finally:
            self.end_all()
            member.leave()
            self.leader.look()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self, running: Running) -> None:
        """Start all processes of a step. The step id tells this start's members from an earlier one's."""
        running.due, running.started, running.progress = None, time.monotonic(), self.progress()
        identity = f"{running.step.name}-{time.time_ns()}"
        for each in running.step.processes:
            variables = {**each.variables, "ATROPOS_HPC_STEP": identity, "PYTHONUNBUFFERED": "1"}
            running.children.append(process.start(each.name, each.command, self.run.logs / f"{each.name}.log", variables))
        log.info("started %s, pid %s", running.step.name, ", ".join(str(child.pid) for child in running.children))

    def look_at(self, running: Running) -> Action | None:
        """What has become of a step: None while it runs or may run again, else how the run ends."""
        codes = [child.poll() for child in running.children]
        if not running.children or all(code is None for code in codes):
            return None
        kind, done = running.step.kind, bool(read_json(self.run.done))
        if None in codes and (done or not any(codes)):
            return None  # ranks leave one after the other
        died = next((child for child in running.children if child.poll()), running.children[0])
        code = died.poll()
        assert code is not None
        process.end(running.children, self.launch.grace_s if done or code == plan.STOPPED else 0.5)
        process.end_orphans(child for other in self.steps.values() for child in other.children)
        running.children = []
        self.leader.ended(*(name for name, member in self.leader.members.items() if self._belongs(member, running.step)))
        if self.progress() != running.progress or time.monotonic() - running.started > HEALTHY_S:
            running.restarts = 0
        ended = plan.how_it_ended(kind, code, done=done, tries_left=self.launch.restarts - running.restarts)
        action = plan.TABLE[kind, ended]
        self.tell(died, code, ended, action)
        if action is not Action.RESTART:
            return action
        running.due = time.monotonic() + plan.backoff(self.launch.backoff_s, running.restarts)
        running.restarts += 1
        return None

    def tell(self, died: process.Child, code: int, ended: str, action: Action) -> None:
        """Log what ended, how, and what is done about it; with the end of its log when it went wrong."""
        if action is Action.FINISH:
            log.info("the learner is done")
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        log.warning("%s %s (%s): %s", died.name, how, ended, action.value)
        if action is Action.RESTART:
            self.events.append({"time": time.time(), "who": died.name, "how": how, "done": action.value})
        if action is Action.FAIL or (code > 0 and code != plan.STOPPED):
            log.error("the end of %s:\n%s", died.log, process.tail(died.log))

    def progress(self) -> Any:
        """What grows as the run gets on: the newest durable step."""
        return read_json(self.run.checkpoints / "latest.json").get("step")

    def _belongs(self, member: dict[str, Any], step: Step) -> bool:
        if step.kind == "agent":
            node = step.processes[0].variables["ATROPOS_HPC_NODE"]
            return member["node"] == node and member["kind"] in ("agent", "environment", "evaluator")
        return bool(member["kind"] == step.kind)

    # --- stopping

    def _wish(self, number: int, _frame: Any) -> None:
        self.wishes += 1

    def meet_wishes(self) -> Action | None:
        """A first signal asks the learner for a checkpoint and gives it time; a second one ends the run at once."""
        if self.wishes == 0:
            return None
        if self.stop_deadline is None:
            patience = self.launch.save_timeout_s
            log.warning("asked to stop: the learner saves a checkpoint, at most %.0f s; once more ends the run at once", patience)
            rendezvous.ask(self.run, "stop")
            self.stop_deadline = time.monotonic() + patience
        if not self.steps["trainer"].children:
            return Action.STOP
        if self.wishes > 1 or time.monotonic() > self.stop_deadline:
            log.warning("stopped without a new checkpoint; a resume goes back to the last one")
            return Action.STOP
        return None

    def end_all(self) -> None:
        """TERM, then KILL, to every process of the run, the trajectory server last; then to what they may have left."""
        for last in (False, True):
            steps = [running for running in self.steps.values() if (running.step.kind == "trajectories") == last]
            process.end((child for running in steps for child in running.children), self.launch.grace_s)
        while process.end_orphans([]):
            pass
