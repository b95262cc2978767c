"""Compare the resources that a run requests with what the cluster has.

Slurm accepts many jobs that can never start, and leaves them pending. Finally `sbatch --test-only`
checks the script itself: it knows every option, and what only the accounting database knows.
"""

import functools
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import qos_check
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.cluster import Cluster, Nodes, Partition, read_cluster
from atropos_hpc.launch.slurm.request import Request, partitions_of, requests
from atropos_hpc.runtime import slurm
from atropos_hpc.schema import did_you_mean

LOCAL_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
# sbatch prints these also if nodes are only down or drained and will come back; whether the nodes
# are sufficient at all has been checked before.
UNAVAILABLE = ("Requested node configuration is not available", "Required node not available")
# a word in an error of sbatch -> the key to change
KEYS_BY_WORD = {
    "maxwallduration": "launch.minutes",
    "qos": "cluster.qos",
    "account": "cluster.account",
    "partition": "cluster.partition",
    "time limit": "launch.minutes",
}
# a word in an error of sbatch -> the key of the role that has a value for it
FIELDS_BY_WORD = {
    "feature": "constraint",
    "gres": "gres",
    "memory": "mem",
    "node count": "nodes",
    "invalid account": "account",
    "invalid qos": "qos",
}


def check(config: Config, run_dir: Path) -> list[Problem]:
    """Return every reason why this cluster cannot run a config."""
    if not slurm.is_installed():
        reason = "submitit_slurm needs Slurm, but there is no sbatch on this machine"
        return [Problem("hydra/launcher", reason)]
    try:
        cluster = read_cluster()
    except slurm.SlurmError as error:
        return [Problem("cluster", f"Slurm does not answer: {error}")]
    found = [*_filesystem(config, run_dir), *_scheduler(config, cluster)]
    return [*found, *resources(config, cluster)] or _sbatch(config)


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
    points = [(words[1].replace("\\040", " "), words[2]) for words in mounts]
    found = [(len(point), kind) for point, kind in points if path.is_relative_to(point)]
    # of several on one point, the last one
    return max(reversed(found), key=lambda each: each[0], default=(0, ""))[1]


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


def resources(config: Config, cluster: Cluster) -> list[Problem]:
    """Return why the cluster can never start the jobs of a run, as far as that can be known."""
    asked = requests(config)
    found = [problem for request in asked for problem in _component(config, request, cluster)]
    if not found:
        found += qos_check.together(asked, cluster)
    if not found and config.launch.allocation == "het":
        found += _together(asked, cluster)
    return list(dict.fromkeys(found))


def _component(config: Config, request: Request, cluster: Cluster) -> Iterator[Problem]:
    """Yield the problems of the partitions, unless the component fits into one of them."""
    own = getattr(config.roles, request.prefix.removeprefix("roles.")).partition
    in_role = own or not config.cluster.partition
    key = f"{request.prefix}.partition" if in_role else "cluster.partition"
    requested, known = partitions_of(request, cluster), cluster.partitions
    if not requested:
        reason = f"must be given: this cluster has no default partition; it has {', '.join(known)}"
        yield Problem(key, reason)
        return
    unknown = [name for name in requested if name not in known]
    for name in unknown:
        near = did_you_mean(name, known)
        reason = f"there is no partition {name}; there are {', '.join(known)}{near}"
        yield Problem(key, reason)
    rejected: list[Problem] = []
    for partition in (known[name] for name in requested if name in known):
        problems = [*_limits(config.launch.minutes, request, partition)]
        if not partition.up:
            problems.append(Problem(key, f"partition {partition.name} is not up"))
        problems += sufficient_nodes(request, partition)[1]
        problems += qos_check.per_job(config.launch.minutes, request, partition, cluster)
        if not problems:
            return
        rejected += problems
    yield from rejected


