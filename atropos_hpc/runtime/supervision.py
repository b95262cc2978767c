"""The supervision engine: starts processes, watches them, backs off, counts restarts, and kills
those that hang. The supervisor of a run and every node agent use it.

    engine.poll() --> Exit --> the owner consults its restart policy --> restart() or drop()

`Lifecycle` is the pure core: the state of one managed process as a function of events and times.

    WAITING --started--> RUNNING --ended--> ENDED --restart--> WAITING
                           |  ^               '-----drop-----> DROPPED
                  intervene|  |end time reached: killed, or asked to end
                           v  |
                         DUMPING

Intervening comes in two steps, because stack traces need time to be written: the process dumps its
stack traces to its log, and `dump_s` seconds later it is killed (or asked to end).
"""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from atropos_hpc.runtime import out_of_memory, process
from atropos_hpc.runtime.process import Child, ProcessSpec

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0


@dataclass(frozen=True)
class Limits:
    """The times and counts by which processes are supervised."""

    restarts: int  # without progress, before the crash limit is reached
    backoff_s: float  # before the first restart; doubles with each further one
    grace_s: float = 0.0  # for the rest of a process whose first part has ended as asked
    leave_s: float = 0.0  # between the first and the last rank that ends with success
    healthy_s: float = 300.0  # running for this long counts as progress
    dump_s: float = 2.0  # for stack traces to be written
    not_ready_s: float = 5.0  # before another try to start what was not ready to start


def backoff(base_s: float, restarts: int) -> float:
    """Seconds before the next restart, after `restarts` restarts without progress.

    >>> [backoff(1.0, n) for n in (0, 1, 2, 10)]
    [1.0, 2.0, 4.0, 60.0]
    """
    return float(min(LONGEST_BACKOFF_S, base_s * 2**restarts))


class State(Enum):
    """What a managed process is doing."""

    WAITING = "waiting to be started"
    RUNNING = "running"
    DUMPING = "dumping its stack traces"
    KILLED = "killed, and not reaped yet"
    ENDED = "ended"
    DROPPED = "not to be started again"


@dataclass
class Lifecycle:
    """The pure state machine of one managed process. Times are monotonic seconds."""

    limits: Limits
    state: State = State.WAITING
    due: float = float("-inf")  # when to start
    started_at: float = 0.0
    end_at: float = 0.0  # when dumping is over
    kill: bool = False  # whether the process is then killed, or only asked to end
    hung: bool = False  # whether this start was found to hang
    restarts: int = 0  # since the last progress
    progress: object = None  # as it was at the start

    def is_due(self, now: float) -> bool:
        return self.state is State.WAITING and now >= self.due

    def postpone(self, now: float) -> None:
        """The process was due and cannot be started yet."""
        self.due = now + self.limits.not_ready_s

    def start(self, now: float, progress: object) -> None:
        self.state, self.started_at, self.hung = State.RUNNING, now, False
        self.progress = progress

    def intervene(self, now: float, kill: bool) -> bool:
        """Begin to kill the process, or to ask it to end. False when that is under way already."""
        if self.state is not State.RUNNING:
            return False
        self.state, self.end_at = State.DUMPING, now + self.limits.dump_s
        self.kill = self.hung = kill
        return True

    def must_end(self, now: float) -> bool:
        """Whether the time for dumping is over; true once."""
        if self.state is not State.DUMPING or now < self.end_at:
            return False
        self.state = State.KILLED if self.kill else State.RUNNING
        return True

    def end(self, now: float, progress: object, stuck: bool = False) -> None:
        """The process has ended. Progress since its start resets the count of restarts; so does a
        long life, unless it was `stuck`, because a wait that is in vain is long, too."""
        healthy = not stuck and now - self.started_at > self.limits.healthy_s
        if healthy or progress != self.progress:
            self.restarts = 0
        self.state = State.ENDED

    @property
    def restarts_left(self) -> int:
        return max(0, self.limits.restarts - self.restarts)

    def restart(self, now: float) -> float:
        """Plan the next start; returns the seconds until then."""
        pause = backoff(self.limits.backoff_s, self.restarts)
        self.state, self.due = State.WAITING, now + pause
        self.restarts += 1
        return pause

    def drop(self) -> None:
        self.state = State.DROPPED


