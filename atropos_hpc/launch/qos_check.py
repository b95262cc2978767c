"""Compare what a run requests with the limits of its QOS.

Without its flag DenyOnLimit, Slurm accepts a job that exceeds them, and never starts it. Slurm
26.05 accepts heterogeneous jobs in any case.

Which QOS has precedence, the partition's or the requested one, depends on a flag that the
controller does not show: the larger limit counts.
"""

from collections.abc import Iterator

from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch.slurm.cluster import Cluster, Partition
from atropos_hpc.launch.slurm.request import Request, partitions_of


def per_job(
    minutes: int, request: Request, partition: Partition, cluster: Cluster
) -> Iterator[Problem]:
    """Yield what exceeds the limits per job. Slurm starts a heterogeneous job of which no component
    exceeds them, so components are compared one by one."""
    known = [
        (name, cluster.qos[name]) for name in _names(request, partition) if name in cluster.qos
    ]
    amounts = {"minutes": ("launch.minutes", minutes, ""), **_amounts([request])}
    for what, (key, amount, unit) in amounts.items():
        most, name = max(((each[what], qos) for qos, each in known if what in each), default=(0, 0))
        if name and amount > most:
            allowed = f"the {most:.0f} that QOS {name} allows per job"
            yield Problem(key, f"{amount}{unit} exceed {allowed}")


def together(asked: list[Request], cluster: Cluster) -> Iterator[Problem]:
    """Yield what all components exceed together of the limits on what runs at a time: they count
    as jobs of their own, and only start together. Only where all have the same partition and QOS.
    """
    places = {
        tuple(_names(request, cluster.partitions[name]))
        for request in asked
        for name in partitions_of(request, cluster)
    }
    if len(places) != 1:
        return
    known = [(name, cluster.shared[name]) for name in places.pop() if name in cluster.shared]
    count = ("launch.allocation", len(asked), " jobs")
    for what, (key, amount, unit) in {**_amounts(asked), "job": count}.items():
        limits = [(*each[what], qos) for qos, each in known if what in each]
        most, limit, name = max(limits, default=(float("inf"), "", ""))
        if amount > most:
            shown = f"{amount}{unit}{' of both roles' if len(asked) > 1 else ''}"
            allowed = f"the {most:.0f} that QOS {name} allows at a time ({limit})"
            yield Problem(key, f"{shown} exceed {allowed}")


def _names(request: Request, partition: Partition) -> list[str]:
    given = request.options.get("qos")
    return [name for name in (partition.qos, str(given or "")) if name]


def _amounts(asked: list[Request]) -> dict[str, tuple[str, int, str]]:
    """Return, of each resource that may be limited: the key, the sum, and its unit."""
    last = asked[-1]
    nodes = sum(each.nodes for each in asked)
    cpus = sum(each.nodes * each.cpus for each in asked)
    gpus = sum(each.nodes * each.gpus for each in asked)
    return {
        "node": (f"{last.prefix}.nodes", nodes, last.note or ""),
        "cpu": (f"{last.prefix}.cpus_per_task", cpus, " CPUs"),
        "gres/gpu": (f"{last.prefix}.{last.gpu_key}", gpus, " GPUs"),
    }
