"""Check what a config asks of sbatch, on any cluster: options of the run's own, amounts, conflicts.

launch/cluster_check.py compares the request with the cluster at hand.
"""

import re
from collections.abc import Iterator

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch.slurm.sbatch import ROLES, Options, option, option_name, options
from atropos_hpc.runtime.deadlines import signal_s

MEMORY = re.compile(r"\d+([KMGT]B?)?", re.I)
# sbatch's options that have a config key of their own
OWN_OPTIONS = {
    "nodes": "roles.{role}.nodes",
    "ntasks_per_node": "roles.{role}.ranks_per_node",
    "cpus_per_task": "roles.{role}.cpus_per_task",
    "gpus_per_node": "roles.{role}.gpus_per_node",
    "gres": "roles.{role}.gres",
    "mem": "roles.{role}.mem",
    "partition": "roles.{role}.partition",
    "account": "roles.{role}.account",
    "qos": "roles.{role}.qos",
    "constraint": "roles.{role}.constraint",
    "time": "launch.minutes",
    "signal": "launch.signal_s",
    "job_name": "launch.job_name",
}
OF_CLUSTER = {name: f"cluster.{name}" for name in ("partition", "account", "qos")}
DEFAULTS = ("mem", "constraint")  # in cluster.sbatch: for roles without their own
FIXED = {  # what a run relies on, and why
    "array": "heterogeneous jobs have none; sweep a key instead",
    "wrap": "the job runs the program",
    "ntasks": "roles.{role}.ranks_per_node counts tasks per node",
    "output": "the log of every job is in the sweep's directory",
    "error": "errors are in the job's log",
    "open_mode": "a requeued job appends to its log",
    "no_kill": "it follows from the number of nodes",
}


def problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the config for any cluster."""
    launch = config.launch
    if launch.allocation == "local":
        for name, role in (("trainer", config.roles.trainer), ("rollout", config.roles.rollout)):
            if role.container:
                yield Problem(
                    f"roles.{name}.container",
                    "is for Slurm only; with launch.allocation=local, run the command inside it",
                )
        return
    if (warned_s := signal_s(config)) >= 60 * launch.minutes:
        yield Problem(
            "launch.signal_s",
            f"{warned_s} s is not less than the time limit, launch.minutes={launch.minutes}",
        )
    if launch.signal_s < launch.save_timeout_s:
        yield Problem(
            "launch.signal_s",
            f"{launch.signal_s} s is less than a checkpoint may take,"
            f" launch.save_timeout_s={launch.save_timeout_s:g}",
        )
    gpus = config.cluster.gpus
    if gpus and not (gpus.startswith("--") and "{n}" in gpus):
        yield Problem(
            "cluster.gpus",
            f"{gpus!r} is not an sbatch option with {{n}} for the number, such as --gres=gpu:{{n}}",
        )
    amounts = {f"roles.{name}.mem": getattr(config.roles, name).mem for name in ROLES}
    unparsable = False
    for key, mem in {**amounts, "cluster.sbatch.mem": config.cluster.sbatch.get("mem")}.items():
        if mem is not None and not MEMORY.fullmatch(str(mem)):
            unparsable = True
            yield Problem(key, f"{mem!r} is not an amount of memory for Slurm, such as 64G or 900M")
    yield from _reserved_options(config)
    if launch.allocation == "single" and not unparsable:
        yield from _single_conflicts(config)


def _reserved_options(config: Config) -> Iterator[Problem]:
    """Yield options of `sbatch` maps that the run sets itself: they would vanish or break it."""
    roles = [(f"roles.{name}.sbatch", getattr(config.roles, name).sbatch) for name in ROLES]
    for key, given in [("cluster.sbatch", config.cluster.sbatch), *roles]:
        of_cluster = key == "cluster.sbatch"
        role = "*" if of_cluster else key.split(".")[1]
        for given_name, value in given.items():
            name = option_name(given_name)
            own = OF_CLUSTER.get(name) if of_cluster else None
            own = own or OWN_OPTIONS.get(name, "").format(role=role)
            if of_cluster and name in DEFAULTS:
                own = ""
            if own:
                yield Problem(f"{key}.{given_name}", f"is set by the run; change {own} instead")
            elif name in FIXED and value not in (None, False):
                reason = FIXED[name].format(role=role)
                yield Problem(f"{key}.{given_name}", f"cannot be given: {reason}")


def _single_conflicts(config: Config) -> Iterator[Problem]:
    """Yield what the roles ask for differently, where one job has the nodes of both."""
    first, second = (options(config, role) for role in ROLES)
    kinds = [
        {
            name: str(of[name]).rstrip("0123456789")
            for name in ("gres", "gpus_per_node")
            if name in of
        }
        for of in (first, second)
    ]
    if all(kinds) and kinds[0] != kinds[1]:
        yield Problem(
            "roles.rollout.gres",
            f"launch=single makes one job, whose nodes cannot have {_gpu_words(second)} for one"
            f" role and {_gpu_words(first)} for the other",
        )
    amounts = {"nodes", "ntasks_per_node", "cpus_per_task", "mem", "gres", "gpus_per_node"}
    for name in sorted((first.keys() & second.keys()) - amounts):
        one, other = first[name], second[name]
        if one is not None and other is not None and one != other:
            key = name if f"roles.{{role}}.{name}" in OWN_OPTIONS.values() else f"sbatch.{name}"
            yield Problem(
                f"roles.rollout.{key}",
                f"is {other}, but launch=single makes one job, and roles.trainer.{key} is {one}",
            )


def _gpu_words(of: Options) -> str:
    return " ".join(option(name, of[name]) for name in ("gres", "gpus_per_node") if of.get(name))
