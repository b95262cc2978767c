"""The srun command of a step, as text, and the environment for it. Pure functions."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atropos_hpc.config import RoleConf
from atropos_hpc.launch.slurm.sbatch import Allocation

# srun takes its options from these where none are given; a batch step holds the leader's values.
_COUNTS = {
    "NTASKS", "NPROCS", "NNODES", "JOB_NUM_NODES", "NTASKS_PER_NODE", "TASKS_PER_NODE",
    "CPUS_PER_TASK", "CPUS_PER_GPU", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GPUS_PER_SOCKET",
    "GPU_BIND", "GPU_FREQ", "GRES", "MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU", "MEM_BIND",
    "CPU_BIND", "CPU_BIND_TYPE", "CPU_BIND_LIST", "CPU_BIND_VERBOSE", "DISTRIBUTION", "HINT",
    "EXCLUSIVE", "EXACT", "OVERLAP", "THREADS_PER_CORE", "NTASKS_PER_GPU", "NTASKS_PER_CORE",
    "NO_KILL", "OPEN_MODE", "UNBUFFEREDIO", "TIMELIMIT", "EXPORT_ENV", "HET_GROUP",
    "KILL_BAD_EXIT", "TRES_PER_TASK",
}  # fmt: skip
_OTHERS = {
    "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "RANK", "WORLD_SIZE",
    "LOCAL_RANK", "LOCAL_WORLD_SIZE",
}  # fmt: skip


def step_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for srun: the job's identity without the batch step's own counts and
    the submitter's SRUN_* and SBATCH_*.

    >>> env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SBATCH_QOS": "x", "RANK": "0"}
    >>> step_environment({**env, "SLURM_JOB_NODELIST_HET_GROUP_1": "n2"})
    {'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST_HET_GROUP_1': 'n2'}
    """
    drop = {f"SLURM_{name}" for name in _COUNTS} | _OTHERS
    return {
        key: value
        for key, value in env.items()
        if key not in drop and not key.startswith(("SRUN_", "SBATCH_"))
    }


@dataclass(frozen=True)
class StepRequest:
    """A step to be started by srun. `program` is a shell script that each task runs; `container` is
    cluster.container."""

    name: str
    nodes: Sequence[str]
    tasks_per_node: int
    program: str
    container: str = ""


def srun(step: StepRequest, allocation: Allocation, conf: RoleConf) -> tuple[str, ...]:
    """Return the command line of a step, with every count given.

    The step gets all GPUs and all memory that its job has on these nodes. Each of its tasks sees
    all of these GPUs, and runtime/devices.py gives each process its own. This is srun's default,
    and must not be asked for: with --gpu-bind=none, Slurm 22.05 empties CUDA_VISIBLE_DEVICES.
    With --overlap, a step that is started again need not wait until Slurm has removed the dead one.
    """
    pyxis = conf.container and step.container == "pyxis"
    return (
        "srun",
        *([f"--het-group={allocation.het}"] if allocation.het is not None else []),
        f"--nodes={len(step.nodes)}",
        f"--ntasks={len(step.nodes) * step.tasks_per_node}",
        f"--ntasks-per-node={step.tasks_per_node}",
        f"--nodelist={','.join(step.nodes)}",
        f"--cpus-per-task={conf.cpus_per_task}",
        "--mem=0",
        "--overlap",
        "--kill-on-bad-exit=1",
        "--wait=30",
        f"--job-name={step.name}",
        "--export=ALL",
        *([f"--container-image={conf.container}"] if pyxis else []),
        *conf.srun,
        "bash",
        "-c",
        step.program,
    )


def program(
    command: Sequence[str],
    conf: RoleConf,
    cluster_setup: Sequence[str],
    container: str,
    variables: Mapping[str, str],
    log: str,
) -> str:
    """Return the shell script of a step's task: the setup lines of the site and the role, exports
    (whose values the shell expands), and the command.

    The task opens its own `log`, a quoted path of the shell. srun's --output would not do: in a
    component of a het job, %t is one too low with Slurm 26.05. What Slurm says of the step goes
    into srun's log.
    """
    image = conf.container if container != "pyxis" else None
    prefix = [*shlex.split(container), image] if image else []
    exports = [f'export {key}="{value}"' for key, value in variables.items()]
    last = f"exec {shlex.join([*prefix, *command])}"
    # Slurm passes the umask on, a container or a login script may not.
    own = "umask 077"
    setup = [own, f"exec >>{log} 2>&1", *cluster_setup, *conf.setup, own]
    return "\n".join([*setup, "unset ATROPOS_HPC_PARENT", *exports, last])