def _together(asked: list[Request], cluster: Cluster) -> Iterator[Problem]:
    """Yield a problem if components that may only use the same nodes need more than there are:
    Slurm gives the components of a heterogeneous job different nodes."""
    names = [partitions_of(request, cluster) for request in asked]
    if any(len(each) != 1 for each in names) or len({each[0] for each in names}) != 1:
        return
    partition = cluster.partitions[names[0][0]]
    kinds = {each for request in asked for each in sufficient_nodes(request, partition)[0]}
    available, needed = sum(each.count for each in kinds), sum(each.nodes for each in asked)
    if needed > available:
        parts = " and ".join(f"{each.prefix}.nodes={each.nodes}" for each in asked)
        yield Problem(
            f"{asked[-1].prefix}.nodes",
            f"{parts} need {needed} different nodes, but partition {partition.name} has"
            f" {available} that are sufficient",
        )


def _limits(minutes: int, request: Request, partition: Partition) -> Iterator[Problem]:
    here, nodes = f"partition {partition.name}", f"{request.prefix}.nodes"
    if minutes > partition.minutes:
        reason = f"{minutes} exceed the {partition.minutes:.0f} that {here} allows"
        yield Problem("launch.minutes", reason)
    if request.nodes > partition.max_nodes:
        most = f"{partition.max_nodes:.0f} that {here} allows per job"
        reason = f"{request.nodes}{request.note} exceed the {most}"
        yield Problem(nodes, reason)
    if request.nodes < partition.min_nodes:
        least = f"{partition.min_nodes:.0f} that {here} requires"
        reason = f"{request.nodes}{request.note} are less than the {least}"
        yield Problem(nodes, reason)
    cpus, memory = request.cpus, request.megabytes
    if cpus > partition.max_cpus:
        reason = f"{cpus} CPUs exceed the {partition.max_cpus:.0f} per node that {here} allows"
        yield Problem(f"{request.prefix}.cpus_per_task", reason)
    if memory > partition.max_megabytes:
        reason = f"{memory:.0f}M exceed the {partition.max_megabytes:.0f}M per node that {here}"
        yield Problem(f"{request.prefix}.mem", f"{reason} allows")
    for option in ("account", "qos"):
        value, only = request.options.get(option), partition.only.get(option)
        if only and value not in only:
            others = f", not for {value}" if value else ""
            yield Problem(
                f"{request.prefix}.{option}", f"{here} is for {', '.join(only)} only{others}"
            )
        if value in partition.never.get(option, ()):
            yield Problem(f"{request.prefix}.{option}", f"{here} is not for {value}")


def sufficient_nodes(
    request: Request, partition: Partition
) -> tuple[tuple[Nodes, ...], list[Problem]]:
    """Narrow the partition's nodes by one requirement after the other, and return what is left.

    The first requirement that leaves no node is the problem.
    """
    here, fitting = f"partition {partition.name}", partition.nodes
    constraint = str(request.options.get("constraint") or "")
    if constraint and SIMPLE_CONSTRAINT.fullmatch(constraint):
        fitting = tuple(nodes for nodes in fitting if _has(nodes, constraint))
        if not fitting:
            problem = Problem(f"{request.prefix}.constraint", _no_feature(constraint, partition))
            return (), [problem]
    for key, amount, enough, most in _requirements(request, fitting):
        remaining = tuple(nodes for nodes in fitting if enough(nodes))
        if not remaining and fitting:
            reason = f"{amount}: no node of {here} has as much; the most is {most}"
            return (), [Problem(f"{request.prefix}.{key}", reason)]
        fitting = remaining
    available = sum(nodes.count for nodes in fitting)
    if fitting and request.nodes > available:
        most = f"{available} nodes of {here} that are sufficient"
        reason = f"{request.nodes}{request.note} exceed the {most}"
        return fitting, [Problem(f"{request.prefix}.nodes", reason)]
    return fitting, []


# Features joined by & (and its old form ,) and |. Others, such as [a|b] and a*2, are sbatch's.
SIMPLE_CONSTRAINT = re.compile(r"[\w.-]+([&,|][\w.-]+)*")


