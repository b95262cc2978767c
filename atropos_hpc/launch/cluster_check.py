"""What a run asks for, held against what the cluster can give. Slurm itself accepts much of what it can never start, and lets it wait.

One call each of sinfo and scontrol, whatever the cluster's size; the rest is comparing. In the end sbatch itself looks at the script.
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atropos_hpc.config import Config, RoleConf
from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.schema import did_you_mean
from atropos_hpc.validate import Problem

LOCAL_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
TEST_TIMEOUT_S = 60.0
# what sbatch says also where nodes are only down or drained, and will come back; whether they can do it at all has been looked at before
AWAY = ("Requested node configuration is not available", "Required node not available")
# a word of what sbatch says -> the key to change
BLAMED = {
    "qos": "cluster.qos",
    "account": "cluster.account",
    "partition": "cluster.partition",
    "time limit": "launch.minutes",
}


@dataclass(frozen=True)
class Nodes:
    """Nodes of one partition that are alike."""

    count: int
    cpus: int
    megabytes: int
    gres: str
    features: frozenset[str]

    def gpus(self, kind: str = "") -> int:
        """How many GPUs each has, of one type or of any."""
        found = re.findall(r"gpu(?::([^:(,]+))?:(\d+)", self.gres)
        return sum(int(number) for of, number in found if kind in ("", of))


@dataclass(frozen=True)
class Partition:
    name: str
    up: bool
    default: bool
    minutes: float  # limit; infinite when there is none
    max_nodes: float
    nodes: tuple[Nodes, ...]
    only: dict[str, tuple[str, ...]]  # "account", "qos" -> those that may use it, where not all may
    never: dict[str, tuple[str, ...]]  # "account", "qos" -> those that may not


@dataclass(frozen=True)
class Cluster:
    partitions: dict[str, Partition]
    scheduler: str
    max_array: int


def check(config: Config, run_dir: Path) -> list[Problem]:
    """Every way in which this cluster cannot run it."""
    if not commands.is_installed():
        return [
            Problem(
                "hydra/launcher",
                "submitit_slurm needs Slurm, and there is no sbatch on this machine",
            )
        ]
    try:
        cluster = look()
    except commands.SlurmError as error:
        return [Problem("cluster", f"Slurm does not answer: {error}")]
    found = [*_shared(config, run_dir), *_scheduler(config, cluster)]
    for name in sbatch.ROLES:
        found += _role(config, name, cluster)
    return found or _sbatch(config)


@functools.cache
def look() -> Cluster:
    """The cluster as it is now. Raises SlurmError."""
    nodes: dict[str, list[Nodes]] = {}
    for line in commands.run_command(
        "sinfo", "-h", "-e", "-a", "-o", "%R|%D|%c|%m|%G|%f"
    ).splitlines():
        partition, count, cpus, memory, gres, features = line.split("|")
        each = Nodes(
            int(count),
            int(cpus.rstrip("+")),
            int(memory.rstrip("+")),
            gres,
            frozenset(features.split(",")),
        )
        nodes.setdefault(partition, []).append(each)
    partitions = {}
    for record in commands.parse_records(
        commands.run_command("scontrol", "-o", "show", "partition")
    ):
        name = record["PartitionName"]
        partitions[name] = Partition(
            name, record["State"] == "UP", record["Default"] == "YES", minutes(record["MaxTime"]), _number(record["MaxNodes"]),
            tuple(nodes.get(name, ())), _names(record, "Allow"), _names(record, "Deny"),
        )  # fmt: skip
    conf = dict(
        re.findall(
            r"^(\w+)\s*=\s*(.*?)\s*$", commands.run_command("scontrol", "show", "config"), re.M
        )
    )
    return Cluster(partitions, conf.get("SchedulerType", ""), int(conf.get("MaxArraySize", "1001")))


def minutes(limit: str) -> float:
    """Slurm's spelling of a time limit, in minutes.

    >>> minutes("1-02:00:00"), minutes("00:30:00"), minutes("UNLIMITED")
    (1560.0, 30.0, inf)
    """
    if not limit[:1].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")


def _names(record: dict[str, str], what: str) -> dict[str, tuple[str, ...]]:
    found = {
        "account": record.get(f"{what}Accounts", "ALL"),
        "qos": record.get(f"{what}Qos", "ALL"),
    }
    return {
        option: tuple(names.split(","))
        for option, names in found.items()
        if names not in ("ALL", "(null)", "NONE")
    }


def _shared(config: Config, run_dir: Path) -> Iterator[Problem]:
    roots = [Path(root).resolve() for root in config.cluster.shared]
    home = run_dir.resolve()
    if roots and not any(home.is_relative_to(root) for root in roots):
        yield Problem(
            "run_dir",
            f"{run_dir} is not on a filesystem that all nodes share: {', '.join(map(str, roots))} (cluster.shared)",
        )
    if not roots and (kind := filesystem(home)) in LOCAL_FILESYSTEMS:
        yield Problem(
            "run_dir",
            f"{run_dir} is on this machine's {kind}; all nodes need it (if they share it all the same: cluster.shared)",
        )


def filesystem(path: Path) -> str:
    """The type of the filesystem that a path, or what there is of it, lies on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    points = [(len(words[1]), words[2]) for words in mounts if path.is_relative_to(words[1])]
    return max(points, default=(0, ""))[1]


