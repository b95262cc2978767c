"""The sbatch script of a run, as text, and the nodes that it gets.

Pure functions of the config and the environment.

`script` serves the login node: one sbatch call per run. `allocated_nodes` serves the batch step,
which then starts the steps of the run (srun.py).
"""

import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from atropos_hpc.config import Config, RoleConf
from atropos_hpc.launch.slurm.cluster import gpus_of
from atropos_hpc.runtime import environment
from atropos_hpc.runtime.deadlines import signal_s

# In het jobs, the number of a role's component. The first one leads: its first node runs the batch
# step.
ROLES = ("trainer", "rollout")

Option = str | int | bool | None  # None and False: not given
Options = dict[str, Option]


@dataclass(frozen=True)
class Allocation:
    """The nodes allocated to a role: Slurm's names, the raw id of the (component's) job, and the
    number of the het component."""

    nodes: tuple[str, ...]
    job: str
    het: int | None = None


def leave_this_machine(config: Config) -> None:
    """Have a run that goes to Slurm be one heterogeneous job, unless its allocation is chosen."""
    if config.launch.allocation == "local":
        config.launch.allocation = "het"


# --- scripts for sbatch


def script(config: Config, output: str, command: str, slot: str | None = None) -> str:
    """Return the sbatch script of a run: all roles (het, single), or the trainer (split).

    Runs with the same `slot` take turns. `exec` and `trap` serve --signal=B:USR2, which goes to the
    batch shell's pid alone: the program takes the shell's place, and a USR2 that comes before the
    program handles it is ignored instead of deadly.
    """
    return _text(sections(config, output, slot), "trap '' USR2", f"exec {command}")


def sections(config: Config, output: str = "", slot: str | None = None) -> list[Options]:
    """Return sbatch's options of each component of the job. What a role leaves open, such as mem,
    is cluster.sbatch's."""
    name = slot or config.launch.job_name
    common = merged({"job_name": name, **_common(config, output)}, config.cluster.sbatch)
    trainer, rollout = config.roles.trainer.nodes, config.roles.rollout.nodes
    kind = config.launch.allocation
    if kind == "het":
        # Slurm lets a component outlive a node only if it has two nodes or more, and wants the
        # option for all components or for none.
        no_kill: Options = {"no_kill": trainer > 1 and rollout > 1}
        # A name of its own: with one name for both, a singleton would wait for itself.
        own: Options = {"job_name": f"{name}.rollout", **no_kill}
        second = merged(own, config.cluster.sbatch, options(config, "rollout"))
        found = [merged(common, no_kill, options(config, "trainer")), second]
    elif kind == "single":
        found = [merged(common, {"no_kill": rollout > 1}, merged_options(config))]
    else:
        found = [merged(common, options(config, "trainer"))]
    if slot:
        found[0]["dependency"] = ",".join(
            str(each) for each in (found[0].get("dependency"), "singleton") if each
        )
    return found


def merged(*parts: Mapping[str, Option]) -> Options:
    """Merge options by name. A later one wins, unless it is None."""
    return {
        option_name(key): value
        for part in parts
        for key, value in part.items()
        if value is not None
    }


def option_name(key: str) -> str:
    """Return the name under which an option is compared: --mail-type is mail_type."""
    return key.lstrip("-").replace("-", "_")


def rollout_script(config: Config, output: str, command: str) -> str:
    """Return the sbatch script of the rollout job of a split run: an array with one node per task,
    so that Slurm requeues a task by itself when its node dies."""
    return _text([rollout_section(config, output)], "trap '' USR2", f"exec {command}")


def rollout_section(config: Config, output: str = "") -> Options:
    """Return sbatch's options of a split run's rollout job."""
    return merged(
        {
            "job_name": f"{config.launch.job_name}.rollout",
            "array": f"0-{config.roles.rollout.nodes - 1}",
            **_common(config, output),
        },
        config.cluster.sbatch,
        options(config, "rollout"),
        {"nodes": 1},
    )


def _common(config: Config, output: str) -> Options:
    return {
        "time": config.launch.minutes,
        "output": output,
        "open_mode": "append",
        "requeue": True,
        "signal": f"B:USR2@{signal_s(config)}",
    }


def options(config: Config, role: str) -> Options:
    """Return sbatch's options for a role; the cluster's where the role has none."""
    conf: RoleConf = getattr(config.roles, role)
    cluster = config.cluster
    return {
        "nodes": conf.nodes,
        "ntasks_per_node": conf.ranks_per_node if role == "trainer" else 1,
        "cpus_per_task": conf.cpus_per_task,
        "mem": conf.mem,
        **_gpus(config, conf),
        "partition": conf.partition or cluster.partition,
        "account": conf.account or cluster.account,
        "qos": conf.qos or cluster.qos,
        "constraint": conf.constraint,
        **{option_name(name): value for name, value in conf.sbatch.items()},
    }


