"""Compare the resources that a run requests with what the cluster has.

Slurm accepts many jobs that can never start, and leaves them pending. Finally `sbatch --test-only`
checks the script itself: it knows every option, and what only the accounting database knows.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, RoleConf
from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.launch.slurm.cluster import Cluster, Nodes, Partition, read_cluster
from atropos_hpc.schema import did_you_mean
from atropos_hpc.validate import Problem

LOCAL_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
TEST_TIMEOUT_S = 60.0
# sbatch prints these also if nodes are only down or drained and will come back; whether the nodes
# are sufficient at all has been checked before.
UNAVAILABLE = ("Requested node configuration is not available", "Required node not available")
# a word in an error of sbatch -> the key to change
KEYS_BY_WORD = {
    "qos": "cluster.qos",
    "account": "cluster.account",
    "partition": "cluster.partition",
    "time limit": "launch.minutes",
}


def check(config: Config, run_dir: Path) -> list[Problem]:
    """Return every reason why this cluster cannot run a config."""
    if not commands.is_installed():
        reason = "submitit_slurm needs Slurm, but there is no sbatch on this machine"
        return [Problem("hydra/launcher", reason)]
    try:
        cluster = read_cluster()
    except commands.SlurmError as error:
        return [Problem("cluster", f"Slurm does not answer: {error}")]
    found = [*_filesystem(config, run_dir), *_scheduler(config, cluster)]
    for name in sbatch.ROLES:
        found += _role(config, name, cluster)
    return found or _sbatch(config)


def _filesystem(config: Config, run_dir: Path) -> Iterator[Problem]:
    roots = [Path(root).resolve() for root in config.cluster.shared]
    home = run_dir.resolve()
    if roots and not any(home.is_relative_to(root) for root in roots):
        listed = ", ".join(map(str, roots))
        yield Problem("run_dir", f"{run_dir} is not below a directory of cluster.shared: {listed}")
    if not roots and (kind := filesystem_type(home)) in LOCAL_FILESYSTEMS:
        yield Problem(
            "run_dir",
            f"{run_dir} is on this machine's {kind}, but every node needs it (if they do share it, "
            "list it in cluster.shared)",
        )


def filesystem_type(path: Path) -> str:
    """Return the type of the filesystem of a path, which need not exist."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    points = [(len(words[1]), words[2]) for words in mounts if path.is_relative_to(words[1])]
    return max(points, default=(0, ""))[1]


def _scheduler(config: Config, cluster: Cluster) -> Iterator[Problem]:
    kind = config.launch.allocation
    if kind == "het" and cluster.scheduler != "sched/backfill":
        yield Problem(
            "launch.allocation",
            "only sched/backfill starts heterogeneous jobs, and this cluster has "
            f"{cluster.scheduler}; use split or single",
        )
    nodes = config.roles.rollout.nodes
    if kind == "split" and nodes >= cluster.max_array:
        yield Problem(
            "roles.rollout.nodes",
            f"{nodes} exceed the largest job array here, {cluster.max_array - 1}",
        )


@dataclass(frozen=True)
class Request:
    """What a role requests: the prefix of its keys, its config, and its sbatch options."""

    prefix: str
    conf: RoleConf
    options: sbatch.Options

    @property
    def nodes(self) -> int:
        return int(self.options["nodes"] or 1)

    def gpus(self) -> tuple[str, str, int]:
        """Return (key, type or "", number per node). Other kinds of gres are left to sbatch."""
        if self.conf.gres:
            found = re.search(r"gpu(?::([A-Za-z][\w.-]*))?(?::(\d+))?", self.conf.gres)
            return ("gres", found[1] or "", int(found[2] or 1)) if found else ("gres", "", 0)
        option = str(self.options.get("gres") or self.options.get("gpus_per_node") or "")
        typed = re.search(r"(?:gpu:)?([A-Za-z][\w.-]*):\d+$", option)
        kind = typed[1] if typed and typed[1] != "gpu" else ""
        return "gpus_per_node", kind, self.conf.gpus_per_node


def _role(config: Config, name: str, cluster: Cluster) -> Iterator[Problem]:
    conf: RoleConf = getattr(config.roles, name)
    request = Request(f"roles.{name}", conf, sbatch.options(config, name))
    known = cluster.partitions
    default = next((each.name for each in known.values() if each.default), None)
    requested = request.options["partition"] or default
    own = conf.partition or not config.cluster.partition
    key = f"{request.prefix}.partition" if own else "cluster.partition"
    if requested is None:
        reason = f"must be given: this cluster has no default partition; it has {', '.join(known)}"
        yield Problem(key, reason)
        return
    for partition_name in str(requested).split(","):
        partition = known.get(partition_name)
        if partition is None:
            near = did_you_mean(partition_name, known)
            reason = f"there is no partition {partition_name}; there are {', '.join(known)}{near}"
            yield Problem(key, reason)
            continue
        if not partition.up:
            yield Problem(key, f"partition {partition.name} is not up")
        yield from _limits(config.launch.minutes, request, partition)
        yield from _hardware(request, partition)


