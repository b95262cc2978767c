"""A long run with the real parts and a kill every 30 to 90 seconds: memory and disk stay bounded.

    .venv/bin/python tests/soak.py --minutes 60

The arithmetic experiment with two vLLM servers and two environment workers. The memory of every
member and the size of every part of the run directory are measured every few seconds. At the end
the run is stopped, resumed for three more steps, and checked. Exit code 0: every step was made
once, the policy has learnt, no process is left, no member's memory grew by more than GROWTH, and
the disk usage stayed bounded.

Memory means RssAnon and RssShmem of /proc/PID/status, without mapped files: the maximum of one
process of a kind in each quarter of the time. The last quarter is compared with the second, because
imports, first batches and filling caches fall into the first.
"""

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fault_kinds import kill, members, small_filesystem
from faults import ENDLESS, Injected, Schedule, finish, inject_faults
from rich.console import Console
from rich.table import Table
from run_files import evaluations
from run_parts import Started

EVERY_S = 5.0
GROWTH = 0.1  # of a member's memory, from the second quarter to the last
LEARNT = 0.85
SEGMENT_BYTES = 4 << 20
PARTS = ("trajectories", "policy", "checkpoints", "logs")
# Two segments and a queue; two versions, an anchor and a partial one; three checkpoints and a
# partial one.
BOUNDS_MB = {"trajectories": 3 * SEGMENT_BYTES / 2**20, "policy": 10.0, "checkpoints": 25.0}
SETTINGS = [
    "algorithm.batch_size=64",
    "staleness.max=1",
    "evaluation.after=true",
    "rollout.servers=2",
    "environment.workers=2",
    "trainer.checkpoint_every=20",
    f"trajectories.segment_bytes={SEGMENT_BYTES}",
]


@dataclass
class Watch:
    """Measurements, as (seconds since the start, MB): memory by kind of member, disk usage by part
    of the run directory."""

    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    disk: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def follow(self, started: Started, over: threading.Event) -> None:
        began = time.monotonic()
        while not over.wait(EVERY_S):
            now = time.monotonic() - began
            for name, pid in [("supervisor", started.process.pid), *members(started)]:
                if (size := private_mb(pid)) is not None:
                    self.memory[
                        "engine" if name.endswith("engine") else name.partition("-")[0]
                    ].append((now, size))
            for part in PARTS:
                self.disk[part].append((now, size_mb((started.run.path / part).rglob("*"))))


def private_mb(pid: int) -> float | None:
    """The private memory of a process; None when it has ended."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return sum(int(lines[kind].split()[0]) for kind in ("RssAnon", "RssShmem")) / 1024
    except (OSError, KeyError):
        return None


def size_mb(paths: Iterable[Path]) -> float:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # retired meanwhile
            pass
    return total / 2**20


def judged(watch: Watch, console: Console) -> list[str]:
    """Print the tables; return the problems."""
    problems = []
    memory = Table(
        "member",
        *(f"quarter {number + 1}" for number in range(4)),
        title="most memory of one process, MB",
    )
    for kind, series in sorted(watch.memory.items()):
        most = quarters(series)
        memory.add_row(kind, *(f"{mb:.0f}" for mb in most))
        if most[3] > (1 + GROWTH) * most[1]:
            problems.append(f"{kind}: its memory grew from {most[1]:.0f} to {most[3]:.0f} MB")
    console.print(memory)
    disk = Table(
        "part", *(f"quarter {number + 1}" for number in range(4)), "bound", title="most on disk, MB"
    )
    for part, series in watch.disk.items():
        most, bound = quarters(series), BOUNDS_MB.get(part)
        disk.add_row(part, *(f"{mb:.1f}" for mb in most), "" if bound is None else f"{bound:.0f}")
        if bound is not None and max(most) > bound:
            problems.append(f"{part}/ came to {max(most):.1f} MB")
    console.print(disk)
    return problems


def quarters(series: list[tuple[float, float]]) -> list[float]:
    """The maximum in each quarter of the time; 0 without a measurement."""
    whole = max(at for at, _ in series) + 1e-9
    return [
        max((mb for at, mb in series if number <= 4 * at / whole < number + 1), default=0.0)
        for number in range(4)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with random kills.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--gap", default="30-90", help="seconds from recovery to the next kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    low, _, high = options.gap.partition("-")
    schedule = Schedule(options.minutes, (float(low), float(high or low)), {kill: 1}, overlap=0.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    console, watch, over, done = Console(width=140), Watch(), threading.Event(), list[Injected]()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        small_filesystem(Path(scratch) / "run"),
    ):
        started = Started(Path(scratch), ENDLESS, *SETTINGS)
        follower = threading.Thread(target=watch.follow, args=(started, over))
        follower.start()
        try:
            inject_faults(started, random.Random(options.seed), schedule, done)
            over.set()
            follower.join()
            steps = finish(started)
            started.assert_nothing_is_left()
            problems = judged(watch, console)
            if started.steps() != list(range(1, steps + 1)):
                problems.append("the steps in metrics.jsonl are not each there once")
            accuracy = evaluations(started.run)[-1].accuracy
            if accuracy < LEARNT:
                problems.append(f"the final accuracy is {accuracy}")
            console.print(f"{steps} steps, {len(done)} kills, final accuracy {accuracy}")
        finally:
            over.set()
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait()
    console.print(
        "\n".join(problems)
        if problems
        else "memory and disk stayed bounded; every step was made once",
        markup=False,
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
