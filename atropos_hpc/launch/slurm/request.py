"""What the jobs of a run request from Slurm, component by component, as the checks compare it."""

from dataclasses import dataclass

from atropos_hpc.config import Config
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.cluster import Cluster, gpus_of


@dataclass(frozen=True)
class Request:
    """What one component of a job requests: the prefix of its keys, and its sbatch options."""

    prefix: str
    options: sbatch.Options
    note: str = ""  # on the number of nodes
    gpu_key: str = "gpus_per_node"  # the key that has the number of GPUs

    @property
    def nodes(self) -> int:
        return int(self.options["nodes"] or 1)

    @property
    def cpus(self) -> int:
        """CPUs per node."""
        tasks = int(self.options.get("ntasks_per_node") or 1)
        return tasks * int(self.options.get("cpus_per_task") or 1)

    @property
    def megabytes(self) -> float:
        """Memory per node; 0 where the request leaves it to Slurm."""
        mem = self.options.get("mem")
        return sbatch.megabytes(str(mem)) if mem is not None else 0.0

    @property
    def gpu_kinds(self) -> list[tuple[str, int]]:
        """(type or "", number per node) of each kind of GPUs."""
        if gres := str(self.options.get("gres") or ""):
            return gpus_of(gres)
        count = str(self.options.get("gpus_per_node") or "")
        return gpus_of(f"gpu:{count}") if count else []

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return sum(number for _, number in self.gpu_kinds)


def requests(config: Config) -> list[Request]:
    """Return what the components of a run's jobs request; one for both roles with `single`."""
    found, prefixes = sbatch.sections(config), [f"roles.{name}" for name in sbatch.ROLES]
    note = ""
    if config.launch.allocation == "single":
        prefixes, note = prefixes[1:], " (with roles.trainer.nodes)"
    if config.launch.allocation == "split":
        found.append(sbatch.rollout_section(config))
    own = {f"roles.{name}": getattr(config.roles, name).gres for name in sbatch.ROLES}
    return [
        Request(prefix, options, note, "gres" if own[prefix] else "gpus_per_node")
        for prefix, options in zip(prefixes, found, strict=False)
    ]


def partitions_of(request: Request, cluster: Cluster) -> list[str]:
    """Return the partitions that may run a request; [] if none is given and there is no default."""
    default = next((each.name for each in cluster.partitions.values() if each.default), None)
    requested = request.options.get("partition") or default
    return str(requested).split(",") if requested else []
