"""Read a Slurm cluster's partitions, nodes and limits, by one call of sinfo and a few of scontrol.

Only the controller is asked. It also knows the limits of each QOS, where it enforces them.
"""

import contextlib
import functools
import re
from dataclasses import dataclass, field

from atropos_hpc.runtime import slurm

LIMITS_ENFORCED = re.compile(r"^AccountingStorageEnforce\s*=.*\b(limits|safe)\b", re.M)


@dataclass(frozen=True)
class Nodes:
    """Identical nodes of one partition."""

    count: int
    cpus: int
    megabytes: int
    gres: str
    features: frozenset[str]

    def gpus(self, kind: str = "") -> int:
        """Return the number of GPUs per node, of one type or of any."""
        return sum(number for of, number in gpus_of(self.gres) if kind in ("", of))


def gpus_of(gres: str) -> list[tuple[str, int]]:
    """Return (type or "", number) of each entry for GPUs.

    >>> gpus_of("gpu:a100:2(S:0-1),gpu:4,shard:8"), gpus_of("gpu")
    ([('a100', 2), ('', 4)], [('', 1)])
    """
    found = re.findall(r"(?:^|,)gpu(?::([A-Za-z_][^:(,=]*))?(?:[:=](\d+))?", gres)
    return [(kind, int(number or 1)) for kind, number in found]


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; those of CPUs and memory are per node.

    `only`, `never`: "account" and "qos" -> the allowed and the denied names, where there is such a
    list.
    """

    name: str
    up: bool
    default: bool
    minutes: float  # time limit; infinite if there is none
    max_nodes: float
    nodes: tuple[Nodes, ...]
    only: dict[str, tuple[str, ...]]
    never: dict[str, tuple[str, ...]]
    min_nodes: float = 0
    max_cpus: float = float("inf")
    max_megabytes: float = float("inf")
    qos: str = ""  # whose limits hold for all jobs there
    default_of: str = "DefMemPerNode=UNLIMITED"  # memory of a job that asks for none

    def default_memory(self, cpus: int, gpus: int) -> float:
        """Return the megabytes per node of a job with so many CPUs and GPUs that asks for none.

        >>> main = Partition("main", True, True, 60, 1, (), {}, {}, default_of="DefMemPerCPU=2000")
        >>> main.default_memory(4, 0)
        8000.0
        """
        name, _, megabytes = self.default_of.partition("=")
        units = {"DefMemPerCPU": cpus, "DefMemPerGPU": gpus or float("inf")}.get(name, 1)
        return _number(megabytes) * units


@dataclass(frozen=True)
class Cluster:
    """`qos`: name -> limits per job that are enforced, of "minutes", "node", "cpu", "gres/gpu".
    `shared`: name -> limits on what runs at a time, of "node", "cpu", "gres/gpu", "job"; each with
    Slurm's name for it."""

    partitions: dict[str, Partition]
    scheduler: str
    max_array: int
    qos: dict[str, dict[str, float]] = field(default_factory=dict)
    shared: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)


@functools.cache
def read_cluster() -> Cluster:
    """Return the cluster as it is now. Raises SlurmError."""
    config, qos = slurm.run_command("scontrol", "show", "config"), ""
    if LIMITS_ENFORCED.search(config):
        with contextlib.suppress(slurm.SlurmError):  # a site may keep it from users
            qos = slurm.run_command("scontrol", "-o", "show", "assoc_mgr", "flags=qos")
    return parse_cluster(
        slurm.run_command("sinfo", "-h", "-e", "-a", "-o", "%R|%D|%c|%m|%G|%f"),
        slurm.run_command("scontrol", "-o", "show", "partition"),
        config,
        qos,
    )


def cluster_answers() -> bool:
    """Tell whether the cluster could be read; the checks then use what was read."""
    try:
        return bool(read_cluster())
    except slurm.SlurmError:
        return False


