"""Child processes that never outlive their parent.

Each child leads a process group of its own, so that what it starts can be killed with it. Each
child asks the kernel for a signal when its parent dies (`die_with_parent`), so that a killed parent
leaves nothing behind. A parent that calls `adopt_orphans` inherits the grandchildren whose parent
was killed, and kills them (`end_orphans`).

Every member dumps its stack traces to its log on USR1 (`dump_stacks_on_request`); whoever finds
that a member hangs requests them (`request_stacks`).
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atropos_hpc.runtime import masking

log = logging.getLogger(__name__)

# Exit codes with which a member says how it ended; any other code is a crash.
DONE, REFUSED, GAVE_UP, STUCK, STOPPED = 0, 2, 69, 70, 75
LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
# Asks the tasks behind an srun to end: srun forwards it, while TERM makes srun kill its tasks.
END_TASKS = signal.SIGUSR2
PARENT = "ATROPOS_HPC_PARENT"  # pid of the process whose death ends this one
NODE = "ATROPOS_HPC_NODE"  # the name of this process's node in the run
STEP_ID = "ATROPOS_HPC_STEP"  # tells one start of a process from the next
SRUN_S = 5.0  # for an srun to kill its tasks
PRIVATE = 0o077  # the umask of every process of a run
KILLED_S = 30.0  # for a killed process to disappear; a dead filesystem holds it for longer
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def log_to_stderr() -> None:
    """Set up a member's logging: one line format, to stderr, which its parent sends to its log."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(masking.MaskingFilter())


def keep_files_private() -> None:
    """Let nobody else read or write what this process and its children create."""
    os.umask(PRIVATE)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Make the kernel send this process `number` when its parent ends. A no-op unless `start`
    started this process.

    END_TASKS is ignored from here on: Slurm sends it to all processes of a step, while the parent
    asks its children to end by TERM.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    signal.signal(END_TASKS, signal.SIG_IGN)
    _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before prctl was called
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Deliver Ctrl-C after the block. Programs that the block starts do not see it either.

    Only in the main thread. Another thread, such as a library's, may take the signal although this
    one blocks it; Python's handler then runs here all the same.
    """
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # programs inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True)
class ProcessSpec:
    """How to start one process: its log's name, its command line, the environment variables it gets
    beside the parent's, and the signal that asks it to end."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    end_by: int = signal.SIGTERM


@dataclass
class Child:
    """A running child and the process group that it leads. Its output begins at `log_start`."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    end_by: int = signal.SIGTERM
    log_start: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask_to_end(self) -> None:
        """Ask the whole group to end by TERM, or an srun by END_TASKS."""
        if self.end_by == signal.SIGTERM:
            self.signal(self.end_by)
        else:
            self.process.send_signal(self.end_by)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to the whole group, if anything of it still runs."""
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
    """Start `command` in a process group of its own, bound to this process's life. Its output is
    appended to `log`; `env` is added to this process's environment."""
    with log.open("ab") as output:
        log_start = output.tell()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
            cwd=cwd,
            start_new_session=True,
            umask=PRIVATE,
        )
    return Child(name, process, log, end_by, log_start)


def end(children: Iterable[Child], grace_s: float) -> None:
    """Ask every child to end, and kill after `grace_s` seconds what is left of their groups.

    Returns when all have been reaped, or cannot be.
    """
    children = list(children)
    for child in children:
        if child.poll() is None:
            child.ask_to_end()
    _await_exit(children, grace_s)
    sruns = [child for child in children if child.end_by == END_TASKS and child.poll() is None]
    for child in sruns:
        child.signal(signal.SIGTERM)  # makes srun kill its tasks; a killed srun would leave them
    _await_exit(sruns, SRUN_S)
    for child in children:
        child.signal(signal.SIGKILL)  # also kills what an ended child has left in its group
        try:
            child.process.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            log.error(
                "%s (pid %d) was killed %.0f s ago and still exists: it is stuck in the kernel",
                child.name,
                child.pid,
                KILLED_S,
            )


def _await_exit(children: Iterable[Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)


def end_orphans(known: Iterable[Child]) -> list[int]:
    """Kill and reap adopted processes: children of this process that are not in `known`. Returns
    their pids."""
    import psutil

    spared = {child.pid for child in known}
    orphans = []
    for orphan in psutil.Process().children():
        if orphan.pid in spared:
            continue
        try:
            orphan.kill()
            orphan.wait(KILLED_S)
            orphans.append(orphan.pid)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            pass
    return orphans


def descendants_of(pid: int) -> list[int]:
    """The pids of `pid`'s children, their children, and so on; [] when it has ended."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def command_line(pid: int) -> str:
    """The command line of a process; "" when it has ended or belongs to somebody else."""
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def peak_memory(pid: int | None = None) -> int:
    """The most memory that a process, or this one, has held in RAM, bytes; 0 when it has ended.

    Pages that it shares with other processes count.
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):  # a zombie has no memory
        return 0


def return_freed_memory() -> None:
    """Return freed memory to the system, which glibc keeps otherwise; elsewhere, do nothing.

    Loading a model leaves as much again in the learner, 0.9 GB of 2.4 for 135M parameters, and an
    update 0.2 to 0.4 GB in vLLM's engine, of 3.0 for 494M. It takes about 0.1 s.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def dump_stacks_on_request() -> None:
    """Dump the stack traces of all threads to stderr on USR1, even while stuck in C code."""
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def dump_tasks_on_request(then: Callable[[], None] | None = None) -> None:
    """Like `dump_stacks_on_request`, and dump the tasks of the running event loop too, provided it
    still turns; then call `then`."""
    import asyncio

    def dump() -> None:
        for task in asyncio.all_tasks():
            task.print_stack(limit=8, file=sys.stderr)
        if then is not None:
            then()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, dump)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)


def request_stacks(pid: int) -> bool:
    """Request a process's stack traces, if it handles USR1, which would kill it otherwise. Returns
    whether they were requested."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()  # psutil does not show signal masks
        handled = int(status.partition("SigCgt:")[2].split()[0], 16)
        if handled >> (signal.SIGUSR1 - 1) & 1:
            os.kill(pid, signal.SIGUSR1)
            return True
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


async def run_until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end, or cancel it on TERM, INT or END_TASKS, where these are not ignored.

    Returns whether it came to its end; raises what it raises.
    """
    import asyncio

    task = asyncio.ensure_future(work)
    dump_tasks_on_request()
    cancelled = False

    def cancel() -> None:
        # Only once: both Slurm and the parent may send a signal, and a second cancellation would
        # interrupt the cleanup.
        nonlocal cancelled
        if not cancelled:
            cancelled = True
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, END_TASKS):
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("ending: received a signal to end")
        return False
    return True


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, masked, for a message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64_000))
            found = file.read().decode(errors="replace").splitlines()
            text = "\n".join(found[-lines:] if lines else [])
            return masking.mask(text, masking.known_values())
    except FileNotFoundError:
        return "(no log)"
