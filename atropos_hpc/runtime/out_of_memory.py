"""Tells that the kernel has killed a process because its job is out of memory.

The victim need not be the process that then ends: the kernel takes the largest, such as a server's
engine, whose parent ends with an exit code of its own. So the cgroup of this process is asked,
which is that of its children, too; about a step on other nodes, srun's log.
"""

import re
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# srun: error: n0: task 0: Out Of Memory
# slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks [...]
_SAID_BY_SLURM = re.compile(r"error: .*(?:: Out Of Memory\b|\boom.kill event)")


def kills(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Return how many processes of this process's cgroup were killed so far. 0 without cgroup v2.

    A cgroup without the memory controller is counted by the first above it that has one.
    """
    try:
        path = next(
            line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return 0
    here = cgroups / path.lstrip("/")
    for directory in (here, *here.parents):
        if directory == cgroups.parent:
            return 0
        try:
            events = (directory / "memory.events").read_text()
        except OSError:
            continue
        found = re.search(r"^oom_kill (\d+)$", events, re.M)
        return int(found[1]) if found else 0
    return 0


def said_by_slurm(log: Path, start: int) -> bool:
    """Whether Slurm says so in an srun's log, from byte `start` on."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            return _SAID_BY_SLURM.search(file.read().decode(errors="replace")) is not None
    except OSError:
        return False
