"""No process outlives its parent, however the parent ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_hpc.runtime import process

SLEEPER = "import time; time.sleep(600)"


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return True


def test_end_takes_the_whole_group_also_from_one_that_ignores_term(tmp_path: Path) -> None:
    program = f"""
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen([sys.executable, "-c", {SLEEPER!r}]).pid, flush=True)
        signal.pause()
    """
    child = process.start(
        "stubborn", [sys.executable, "-c", textwrap.dedent(program)], tmp_path / "log"
    )
    assert wait_until(lambda: (tmp_path / "log").read_text().strip() != "")
    grandchild = int((tmp_path / "log").read_text())
    process.end([child], 0.2)
    assert child.poll() == -signal.SIGKILL and wait_until(lambda: gone(grandchild))


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    bind = "import signal, time; from atropos_hpc.runtime import process"
    bound = f"{bind}; process.die_with_parent(signal.SIGKILL); print('bound', flush=True)"
    bound += "; time.sleep(600)"
    program = f"""
        import sys, time
        from pathlib import Path
        from atropos_hpc.runtime import process
        command, log = [sys.executable, "-c", {bound!r}], Path({str(tmp_path / "log")!r})
        child = process.start("child", command, log)
        print(child.pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert wait_until(lambda: "bound" in (tmp_path / "log").read_text())
    parent.kill()
    parent.wait()
    assert wait_until(lambda: gone(child))


def test_a_second_signal_does_not_interrupt_the_cleanup(tmp_path: Path) -> None:
    """Slurm signals every process of a step, and the agent signals its children as well."""
    program = """
        import asyncio
        from atropos_hpc.runtime import process
        async def work():
            try:
                print("working", flush=True)
                await asyncio.sleep(600)
            finally:
                print("tidying", flush=True)
                await asyncio.sleep(1)
                print("tidy", flush=True)
        print("complete" if asyncio.run(process.run_until_signal(work())) else "asked", flush=True)
    """
    log = tmp_path / "log"
    child = process.start(
        "member", [sys.executable, "-c", textwrap.dedent(program)], log, end_by=process.END_TASKS
    )
    assert wait_until(lambda: "working" in log.read_text())
    child.ask_to_end()
    assert wait_until(lambda: "tidying" in log.read_text())
    child.signal(signal.SIGTERM)
    assert child.process.wait(30) == 0 and log.read_text().split() == [
        "working",
        "tidying",
        "tidy",
        "asked",
    ]


def test_a_child_leaves_the_signal_for_tasks_to_its_parent(tmp_path: Path) -> None:
    program = "from atropos_hpc.runtime import process; import time; process.die_with_parent()"
    program += "; print('bound', flush=True); time.sleep(600)"
    log = tmp_path / "log"
    child = process.start("member", [sys.executable, "-c", program], log, end_by=process.END_TASKS)
    assert wait_until(lambda: "bound" in log.read_text())
    child.ask_to_end()
    time.sleep(0.5)
    assert child.poll() is None
    process.end([child], 0.2)
    assert child.poll() == -signal.SIGTERM  # as an srun that has not ended by itself is asked


def test_orphans_of_a_killed_child_are_adopted_and_ended(tmp_path: Path) -> None:
    program = f"""
        import os, signal, sys, time
        from pathlib import Path
        from atropos_hpc.runtime import process
        process.adopt_orphans()
        orphan = "subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], start_new_session=True)"
        middle = "import subprocess, sys, time; print(" + orphan + ".pid, flush=True)"
        middle += "; time.sleep(600)"
        log = Path({str(tmp_path / "log")!r})
        child = process.start("middle", [sys.executable, "-c", middle], log)
        while not log.read_text().strip():
            time.sleep(0.02)
        child.signal(signal.SIGKILL)
        child.process.wait()
        time.sleep(0.2)
        print(process.end_orphans([]), int(log.read_text()), flush=True)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    ended, _, orphan = out.strip().rpartition(" ")
    assert ended == f"[{orphan}]" and wait_until(lambda: gone(int(orphan)))


def test_output_goes_to_the_log_whose_end_can_be_read(tmp_path: Path) -> None:
    child = process.start(
        "talker", [sys.executable, "-c", "for i in range(30): print('line', i)"], tmp_path / "log"
    )
    assert child.process.wait(30) == 0
    assert process.tail(tmp_path / "log", 2) == "line 28\nline 29"
    assert process.tail(tmp_path / "missing") == "(no log)"
    assert os.getpgid(os.getpid()) != child.pid


def test_ctrl_c_waits_for_the_end_of_the_block_also_where_another_thread_takes_it() -> None:
    end, complete = threading.Event(), False
    thread = threading.Thread(target=end.wait)
    thread.start()
    with pytest.raises(KeyboardInterrupt), process.deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        complete = True
    end.set()
    thread.join()
    assert complete and signal.getsignal(signal.SIGINT) is signal.default_int_handler
