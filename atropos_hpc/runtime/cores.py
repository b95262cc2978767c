"""Which process computes on which CPUs, and with how many threads.

Ranks of the learner divide the CPUs that they are given, and so do the servers of a node: their own
sets are disjoint as long as there are enough. Where both roles run on one machine, they share its
CPUs in turn: the learner computes while it has a batch, the servers in between and beside it. That
is only good because idle threads do not spin (PASSIVE_WAITING). Environment workers have one thread
that mostly waits, and use any CPU.

What a process may use is its affinity mask, which Slurm sets from roles.*.cpus_per_task. With GPUs,
processes stay on the CPUs near them (`devices.stay_near`). `trainer.threads`, `rollout.variables`
and OMP_NUM_THREADS of the shell take precedence.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem

# For GNU's and LLVM's OpenMP. With the default, a step of a model of 135M parameters on two cores
# took five times as long.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and ARM
CPUS, THREADS = "ATROPOS_HPC_CPUS", "OMP_NUM_THREADS"


def part(cpus: Sequence[int], index: int, parts: int) -> list[int]:
    """Return the CPUs of one of several processes that share them equally.

    >>> part([0, 1, 2, 3, 4], 0, 2), part([0, 1, 2, 3, 4], 1, 2), part([0, 1], 2, 3)
    ([0, 1], [2, 3, 4], [0])
    """
    if len(cpus) < parts:
        return [cpus[index % len(cpus)]]
    return list(cpus[index * len(cpus) // parts : (index + 1) * len(cpus) // parts])


def variables(index: int, parts: int, bind: bool) -> dict[str, str]:
    """Return the variables of one of `parts` processes that divide this process's CPUs.

    `bind`: it is to stay on its own CPUs. A number of threads in this environment is kept.
    """
    own = part(sorted(os.sched_getaffinity(0)), index, parts)
    found = {} if THREADS in os.environ else {THREADS: str(len(own))}
    if bind:
        found[CPUS] = ",".join(map(str, own))
    return found


def bind() -> str:
    """Move this process to the CPUs that `variables` has given it. Return what it may use."""
    if given := os.environ.get(CPUS):
        os.sched_setaffinity(0, map(int, given.split(",")))
    cpus = sorted(os.sched_getaffinity(0))
    threads = os.environ.get(THREADS, len(cpus))
    return f"{threads} threads on CPUs {','.join(map(str, cpus))}"


def describe(config: Config) -> str:
    """Render the plan in one line."""
    trainer, rollout = config.roles.trainer, config.roles.rollout
    ranks, servers = trainer.ranks_per_node, config.rollout.servers
    local = config.launch.allocation == "local"
    here = len(os.sched_getaffinity(0))
    of_rank = max(1, here // (ranks * trainer.nodes)) if local else trainer.cpus_per_task
    of_node = here // rollout.nodes if local else rollout.cpus_per_task
    asked = config.rollout.variables.get(THREADS, max(1, of_node // servers))
    line = (
        f"a learner rank has {config.trainer.threads or of_rank} threads, a server of"
        f" {servers} on a node {asked}"
    )
    if local:
        line += f"; both roles share {here} CPUs in turn"
    return line


def slow_dtype(config: Config) -> Problem | None:
    """Return a warning if a role is to compute in bfloat16 on this CPU, which only emulates it."""
    roles = config.roles
    on_cpu = not (roles.trainer.gpus_per_node and roles.rollout.gpus_per_node)
    if config.model.dtype != "bfloat16" or not on_cpu:
        return None
    try:
        flags = set(CPUINFO.read_text().split())
    except OSError:
        return None
    if not flags & {"flags", "Features"} or flags & BFLOAT16:
        return None
    return Problem(
        "model.dtype",
        "this CPU has no instructions for bfloat16: float32 needs more memory, and was four times"
        " as fast on such a machine",
    )
