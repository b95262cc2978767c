"""Run a command as a whole, and account for its processes."""

import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"  # `make bench NAME=...` installs it
TICK_S, SAMPLE_S, TIMEOUT_S = 0.5, 1.0, 1800.0


@dataclass
class Ran:
    """A command that has ended. Memory is proportional: shared pages count once."""

    start: float  # Unix time
    cpu: dict[str, float]  # CPU seconds by program
    peak: int  # bytes of all processes together
    peaks: dict[str, int]  # of each program, not at the same moment
    timeline: list[tuple[float, float]]  # Unix time, CPU seconds so far

    def cpu_between(self, start: float, end: float) -> float:
        """Return the CPU seconds of all processes between two Unix times."""
        times, seconds = zip(*self.timeline, strict=True)
        at_start, at_end = np.interp([start, end], times, seconds)
        return float(at_end - at_start)


def run(command: list[str], log: Path, memory: bool = False) -> Ran:
    """Run a command to its end. `memory`: sample the memory of its processes."""
    ran = Ran(time.time(), {}, 0, {}, [])
    seen: dict[int, tuple[str, float]] = {}
    sampled = 0.0
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        while process.poll() is None:
            if time.time() - ran.start > TIMEOUT_S:
                process.kill()
            found = descendants(process.pid)
            for pid, (name, seconds) in found.items():  # one that has just ended has no name
                seen[pid] = (name or seen.get(pid, ("", 0.0))[0], seconds)
            ran.timeline.append((time.time(), sum(seconds for _, seconds in seen.values())))
            if memory and time.time() - sampled >= SAMPLE_S:
                _sample(ran, found)
                sampled = time.time()
            time.sleep(TICK_S)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}"
        )
    cpu: Counter[str] = Counter()
    for name, seconds in seen.values():
        cpu[name] += seconds
    ran.cpu = dict(cpu)
    return ran


def _sample(ran: Ran, processes: dict[int, tuple[str, float]]) -> None:
    sums: Counter[str] = Counter()
    for pid, (name, _) in processes.items():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # gone meanwhile
            continue
        sums[name] += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    ran.peak = max(ran.peak, sum(sums.values()))
    for name, size in sums.items():
        ran.peaks[name] = max(size, ran.peaks.get(name, 0))


def descendants(root: int) -> dict[int, tuple[str, float]]:
    """Return {pid: (program, CPU seconds so far)} of a process and its descendants."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # gone meanwhile
                continue
            name = (
                arguments[arguments.index("-m") + 1]
                if "-m" in arguments
                else Path(arguments[min(1, len(arguments) - 1)]).name
            )
            parents[int(entry.name)] = int(fields[1])
            found[int(entry.name)] = (
                name,
                (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            )

    def below(pid: int) -> bool:
        return pid == root or (pid in parents and below(parents[pid]))

    return {pid: what for pid, what in found.items() if below(pid)}