def parse_cluster(
    nodes_shown: str, partitions_shown: str, config_shown: str, qos_shown: str = ""
) -> Cluster:
    """Read a cluster from what the commands of `read_cluster` print."""
    nodes: dict[str, list[Nodes]] = {}
    for line in nodes_shown.splitlines():
        partition, count, cpus, memory, gres, features = line.split("|")
        sizes = (int(count), int(cpus.rstrip("+")), int(memory.rstrip("+")))
        alike = Nodes(*sizes, gres, frozenset(features.split(",")))
        nodes.setdefault(partition, []).append(alike)
    conf = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", config_shown, re.M))
    partitions = {}
    for record in slurm.parse_records(partitions_shown):
        name = record["PartitionName"]
        memory = record.get("MaxMemPerNode", "UNLIMITED")
        partitions[name] = Partition(
            name,
            up=record["State"] == "UP",
            default=record["Default"] == "YES",
            minutes=minutes(record["MaxTime"]),
            max_nodes=_number(record["MaxNodes"]),
            nodes=tuple(nodes.get(name, ())),
            only=_names(record, "Allow"),
            never=_names(record, "Deny"),
            min_nodes=_number(record.get("MinNodes", "0")),
            max_cpus=_number(record.get("MaxCPUsPerNode", "UNLIMITED")),
            max_megabytes=_number(
                conf.get("MaxMemPerNode", "UNLIMITED") if memory == "UNLIMITED" else memory
            ),
            default_of=_default_memory(record) or _default_memory(conf) or Partition.default_of,
            qos=record.get("QoS", ""),
        )
    max_array = int(conf.get("MaxArraySize", "1001"))
    qos, shared = qos_limits(qos_shown), shared_limits(qos_shown)
    return Cluster(partitions, conf.get("SchedulerType", ""), max_array, qos, shared)


def qos_limits(shown: str) -> dict[str, dict[str, float]]:
    """Return the limits per job of each QOS that has any.

    >>> qos_limits("QOS=short(2) MaxWallPJ=30 MaxTRESPJ=node=2,gres/gpu=4 MaxTRESPN=")
    {'short': {'minutes': 30.0, 'node': 2.0, 'gres/gpu': 4.0}}
    """
    found = {}
    for record in slurm.parse_records(shown):
        pairs = f"minutes={record.get('MaxWallPJ', '')},{record.get('MaxTRESPJ', '')}"
        limits = {name: float(n) for name, n in re.findall(r"([\w/:]+)=(\d+)(?![^,])", pairs)}
        if "QOS" in record and limits:
            found[record["QOS"].partition("(")[0]] = limits
    return found


def shared_limits(shown: str) -> dict[str, dict[str, tuple[float, str]]]:
    """Return the limits of each QOS on what runs at a time: the smallest of all jobs of the QOS,
    of a user and of an account. Those of users and accounts are shown once the QOS was used.

    >>> shown = "QOS=day(2) GrpSubmitJobs=N(3) GrpTRES=cpu=N(1),node=4(0) MaxTRESPJ=node=2 "
    >>> shared_limits(shown + "User Limits= 7={MaxJobsPU=1(0) MaxTRESPU=node=3(1)}")
    {'day': {'node': (3.0, 'MaxTRESPU'), 'job': (1.0, 'MaxJobsPU')}}
    """
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for line in re.findall(r"^QOS=.*", shown, re.M):
        limits = found.setdefault(re.split(r"[=(]", line)[1], {})
        for name, value in re.findall(
            r"\b((?:Grp|Max)(?:TRES|Jobs|SubmitJobs)(?:|PU|PA))=(\S+)", line
        ):
            pairs = value if "TRES" in name else f"job={value}"
            for what, number in re.findall(r"([\w/:]+)=(\d+)\(", pairs):
                limits[what] = min(limits.get(what, (float("inf"), "")), (float(number), name))
    return {name: limits for name, limits in found.items() if limits}


def _default_memory(shown: dict[str, str]) -> str | None:
    """Return a setting such as DefMemPerCPU=2000 of a partition or of the cluster.

    JobDefaults, a list, has the one for GPUs, which precedes the others if a job has any.
    """
    settings = [f"{name}={value}" for name, value in shown.items()]
    for each in [*shown.get("JobDefaults", "").split(","), *settings]:
        if re.fullmatch(r"DefMemPer(CPU|GPU|Node)=[1-9]\d*", each):
            return each
    return None


def minutes(limit: str) -> float:
    """Convert a time limit in Slurm's notation to minutes.

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


def _names(record: dict[str, str], prefix: str) -> dict[str, tuple[str, ...]]:
    found = {
        "account": record.get(f"{prefix}Accounts", "ALL"),
        "qos": record.get(f"{prefix}Qos", "ALL"),
    }
    listed = {
        option: names for option, names in found.items() if names not in ("ALL", "(null)", "NONE")
    }
    return {option: tuple(names.split(",")) for option, names in listed.items()}