class NotReady(Exception):
    """A process cannot be started yet; the message says why."""


class ManagedProcess:
    """A unit that is started, watched and restarted as a whole: one process, or several such as the
    ranks of a learner.

    `specs` is called at each start and may raise NotReady. `forwards_dumps`: the process passes a
    request for stack traces on to its children itself.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        specs: Callable[[], Sequence[ProcessSpec]],
        limits: Limits,
        forwards_dumps: bool = False,
    ) -> None:
        self.name, self.kind, self.specs = name, kind, specs
        self.life = Lifecycle(limits)
        self.forwards_dumps = forwards_dumps
        self.children: list[Child] = []
        self.ready = False  # set by the owner once the process has reported for work
        self.leave_by: float | None = None

    @property
    def active(self) -> bool:
        """Whether it runs, or will run."""
        return self.life.state not in (State.ENDED, State.DROPPED)

    @property
    def pid(self) -> int | None:
        """The pid of its first process, while it runs."""
        return self.children[0].pid if self.children else None


@dataclass(frozen=True)
class Exit:
    """The end of a managed process. `child` is the process whose end caused it."""

    managed: ManagedProcess
    child: Child
    code: int  # negative: the signal that killed it
    lived_s: float
    ready: bool  # whether it had reported for work
    hung: bool  # whether it was killed because it hung
    out_of_memory: bool = False  # whether the kernel has killed it or a process of it

    @property
    def how(self) -> str:
        how = f"ended with exit code {self.code}"
        if self.code < 0:
            how = f"was killed by {signal.Signals(-self.code).name}"
        if self.out_of_memory:
            role = "trainer" if self.managed.kind in ("trainer", "trajectories") else "rollout"
            how += f", out of memory: its job needs more roles.{role}.mem"
        return how

    @property
    def crashed(self) -> bool:
        """Whether it ended by itself, in a way that its log should explain."""
        return self.code > 0 and self.code != process.STOPPED


@dataclass
class SupervisionEngine:
    """Supervises a set of managed processes.

    `progress` returns a value that changes when the run makes progress; `complete` says whether the
    run's work is done, so that processes may take their time to end.
    """

    logs: Path
    progress: Callable[[], object] = lambda: None
    complete: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    starter: Callable[..., Child] = process.start  # replaced in tests
    memory_kills: Callable[[], int] = out_of_memory.kills
    processes: list[ManagedProcess] = field(default_factory=list)
    _dumped_until: float = 0.0
    _kills_seen: int = field(init=False)

    def __post_init__(self) -> None:
        self._kills_seen = self.memory_kills()

    def add(self, *processes: ManagedProcess) -> None:
        """Supervise these, too; they start at the next `poll`."""
        self.processes += processes

    def running(self) -> Iterator[Child]:
        """All child processes that have not been reaped."""
        return (child for managed in self.processes for child in managed.children)

    def poll(self) -> Iterator[Exit]:
        """End what was found to hang, report what has ended, and start what is due.

        The caller decides about each Exit before it takes the next one: `managed.life.restart`, or
        else the process is dropped.
        """
        for managed in list(self.processes):
            if managed.life.must_end(self.clock()):
                self._end_now(managed)
            if (ended := self._reap(managed)) is not None:
                yield ended
                if managed.life.state is State.ENDED:
                    managed.life.drop()
            if managed.life.is_due(self.clock()):
                self._start(managed)

    def kill_hung(self, managed: ManagedProcess, why: str) -> bool:
        """Make a process dump its stack traces, then kill it; `poll` reports its end.

        `why` names it in the log. Returns False when that is under way already.
        """
        if not managed.life.intervene(self.clock(), kill=True):
            return False
        log.error("%s: dumping its stack traces to its log, then killing it", why)
        self.dump_stacks([managed])
        return True

    def recycle(self, managed: ManagedProcess) -> None:
        """Make a process dump its stack traces, then ask it to end; `poll` reports its end."""
        if managed.life.intervene(self.clock(), kill=False):
            self.dump_stacks([managed])

    def dump_stacks(self, processes: Iterable[ManagedProcess]) -> None:
        """Request the stack traces of these processes and, unless they do so, their descendants."""
        for managed in processes:
            self._dumped_until = self.clock() + managed.life.limits.dump_s
            for child in managed.children:
                descendants = [] if managed.forwards_dumps else process.descendants_of(child.pid)
                for pid in (child.pid, *descendants):
                    process.request_stacks(pid)

    def end_all(self, grace_s: float, last: str = "") -> None:
        """End every process, those of kind `last` after all others; then kill what they left."""
        time.sleep(max(0.0, self._dumped_until - self.clock()))
        for is_last in (False, True):
            group = [m for m in self.processes if (m.kind == last) == is_last]
            process.end((child for m in group for child in m.children), grace_s)
        while process.end_orphans([]):
            pass

    def _start(self, managed: ManagedProcess) -> None:
        step_id = f"{managed.name}-{time.time_ns()}"
        common = {process.STEP_ID: step_id, "PYTHONUNBUFFERED": "1"}
        try:
            progress = self.progress()
            for spec in managed.specs():
                managed.children.append(self._start_child(spec, common))
        except NotReady as why:
            log.warning("cannot start %s yet: %s", managed.name, why)
            managed.life.postpone(self.clock())
            return
        except OSError:  # the run directory is unusable; start all of it again later
            process.end(managed.children, 0.0)
            managed.children = []
            managed.life.postpone(self.clock())
            raise
        managed.ready, managed.leave_by = False, None
        managed.life.start(self.clock(), progress)
        pids = ", ".join(str(child.pid) for child in managed.children)
        log.info("started %s, pid %s", managed.name, pids)

    def _start_child(self, spec: ProcessSpec, common: Mapping[str, str]) -> Child:
        log_path = self.logs / f"{spec.name}.log"
        variables = {**spec.variables, **common}
        return self.starter(spec.name, spec.command, log_path, variables, end_by=spec.end_by)

    def _end_now(self, managed: ManagedProcess) -> None:
        for child in managed.children:
            if managed.life.kill:
                child.signal(signal.SIGKILL)
            else:
                child.ask_to_end()

    def _reap(self, managed: ManagedProcess) -> Exit | None:
        """The end of a process, whose remaining parts are ended here; None while it goes on."""
        if all(child.poll() is None for child in managed.children):  # there may be none
            return None
        complete = self.complete()
        first = self._first_ended(managed, complete)
        if first is None:
            return None
        # Read before anything is changed: the run directory may be unusable for a while.
        progress = self.progress()
        code, life, now = first.process.returncode, managed.life, self.clock()
        peaceful = complete or code == process.STOPPED
        process.end(managed.children, life.limits.grace_s if peaceful else 0.5)
        managed.children = []
        process.end_orphans(self.running())
        lived_s = now - life.started_at
        life.end(now, progress, stuck=life.hung or code == process.STUCK)
        starved = self._is_starved(first) and code != 0
        return Exit(managed, first, code, lived_s, managed.ready, life.hung, starved)

    def _is_starved(self, child: Child) -> bool:
        """Whether the kernel has killed a process for memory since this was asked last."""
        before, self._kills_seen = self._kills_seen, self.memory_kills()
        is_srun = child.end_by == process.END_TASKS
        return self._kills_seen > before or (
            is_srun and out_of_memory.said_by_slurm(child.log, child.log_start)
        )

    def _first_ended(self, managed: ManagedProcess, complete: bool) -> Child | None:
        """The child whose end is the end of the whole. None while others may take their time to
        end: a child that ended with success leaves them `leave_s` seconds."""
        ended = [child for child in managed.children if child.poll() is not None]
        failed = [child for child in ended if child.poll()]
        if len(ended) < len(managed.children) and (complete or not failed):
            now = self.clock()
            managed.leave_by = managed.leave_by or now + managed.life.limits.leave_s
            if now < managed.leave_by:
                return None
        return (failed or ended)[0]