def _has(nodes: Nodes, constraint: str) -> bool:
    """Tell whether nodes have the features together.

    >>> nodes = Nodes(1, 1, 1, "", frozenset({"a100", "ib"}))
    >>> _has(nodes, "a100&ib"), _has(nodes, "a100&eth"), _has(nodes, "h100|a100")
    (True, False, True)
    """
    return any(set(re.split("[&,]", each)) <= nodes.features for each in constraint.split("|"))


def _requirements(request: Request, nodes: tuple[Nodes, ...]) -> Iterator[Any]:
    """Yield (key, amount, test of a kind of nodes, the largest amount there is)."""
    for kind, number in [*request.gpu_kinds, ("", request.gpus)] if request.gpus else ():
        most = max((each.gpus(kind) for each in nodes), default=0)
        words = f"{number} {kind or 'GPUs'}"
        yield request.gpu_key, words, lambda each, of=kind, n=number: each.gpus(of) >= n, most
    tasks, cpus = int(request.options.get("ntasks_per_node") or 1), request.cpus
    ranks = f" ({tasks} ranks of {request.options['cpus_per_task']})" if tasks > 1 else ""
    most = max((each.cpus for each in nodes), default=0)
    yield "cpus_per_task", f"{cpus} CPUs{ranks}", lambda each: each.cpus >= cpus, most
    memory = request.megabytes
    if memory:
        largest = f"{max((each.megabytes for each in nodes), default=0)}M"
        words = str(request.options["mem"])
        yield "mem", words, lambda each: each.megabytes >= memory, largest


def _no_feature(constraint: str, partition: Partition) -> str:
    if "&" in constraint or "," in constraint:
        return f"no node of partition {partition.name} has all features of {constraint} together"
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
    return [
        Problem(_key_of_option(config, problem.message) or problem.key, problem.message)
        for key, text in texts.items()
        for problem in _test(key, text)
    ]


def _key_of_option(config: Config, error: str) -> str | None:
    """Return the key of an option in a `sbatch` map, or of a role, that an error names."""
    words = error.lower().replace("-", "_")
    roles = {f"roles.{name}.sbatch": getattr(config.roles, name).sbatch for name in sbatch.ROLES}
    for key, given in {**roles, "cluster.sbatch": config.cluster.sbatch}.items():
        for name in given:
            if sbatch.option_name(name).rstrip("s") in words:
                return f"{key}.{name}"
    field = next((field for word, field in FIELDS_BY_WORD.items() if word in words), "")
    own = (name for name in sbatch.ROLES if field and getattr(getattr(config.roles, name), field))
    return next((f"roles.{name}.{field}" for name in own), None)


@functools.cache
def _test(key: str, text: str) -> list[Problem]:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as script:
        script.write(text)
        script.flush()
        command = ("sbatch", "--test-only", script.name)
        try:
            slurm.run_command(*command, env=sbatch.submission_environment(os.environ))
            return []
        except slurm.SlurmError as refusal:
            said = str(refusal).removeprefix(f"{shlex.join(command)}: ")
    if any(words in said for words in UNAVAILABLE) and _some_are_away():
        return []
    error = "; ".join(
        re.sub(r".*?(error|allocation failure): ", "", line) for line in said.split("; ")
    )
    unused = sorted(name for name in os.environ if name.startswith("SBATCH_"))
    hint = f" ({', '.join(unused)} of your shell is not used)" if unused else ""
    return [Problem(key_of(error) or key, f"sbatch refuses it: {error}{hint}")]


def _some_are_away() -> bool:
    """Tell whether nodes are down or drained, and may come back."""
    try:
        states = slurm.run_command("sinfo", "-h", "-N", "-o", "%T").split()
    except slurm.SlurmError:
        return True
    return any(re.search(r"down|drain|fail|unk|maint|[*$@]", state) for state in states)


def key_of(error: str) -> str | None:
    """Return the key that an error of sbatch is about, None if that is unknown.

    >>> key_of("Batch job submission failed: Invalid account or account/partition combination")
    'cluster.account'
    >>> key_of("unrecognized option '--exclusve'")
    """
    return next((key for word, key in KEYS_BY_WORD.items() if word in error.lower()), None)