def _scheduler(config: Config, cluster: Cluster) -> Iterator[Problem]:
    kind = config.launch.allocation
    if kind == "het" and cluster.scheduler != "sched/backfill":
        yield Problem(
            "launch.allocation",
            f"het jobs are only started by sched/backfill, and this cluster has {cluster.scheduler}; use split or single",
        )
    if kind == "split" and config.roles.rollout.nodes >= cluster.max_array:
        yield Problem(
            "roles.rollout.nodes",
            f"{config.roles.rollout.nodes} are more than an array may have here, {cluster.max_array - 1}",
        )


def _role(config: Config, name: str, cluster: Cluster) -> Iterator[Problem]:
    conf: RoleConf = getattr(config.roles, name)
    asked, prefix = sbatch.options(config, name), f"roles.{name}"
    wanted = asked["partition"] or next(
        (p.name for p in cluster.partitions.values() if p.default), None
    )
    key = (
        f"{prefix}.partition"
        if conf.partition or not config.cluster.partition
        else "cluster.partition"
    )
    if wanted is None:
        yield Problem(
            key,
            f"is needed: this cluster has no default partition; there are {', '.join(cluster.partitions)}",
        )
        return
    for partition_name in str(wanted).split(","):
        partition = cluster.partitions.get(partition_name)
        if partition is None:
            known = cluster.partitions
            yield Problem(
                key,
                f"there is no partition {partition_name}; there are {', '.join(known)}{did_you_mean(partition_name, known)}",
            )
            continue
        if not partition.up:
            yield Problem(key, f"partition {partition.name} is not up")
        yield from _limits(config, prefix, asked, partition)
        yield from _hardware(config, prefix, conf, asked, partition)


def _limits(
    config: Config, prefix: str, asked: Mapping[str, object], partition: Partition
) -> Iterator[Problem]:
    here, nodes = f"partition {partition.name}", int(str(asked["nodes"]))
    if config.launch.minutes > partition.minutes:
        yield Problem(
            "launch.minutes",
            f"{config.launch.minutes} are more than the {partition.minutes:.0f} that {here} allows",
        )
    if nodes > partition.max_nodes:
        yield Problem(
            f"{prefix}.nodes",
            f"{nodes} are more than the {partition.max_nodes:.0f} that {here} gives one job",
        )
    for option in ("account", "qos"):
        value, only, never = (
            asked[option],
            partition.only.get(option),
            partition.never.get(option, ()),
        )
        if only and value not in only:
            yield Problem(
                f"{prefix}.{option}",
                f"{here} is for {', '.join(only)} only" + (f", not for {value}" if value else ""),
            )
        if value in never:
            yield Problem(f"{prefix}.{option}", f"{here} is not for {value}")