def _limits(minutes: int, request: Request, partition: Partition) -> Iterator[Problem]:
    here = f"partition {partition.name}"
    if minutes > partition.minutes:
        reason = f"{minutes} exceed the {partition.minutes:.0f} that {here} allows"
        yield Problem("launch.minutes", reason)
    if request.nodes > partition.max_nodes:
        reason = f"{request.nodes} exceed the {partition.max_nodes:.0f} that {here} allows per job"
        yield Problem(f"{request.prefix}.nodes", reason)
    for option in ("account", "qos"):
        value, only = request.options[option], partition.only.get(option)
        if only and value not in only:
            others = f", not for {value}" if value else ""
            yield Problem(
                f"{request.prefix}.{option}", f"{here} is for {', '.join(only)} only{others}"
            )
        if value in partition.never.get(option, ()):
            yield Problem(f"{request.prefix}.{option}", f"{here} is not for {value}")


def _hardware(request: Request, partition: Partition) -> Iterator[Problem]:
    """Narrow the partition's nodes by one requirement after the other.

    The first requirement that leaves no node is the problem.
    """
    here, conf, fitting = f"partition {partition.name}", request.conf, partition.nodes
    if conf.constraint and re.fullmatch(r"[\w.-]+", conf.constraint):
        fitting = tuple(nodes for nodes in fitting if conf.constraint in nodes.features)
        if not fitting:
            yield Problem(f"{request.prefix}.constraint", _no_feature(conf.constraint, partition))
            return
    for key, amount, enough, most in _requirements(request, fitting):
        remaining = tuple(nodes for nodes in fitting if enough(nodes))
        if not remaining and fitting:
            reason = f"{amount}: no node of {here} has as much; the most is {most}"
            yield Problem(f"{request.prefix}.{key}", reason)
            return
        fitting = remaining
    available = sum(nodes.count for nodes in fitting)
    if fitting and request.nodes > available:
        yield Problem(
            f"{request.prefix}.nodes",
            f"{request.nodes} exceed the {available} nodes of {here} that are sufficient",
        )


def _requirements(request: Request, nodes: tuple[Nodes, ...]) -> Iterator[Any]:
    """Yield (key, amount, test of a kind of nodes, the largest amount there is)."""
    conf = request.conf
    key, kind, gpus = request.gpus()
    if gpus:
        most = max((each.gpus(kind) for each in nodes), default=0)
        yield key, f"{gpus} {kind or 'GPUs'}", lambda each: each.gpus(kind) >= gpus, most
    tasks = int(request.options["ntasks_per_node"] or 1)
    cpus = tasks * conf.cpus_per_task
    ranks = f" ({tasks} ranks of {conf.cpus_per_task})" if tasks > 1 else ""
    most = max((each.cpus for each in nodes), default=0)
    yield "cpus_per_task", f"{cpus} CPUs{ranks}", lambda each: each.cpus >= cpus, most
    if conf.mem:
        memory = sbatch.megabytes(conf.mem)
        largest = f"{max((each.megabytes for each in nodes), default=0)}M"
        yield "mem", conf.mem, lambda each: each.megabytes >= memory, largest


def _no_feature(constraint: str, partition: Partition) -> str:
    features = {feature for nodes in partition.nodes for feature in nodes.features} - {"(null)"}
    offered = f"they have {', '.join(sorted(features))}" if features else "they have none"
    near = did_you_mean(constraint, sorted(features))
    return f"no node of partition {partition.name} has the feature {constraint}; {offered}{near}"


def _sbatch(config: Config) -> list[Problem]:
    """Let sbatch check the scripts without queueing them."""
    if shutil.which("sbatch") is None:
        return []
    command = f"{sys.executable} -V"
    texts = {"launch": sbatch.script(config, "/dev/null", command)}
    if config.launch.allocation == "split":
        texts["roles.rollout"] = sbatch.rollout_script(config, "/dev/null", command)
    return [problem for key, text in texts.items() for problem in _test(key, text)]


@functools.cache
def _test(key: str, text: str) -> list[Problem]:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as script:
        script.write(text)
        script.flush()
        command = ["sbatch", "--test-only", script.name]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TEST_TIMEOUT_S,
                check=False,
                env=sbatch.submission_environment(os.environ),
            )
        except subprocess.TimeoutExpired:
            reason = f"sbatch --test-only did not answer within {TEST_TIMEOUT_S:.0f} s"
            return [Problem("cluster", reason)]
    if done.returncode == 0 or any(words in done.stderr for words in UNAVAILABLE):
        return []
    lines = done.stderr.strip().splitlines()
    error = "; ".join(line.partition("error: ")[2] or line for line in lines)
    unused = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    hint = f" ({', '.join(unused)} of your shell is not used)" if unused else ""
    return [Problem(key_of(error) or key, f"sbatch refuses it: {error}{hint}")]


def key_of(error: str) -> str | None:
    """Return the key that an error of sbatch is about, None if that is unknown.

    >>> key_of("Batch job submission failed: Invalid account or account/partition combination")
    'cluster.account'
    >>> key_of("unrecognized option '--exclusve'")
    """
    return next((key for word, key in KEYS_BY_WORD.items() if word in error.lower()), None)
