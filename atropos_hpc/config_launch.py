"""Declare the config keys of the site, the launch and the roles; a part of `atropos_hpc.config`."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from atropos_hpc.config_rollout import WEEK_S
from atropos_hpc.schema import key, section


@dataclass
class ClusterConf:
    """This machine. On Slurm, these are the site's defaults for what `roles` leaves open."""

    name: str = key("local", "name of the site in logs")
    host: Optional[str] = key(
        None,
        "address or network interface (ib0) that servers listen on; null: the node's address by "
        "Slurm, 127.0.0.1 locally",
    )
    partition: Optional[str] = key(None, "null: Slurm's default")
    account: Optional[str] = key(None, "account to charge; null: the default account")
    qos: Optional[str] = key(None, "quality of service; null: the default one")
    gpus: str = key(
        "--gpus-per-node={n}",
        "sbatch option that requests n GPUs per node; empty where nodes are allocated whole",
    )
    container: str = key(
        "pyxis",
        "container runtime of roles.*.container: pyxis (srun --container-image), or a command "
        "that is put before the image",
    )
    setup: List[str] = key(
        [], "shell lines before every program of a step, such as `module load cuda`"
    )
    sbatch: Dict[str, Any] = key({}, "further sbatch options of every job, without the dashes")
    shared: List[str] = key(
        [],
        "directories that all nodes share; a run directory elsewhere is refused. Empty: only "
        "in-memory filesystems are refused",
    )
    storage_gb_per_s: float = key(
        0.25,
        "what the shared filesystem reaches at least, for all ranks together, GB/s: the deadlines "
        "of writing policy versions and checkpoints and of stopping grow with their bytes at this "
        "rate, those of a server that loads a version at 0.4 of it",
        gt=0,
        le=10_000,
    )


@dataclass
class LaunchConf:
    """A run on this machine: processes, restarts and deadlines."""

    allocation: str = key(
        "local",
        "local: this machine, or `het` with hydra/launcher=submitit_slurm; het: one heterogeneous "
        "job; split: two linked jobs; single: one homogeneous job, partitioned",
        choices=("local", "het", "split", "single"),
    )
    job_name: str = key("atropos", "name of the Slurm job")
    minutes: int = key(
        60,
        "time limit of a Slurm job; the run is saved and requeued before it is reached",
        ge=1,
        le=525_600,
    )
    signal_s: int = key(
        180,
        "how long before the time limit Slurm sends its signal, seconds, for a small model; see "
        "save_timeout_s",
        ge=0,
        le=65535,
    )
    requeues: int = key(
        3, "how often a job is requeued in a row without a durable step in between", ge=0, le=1000
    )
    submit_rollout: bool = key(
        True,
        "split: let the supervisor submit the rollout job; false: submit it yourself with "
        "slurm/split_rollout.sbatch",
    )
    wait: bool = key(False, "submitit_slurm: wait for all points and show their progress")
    check_versions: bool = key(
        True,
        "refuse a role's environment whose torch, verl, vllm or atroposlib differ from the pinned "
        "versions in their minor number",
    )
    dry_run: bool = key(False, "show what would be submitted or started, then exit")
    restarts: int = key(
        5, "restarts of one process without progress before the run fails", ge=0, le=1000
    )
    backoff_s: float = key(
        1.0, "delay before the first restart, doubled at each further one, seconds", gt=0, le=3600
    )
    start_timeout_s: float = key(
        900.0, "timeout of the learner's first batch, seconds", gt=0, le=WEEK_S
    )
    step_timeout_s: float = key(
        1800.0,
        "timeout of every further batch, and of a micro-batch, seconds; what an answer of "
        "max_length takes beyond 600 s is added",
        gt=0,
        le=WEEK_S,
    )
    save_timeout_s: float = key(
        120.0,
        "timeout of the final checkpoint of a run that is stopped, seconds, for a small model; two "
        "policy versions and two checkpoints at cluster.storage_gb_per_s are added",
        gt=0,
        le=WEEK_S,
    )
    grace_s: float = key(10.0, "time from SIGTERM to SIGKILL, seconds", gt=0, le=3600)


@dataclass
class RoleConf:
    """A group of nodes with its own resources and its own Python environment."""

    nodes: int = key(1, "number of nodes", ge=1, le=16384)
    ranks_per_node: int = key(
        1, "learner ranks per node, usually one per GPU; not used by the rollout role", ge=1, le=256
    )
    cpus_per_task: int = key(
        1, "CPUs per learner rank; for the rollout role, CPUs per node", ge=1, le=4096
    )
    gpus_per_node: int = key(0, "GPUs per node, requested with cluster.gpus", ge=0, le=64)
    gres: Optional[str] = key(None, "value of --gres, instead of gpus_per_node")
    mem: Optional[str] = key(
        None,
        "memory per node; null: the partition's default",
        pattern=(r"(?i)0|[1-9]\d*([KMGT]B?)?", "a whole number with K, M (the default), G or T"),
    )
    partition: Optional[str] = key(None, "null: cluster.partition")
    account: Optional[str] = key(None, "null: cluster.account")
    qos: Optional[str] = key(None, "null: cluster.qos")
    constraint: Optional[str] = key(None, "required node features, such as a100")
    sbatch: Dict[str, Any] = key(
        {},
        "further sbatch options of the role's nodes, without the dashes, such as "
        '{nodelist: "n[1-4]", exclusive: true}',
    )
    srun: List[str] = key([], "further srun arguments of the role's steps")
    python: Optional[str] = key(
        None,
        "interpreter of the role; null: the one that runs this command for the trainer, "
        ".venv-rollout/bin/python for the rollout role",
        path="program",
    )
    container: Optional[str] = key(None, "container image to run in; null: none", path="program")
    setup: List[str] = key([], "shell lines before the role's programs, after cluster.setup")


@dataclass
class RolesConf:
    """Resources of the two roles. Runs on this machine use nodes, ranks_per_node and python only;
    everything else is requested from Slurm."""

    trainer: RoleConf = section(RoleConf)
    rollout: RoleConf = section(RoleConf)
