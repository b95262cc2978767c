"""An hour of a run with the real parts and a kill every 30 to 90 seconds: does it stay as small as it was, and come out whole?

    .venv/bin/python tests/soak.py --minutes 60

The arithmetic experiment, two vLLM servers and two environment workers. Every member's memory and every part of the run directory are
measured every few seconds. In the end the run is asked to stop, resumed for three more steps, and looked at. Exit code 0: every step was
done once, the policy has learnt, no process is left, no member's memory grew by more than GROWTH an hour, and the disk stayed bounded.

Memory is what is a process' own (RssAnon and RssShmem of /proc/PID/status; files that it maps are the page cache's). As members are killed
all the time, growth is over each life, from WARM_S after its start, and pooled by kind of member.
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
from faults import ENDLESS, Done, Schedule, finish, harass
from rich.console import Console
from rich.table import Table
from run_parts import Started

from atropos_hpc.run_dir import read_lines

EVERY_S = 5.0
WARM_S = 120.0  # imports, the first batches, and caches that fill
GROWTH = 0.1  # of a member's memory, an hour
LEARNT = 0.85
SEGMENT_BYTES = 4 << 20
PARTS = ("trajectories", "policy", "checkpoints", "logs")
# two segments and a queue; two versions, an anchor and one half written; three checkpoints and one half written
BOUNDS_MB = {"trajectories": 3 * SEGMENT_BYTES / 2**20, "policy": 10.0, "checkpoints": 25.0}
SETTINGS = [
    "algorithm.batch_size=64", "staleness.max=1", "evaluation.after=true", "rollout.servers=2", "environment.workers=2",
    "trainer.checkpoint_every=20", f"trajectories.segment_bytes={SEGMENT_BYTES}",
]  # fmt: skip


@dataclass
class Watch:
    """What was measured: (seconds since the start, MB)."""

    memory: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # by (member, pid)
    disk: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # by part of the run directory

    def follow(self, started: Started, over: threading.Event) -> None:
        began = time.monotonic()
        while not over.wait(EVERY_S):
            now = time.monotonic() - began
            for name, pid in [("supervisor", started.process.pid), *members(started)]:
                if (size := private_mb(pid)) is not None:
                    self.memory[(name, pid)].append((now, size))
            for part in PARTS:
                self.disk[part].append((now, size_mb((started.run.path / part).rglob("*"))))


def private_mb(pid: int) -> float | None:
    """None when it has ended."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
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


@dataclass
class Growth:
    """Of all processes of a kind of member, over the lives that lasted longer than WARM_S."""

    lives: int
    warm_hours: float
    at_first_mb: float  # mean, WARM_S after the start
    most_mb: float
    mb_an_hour: float

    @property
    def share(self) -> float:
        return self.mb_an_hour / self.at_first_mb


def growth(lives: list[list[tuple[float, float]]]) -> Growth | None:
    """None if no life was long enough."""
    warm = [[(at, mb) for at, mb in life if at - life[0][0] >= WARM_S] for life in lives]
    warm = [life for life in warm if len(life) > 2 * WARM_S / EVERY_S]
    if not warm:
        return None
    hours = sum(life[-1][0] - life[0][0] for life in warm) / 3600
    grown = sum(life[-1][1] - life[0][1] for life in warm)
    first = sum(life[0][1] for life in warm) / len(warm)
    return Growth(len(lives), hours, first, max(mb for life in lives for _, mb in life), grown / hours)


def judged(watch: Watch, console: Console) -> list[str]:
    """Show the tables; what is not as it should be."""
    problems = []
    by_kind: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for (name, _), life in watch.memory.items():
        by_kind["engine" if name.endswith("engine") else name.partition("-")[0]].append(life)
    memory = Table("member", "lives", "hours, warm", "MB when warm", "most MB", "MB more an hour", title="memory of its own")
    for kind, lives in sorted(by_kind.items()):
        found = growth(lives)
        if found is None:
            memory.add_row(kind, str(len(lives)), "", "", "", "no life was long enough")
            continue
        numbers = (f"{found.warm_hours:.2f}", f"{found.at_first_mb:.0f}", f"{found.most_mb:.0f}", f"{found.mb_an_hour:+.1f}")
        memory.add_row(kind, str(found.lives), *numbers)
        if found.share > GROWTH:
            problems.append(f"{kind}: its memory grows by {found.share:.0%} an hour")
    console.print(memory)
    disk = Table("part", "MB in the middle of the time", "at the end", "at most", "bound", title="disk")
    for part, series in watch.disk.items():
        most, bound = max(mb for _, mb in series), BOUNDS_MB.get(part)
        disk.add_row(
            part, f"{series[len(series) // 2][1]:.1f}", f"{series[-1][1]:.1f}", f"{most:.1f}", "" if bound is None else f"{bound:.0f}"
        )
        if bound is not None and most > bound:
            problems.append(f"{part}/ came to {most:.1f} MB")
    console.print(disk)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with random kills.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    console, watch, over, done = Console(width=140), Watch(), threading.Event(), list[Done]()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, small_filesystem(Path(scratch) / "run"):
        started = Started(Path(scratch), ENDLESS, *SETTINGS)
        follower = threading.Thread(target=watch.follow, args=(started, over))
        follower.start()
        try:
            harass(started, random.Random(options.seed), Schedule(options.minutes, (30.0, 90.0), {kill: 1}, together=0.0), done)
            over.set()
            follower.join()
            steps = finish(started)
            started.assert_nothing_is_left()
            problems = judged(watch, console)
            if started.steps() != list(range(1, steps + 1)):
                problems.append("the steps in metrics.jsonl are not each there once")
            accuracy = read_lines(started.run.evaluations)[-1]["accuracy"]
            if accuracy < LEARNT:
                problems.append(f"the final accuracy is {accuracy}")
            console.print(f"{steps} steps, {len(done)} kills, final accuracy {accuracy}")
        finally:
            over.set()
            if started.process.poll() is None:
                started.process.kill()
                started.process.wait()
    console.print("\n".join(problems) if problems else "flat, bounded, and whole", markup=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
