"""Child processes that never outlive their parent.

Each child leads a process group of its own, so that what it starts can be ended with it. Each child also asks the kernel for a
signal when its parent dies (`die_with_parent`), so that a killed parent leaves nothing behind; and a parent that `adopt_orphans`
is handed the grandchildren whose parent was killed, and ends them (`end_orphans`).

Every member writes its stacks into its log on USR1 (`stacks_on_request`); who finds that one hangs asks for them (`request_stacks`).
"""

import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DONE, REFUSED, STUCK, STOPPED = (
    0,
    2,
    70,
    75,
)  # exit codes with which a member says how it ended; anything else is a crash
SRUN_S = 5.0  # for an srun to kill its tasks
KILLED_S = 30.0  # for the end of a process that was killed; a dead filesystem holds them for longer
LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
END_TASKS = signal.SIGUSR2  # what asks the tasks behind an srun to end: it hands this on, and takes TERM as an order to kill them
PARENT = "ATROPOS_HPC_PARENT"  # pid of the process whose death ends this one
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def log_to_stderr() -> None:
    """A member's logging: one line format, to where its parent has put its log."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `number` when its parent ends. A no-op unless `start` started us.

    From here on END_TASKS is ignored: Slurm sends it to all processes of a step, and the parent asks its children by TERM.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    signal.signal(END_TASKS, signal.SIG_IGN)
    _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass
class Child:
    """One running child and the group it leads."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started: float
    end_by: int = signal.SIGTERM

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask_to_end(self) -> None:
        """As it is to be asked: the whole group by TERM, an srun by END_TASKS."""
        if self.end_by == signal.SIGTERM:
            self.signal(self.end_by)
        else:
            self.process.send_signal(self.end_by)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        """To the whole group; nothing happens when all of it has ended."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass


def start(
    name: str,
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    end_by: int = signal.SIGTERM,
) -> Child:
    """Start `command` with its output appended to `log`, in a group of its own, bound to this process's life."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
            cwd=cwd,
            start_new_session=True,
        )
    return Child(name, process, log, time.monotonic(), end_by)


def end(children: Iterable[Child], grace_s: float) -> None:
    """Ask every child to end, KILL what is left after `grace_s`; returns when all have been reaped (or cannot be)."""
    children = list(children)
    for child in children:
        if child.poll() is None:
            child.ask_to_end()
    _wait_for(children, grace_s)
    sruns = [child for child in children if child.end_by == END_TASKS and child.poll() is None]
    for child in sruns:
        child.signal(
            signal.SIGTERM
        )  # on which it kills its tasks; killed itself, it would leave them
    _wait_for(sruns, SRUN_S)
    for child in children:
        child.signal(signal.SIGKILL)  # also what a child that ended by itself has left in its group
        try:
            child.process.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            log.error(
                "%s (pid %d) was killed %.0f s ago and has not ended: it is stuck in the kernel",
                child.name,
                child.pid,
                KILLED_S,
            )


def _wait_for(children: Iterable[Child], seconds: float) -> None:
    """Until all have ended, or so long."""
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def end_orphans(known: Iterable[Child]) -> list[int]:
    """Kill and reap adopted processes: children of this one that `start` did not start. Returns their pids."""
    ours = {child.pid for child in known}
    orphans = []
    for pid in children_of(os.getpid()):
        if pid in ours:
            continue
        try:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + KILLED_S
            while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            if time.monotonic() < deadline:
                orphans.append(pid)
        except (ProcessLookupError, ChildProcessError):
            pass
    return orphans


def children_of(pid: int) -> list[int]:
    """The pids of `pid`'s direct children, by Linux's /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except FileNotFoundError:  # a thread that ended meanwhile
            pass
    return found


def stacks_on_request() -> None:
    """Have USR1 write the stacks of all threads to stderr, which is the member's log; also of one that is stuck in C."""
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def tasks_on_request(then: Callable[[], None] | None = None) -> None:
    """`stacks_on_request`, and those of the running event loop's tasks, if it still turns; then call `then`."""

    def tell() -> None:
        for task in asyncio.all_tasks():
            task.print_stack(limit=8, file=sys.stderr)
        if then is not None:
            then()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)


def request_stacks(pid: int) -> bool:
    """Ask a process for its stacks, if it listens: USR1 would end one that does not. Returns whether it was asked."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGUSR1 - 1) & 1:
            os.kill(pid, signal.SIGUSR1)
            return True
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


async def until_asked(work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end, or cancel it on TERM, INT or END_TASKS, where these are not ignored.

    Returns whether it came to its end; raises what it raises.
    """
    task = asyncio.ensure_future(work)
    tasks_on_request()
    asked = False

    def ask() -> (
        None
    ):  # only once: Slurm and the parent may both ask, and a second cancel would break off the tidying up
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, END_TASKS):
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, ask)
    try:
        await task
    except asyncio.CancelledError:
        log.info("asked to end")
        return False
    return True


def descendants_of(pid: int) -> list[int]:
    """The pids of `pid`'s children, their children, and so on."""
    try:
        return [found for child in children_of(pid) for found in (child, *descendants_of(child))]
    except FileNotFoundError:
        return []


def backoff(base_s: float, restarts: int) -> float:
    """Seconds before the next restart, after so many without progress.

    >>> [backoff(1.0, n) for n in (0, 1, 2, 10)]
    [1.0, 2.0, 4.0, 60.0]
    """
    return float(min(60.0, base_s * 2**restarts))


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for a message to a person."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"


def kill(pid: int) -> None:
    """KILL one process; nothing happens when it has ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