def merged_options(config: Config) -> Options:
    """Return the options of one homogeneous job for all roles: the nodes of both, each with the
    larger of what the roles ask for. `sbatch_checks` has refused what cannot be merged."""
    both = [options(config, role) for role in ROLES]
    trainer, rollout = config.roles.trainer, config.roles.rollout
    amounts = {
        name: str(max(found, key=_last_number))
        for name in ("gres", "gpus_per_node")
        if (found := [str(each[name]) for each in both if each.get(name)])
    }
    return merged(
        *reversed(both),
        {
            "nodes": trainer.nodes + rollout.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": max(
                trainer.ranks_per_node * trainer.cpus_per_task, rollout.cpus_per_task
            ),
            "mem": max((conf.mem for conf in (trainer, rollout) if conf.mem), key=_memory)
            if trainer.mem or rollout.mem
            else None,
            **amounts,
        },
    )


def _last_number(value: str) -> int:
    digits = value[len(value.rstrip("0123456789")) :]
    return int(digits or 1)


def _memory(mem: str) -> float:
    return megabytes(mem) or float("inf")  # 0: all of it


def _gpus(config: Config, conf: RoleConf) -> Options:
    if conf.gres:
        return {"gres": conf.gres}
    if not conf.gpus_per_node or not config.cluster.gpus:
        return {}
    option, _, value = (
        config.cluster.gpus.removeprefix("--").format(n=conf.gpus_per_node).partition("=")
    )
    return {option.replace("-", "_"): value or True}


def megabytes(mem: str) -> float:
    """Parse Slurm's notation of memory.

    >>> megabytes("500"), megabytes("2G"), megabytes("2GB")
    (500.0, 2048.0, 2048.0)
    """
    number = mem.upper().removesuffix("B")
    scale = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}.get(number[-1:])
    return float(number[:-1]) * scale if scale else float(number)


def _text(sections: Sequence[Mapping[str, Option]], *lines: str) -> str:
    out = ["#!/bin/bash"]
    for number, section in enumerate(sections):
        out += ["#SBATCH hetjob"] if number else []
        out += [
            f"#SBATCH {option(key, value)}"
            for key, value in section.items()
            if value is not None and value is not False
        ]
    return "\n".join([*out, *lines, ""])


def option(key: str, value: Option) -> str:
    name = f"--{option_name(key).replace('_', '-')}"
    return name if value is True else f"{name}={shlex.quote(str(value))}"


def slot_name(job_name: str, sweep: str, point: int, slots: int) -> str | None:
    """Return the job name of a point of a sweep, one of `slots`: jobs that share a name run one
    after another. 0 slots: no limit, no name.

    >>> [slot_name("kl", "/runs/a", point, 2) for point in range(3)]
    ['kl-76a66ae4-0', 'kl-76a66ae4-1', 'kl-76a66ae4-0']
    >>> slot_name("kl", "/runs/a", 0, 0)
    """
    sweep_id = f"{zlib.crc32(sweep.encode()):08x}"  # no slots are shared between sweeps
    return f"{job_name}-{sweep_id}-{point % slots}" if slots else None


def gpu_hours(config: Config) -> float:
    """Return the GPU-hours that a run may use: all nodes for the whole time limit."""
    count = 0
    for role in ROLES:
        conf: RoleConf = getattr(config.roles, role)
        gres = conf.gres or f"gpu:{conf.gpus_per_node}"
        count += conf.nodes * sum(number for _, number in gpus_of(gres))
    return count * config.launch.minutes / 60


# --- environments and nodes


def submission_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch, without variables of a surrounding job, which would leak
    into the new one."""
    leaks = ("SLURM_", "SLURMD_", "CUDA_VISIBLE", "GPU_DEVICE", "ROCR_VISIBLE")
    return {
        key: value
        for key, value in environment.kept(env, environment.SLURM).items()
        if key in ("SLURM_CONF", "SLURM_CLUSTERS") or not key.startswith(leaks)
    }


def allocated_nodes(
    config: Config, env: Mapping[str, str], expand_nodes: Callable[[str], Sequence[str]]
) -> dict[str, Allocation]:
    """Read each role's nodes from the batch step's environment. `expand_nodes` expands a node list.

    Raises ValueError, naming the key, when the job is not of the kind or the size of the config.
    """
    kind, roles, job = config.launch.allocation, config.roles, env["SLURM_JOB_ID"]
    if kind == "het":
        if env.get("SLURM_HET_SIZE") != "2":
            raise ValueError(
                "launch.allocation: is het, but this is not a heterogeneous job of two components"
                " (trainer, rollout)"
            )
        allocations = {}
        for i, role in enumerate(ROLES):
            nodes = expand_nodes(env[f"SLURM_JOB_NODELIST_HET_GROUP_{i}"])
            component = env[f"SLURM_JOB_ID_HET_GROUP_{i}"]
            allocations[role] = Allocation(tuple(nodes), component, i)
    elif kind == "single":
        all_nodes = tuple(expand_nodes(env["SLURM_JOB_NODELIST"]))
        cut = roles.trainer.nodes
        allocations = {
            "trainer": Allocation(all_nodes[:cut], job),
            "rollout": Allocation(all_nodes[cut:], job),
        }
    else:
        allocations = {"trainer": Allocation(tuple(expand_nodes(env["SLURM_JOB_NODELIST"])), job)}
    for role, allocation in allocations.items():
        if len(allocation.nodes) != (asked := getattr(roles, role).nodes):
            raise ValueError(
                f"roles.{role}.nodes: is {asked}, but this job has {len(allocation.nodes)} for it"
            )
    return allocations