def _hardware(
    config: Config, prefix: str, conf: RoleConf, asked: Mapping[str, object], partition: Partition
) -> Iterator[Problem]:
    """Which of the partition's nodes have all that one node of the role needs? The first need that leaves none is the problem."""
    fitting, here = list(partition.nodes), f"partition {partition.name}"

    def narrow(key: str, what: str, keep: Sequence[Nodes], most: str) -> Iterator[Problem]:
        nonlocal fitting
        if fitting and not keep:
            yield Problem(f"{prefix}.{key}", f"{what}: no node of {here} has as much{most}")
        fitting = list(keep)

    if conf.constraint and re.fullmatch(r"[\w.-]+", conf.constraint):
        features = sorted({feature for nodes in fitting for feature in nodes.features} - {"(null)"})
        if not any(conf.constraint in nodes.features for nodes in fitting):
            offered = f"they have {', '.join(features)}" if features else "they have none"
            yield Problem(
                f"{prefix}.constraint",
                f"no node of {here} has the feature {conf.constraint}; {offered}{did_you_mean(conf.constraint, features)}",
            )
            return
        fitting = [nodes for nodes in fitting if conf.constraint in nodes.features]
    key, kind, gpus = _gpus(conf, asked)
    if gpus:
        most = max((nodes.gpus(kind) for nodes in fitting), default=0)
        yield from narrow(
            key,
            f"{gpus} {kind or 'GPUs'}",
            [n for n in fitting if n.gpus(kind) >= gpus],
            f"; the most is {most}",
        )
    cpus = int(str(asked["ntasks_per_node"])) * conf.cpus_per_task
    most = max((nodes.cpus for nodes in fitting), default=0)
    each = (
        f" ({asked['ntasks_per_node']} ranks of {conf.cpus_per_task})"
        if int(str(asked["ntasks_per_node"])) > 1
        else ""
    )
    yield from narrow(
        "cpus_per_task",
        f"{cpus} CPUs{each}",
        [n for n in fitting if n.cpus >= cpus],
        f"; the most is {most}",
    )
    if conf.mem:
        most = max((nodes.megabytes for nodes in fitting), default=0)
        enough = [n for n in fitting if n.megabytes >= sbatch.megabytes(conf.mem)]
        yield from narrow("mem", conf.mem, enough, f"; the most is {most}M")
    have, wanted = sum(nodes.count for nodes in fitting), int(str(asked["nodes"]))
    if fitting and wanted > have:
        yield Problem(
            f"{prefix}.nodes",
            f"{wanted} are more than the {have} nodes of {here} that have what each of them needs",
        )


def _gpus(conf: RoleConf, asked: Mapping[str, object]) -> tuple[str, str, int]:
    """(key, type or "", number per node) of what a role asks for. Kinds of gres other than GPUs are left to sbatch."""
    if conf.gres:
        found = re.search(r"gpu(?::([A-Za-z][\w.-]*))?(?::(\d+))?", conf.gres)
        return ("gres", found[1] or "", int(found[2] or 1)) if found else ("gres", "", 0)
    spelt = re.search(
        r"(?:gpu:)?([A-Za-z][\w.-]*):\d+$",
        str(asked.get("gres") or asked.get("gpus_per_node") or ""),
    )
    kind = spelt[1] if spelt and spelt[1] != "gpu" else ""
    return "gpus_per_node", kind, conf.gpus_per_node


def _sbatch(config: Config) -> list[Problem]:
    """sbatch's own opinion of the script, which knows every option; nothing is queued."""
    if shutil.which("sbatch") is None:
        return []
    texts = [("launch", sbatch.script(config, "/dev/null", f"{sys.executable} -V"))]
    if config.launch.allocation == "split":
        texts.append(
            ("roles.rollout", sbatch.rollout_script(config, "/dev/null", f"{sys.executable} -V"))
        )
    return [problem for key, text in texts for problem in _test(key, text)]


@functools.cache
def _test(key: str, text: str) -> list[Problem]:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as script:
        script.write(text)
        script.flush()
        try:
            command = ["sbatch", "--test-only", script.name]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TEST_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return [
                Problem(
                    "cluster", f"sbatch --test-only did not answer within {TEST_TIMEOUT_S:.0f} s"
                )
            ]
    if done.returncode == 0 or any(words in done.stderr for words in AWAY):
        return []
    said = "; ".join(
        line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines()
    )
    return [Problem(blamed(said) or key, f"sbatch refuses it: {said}")]


def blamed(said: str) -> str | None:
    """The key that sbatch's words are about, if they are about one. What only the accounting knows, only sbatch can tell.

    >>> blamed("Batch job submission failed: Invalid account or account/partition combination specified")
    'cluster.account'
    >>> blamed("unrecognized option '--exclusve'")
    """
    return next((key for word, key in BLAMED.items() if word in said.lower()), None)
