"""Compare the estimated memory of a run (runtime/sizing.py) with its GPUs and with its jobs' limit.

The memory of a role's GPUs is known from their type in its --gres, from the types of the cluster's
nodes that are sufficient for it, and with launch.allocation=local from the driver. Where it is not
known, nothing is refused.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import MemoryNeed, Problem
from atropos_hpc.launch import cluster_check, machine_memory
from atropos_hpc.launch.slurm import sbatch, sbatch_checks
from atropos_hpc.launch.slurm.cluster import Cluster, Nodes, Partition, gpus_of, read_cluster
from atropos_hpc.launch.slurm.request import Request, partitions_of, requests
from atropos_hpc.runtime import devices, sizing, slurm
from atropos_hpc.runtime.model_sizes import Sizes, sizes_of
from atropos_hpc.runtime.sizing import GIB, Estimate

# Published sizes in GiB by a word of the type's name; the larger where a name has several.
GPU_GIB = {
    **{"b300": 288, "gb300": 288, "b200": 192, "gb200": 192, "h200": 141, "gh200": 144},
    **{"h100": 80, "h800": 80, "h20": 141, "h100nvl": 94, "nvl": 94, "a100": 80, "a800": 80},
    **{"l40": 48, "l40s": 48, "l20": 48, "l4": 24, "a40": 48, "a30": 24, "a10": 24, "a10g": 24},
    **{"a16": 16, "a2": 16, "a6000": 48, "a5000": 24, "a4000": 16, "v100": 32, "v100s": 32},
    **{"t4": 16, "p100": 16, "p40": 24, "rtx3090": 24, "3090": 24, "rtx4090": 24, "4090": 24},
}
# Options of sbatch that replace a partition's default
MEMORY_OPTIONS = ("mem", "mem_per_cpu", "mem_per_gpu")
# Arguments of vLLM's server that change what it holds
UNKNOWN_SIZES = ("--quantization", "-q", "--kv-cache-dtype", "--cpu-offload-gb", "--hf-overrides")


@dataclass(frozen=True)
class Devices:
    """Bytes of a GPU of each role, None if not known; `shared`: both roles use the same ones."""

    trainer: float | None = None
    rollout: float | None = None
    shared: bool = False


def check(config: Config, on_slurm: bool) -> Iterator[Problem]:
    """Yield each role that cannot fit. `on_slurm`: ask the cluster for the types of its GPUs."""
    roles, model = config.roles, sizes_of(config)
    if model is None:
        return
    if machine_memory.applies(config):
        yield from machine_memory.check(config, model)
    if not (roles.trainer.gpus_per_node or roles.rollout.gpus_per_node):
        return
    yield from too_large(config, model, _devices(config, on_slurm))
    for role, needed, assumed in _host_memory(config, model):
        given = _mem(config, role)
        if given is not None and given < needed - assumed:
            yield Problem(
                f"roles.{role}.mem",
                f"{getattr(roles, role).mem} is less than the {_gib(needed - assumed)} that a node "
                f"of this role is estimated to need, and its processes need about {_gib(assumed)}",
            )


def needs(config: Config, on_slurm: bool) -> list[MemoryNeed]:
    """Return what each part needs, by phase, beside what its GPU or its job gives it.

    With tensor_parallel, a server's figures are those of one of its GPUs.
    """
    if (model := sizes_of(config)) is None:
        return []
    found, roles, given = sizing.estimate(config, model), config.roles, Devices()
    if roles.trainer.gpus_per_node or roles.rollout.gpus_per_node:
        given = _devices(config, on_slurm)
    share = None
    if given.rollout is not None:
        known = config.rollout.kv_cache_bytes is not None
        share = given.rollout * (1.0 if known else config.rollout.memory_utilization)
    cache = f"server: KV cache of one sequence of {config.model.max_length} tokens"
    rows = [
        (f"trainer rank: {phase}", needed, given.trainer)
        for phase, needed in sizing.Learner(config, model).phases().items()
    ]
    rows += [("server: weights", found.weights, share), (cache, found.cache_of_one, share)]
    if config.launch.allocation != "local":
        nodes = {"trainer": found.trainer_node, "rollout": found.rollout_node}
        rows += [(f"{k} node: host memory", need, _mem(config, k)) for k, need in nodes.items()]
    rows.append((f"rollout node: {config.policy.cache}", found.policy_cache, None))
    table = [
        MemoryNeed(part, int(needed), None if of is None else int(of)) for part, needed, of in rows
    ]
    return table + ([machine_memory.row(config, model)] if machine_memory.applies(config) else [])


def lines(found: Sequence[MemoryNeed]) -> list[str]:
    """Render a table.

    >>> print(*lines([MemoryNeed("server: weights", 3 << 30, 72 << 30)]), sep="\\n")
    memory, estimated      needs   may use
    server: weights        3 GiB    72 GiB
    """
    if not found:
        return []
    width = max(len("memory, estimated"), *(len(each.part) for each in found))
    rows = [("memory, estimated", "needs", "may use")]
    for each in found:
        available = "" if each.available_bytes is None else _gib(each.available_bytes)
        rows.append((each.part, _gib(each.needed_bytes), available))
    return [f"{part:{width}} {need:>10} {of:>9}".rstrip() for part, need, of in rows]


def _mem(config: Config, role: str) -> float | None:
    """Return the bytes of roles.*.mem; None if it is null, 0 or not understood."""
    mem = getattr(config.roles, role).mem
    if not mem or not sbatch_checks.MEMORY.fullmatch(mem):
        return None
    return sbatch.megabytes(mem) * (1 << 20) or None


def _devices(config: Config, on_slurm: bool) -> Devices:
    if config.launch.allocation == "local":
        return of_machine(config, driver_memory(), os.environ)
    return of_job(config, _cluster() if on_slurm else None)


def warnings(config: Config) -> list[Problem]:
    """Return each role whose job gets less host memory than it is estimated to need."""
    if config.launch.allocation == "local":
        model = sizes_of(config) if machine_memory.applies(config) else None
        return list(machine_memory.warnings(config, model)) if model else []
    cluster = _cluster()
    by_default = default_too_small(config, cluster) if cluster is not None else ()
    return [*_scarce(config), *by_default]


def _scarce(config: Config) -> Iterator[Problem]:
    """Yield each role whose `mem` leaves its processes less than is assumed for them."""
    if (model := sizes_of(config)) is None:
        return
    for role, needed, assumed in _host_memory(config, model):
        given = _mem(config, role)
        if given is not None and needed - assumed <= given < needed:
            yield Problem(
                f"roles.{role}.mem",
                f"{getattr(config.roles, role).mem} may be too little: a node of this role is "
                f"estimated to need {_gib(needed)}, {_gib(assumed)} of it for its processes, which "
                "is an assumption",
            )


def default_too_small(config: Config, cluster: Cluster) -> Iterator[Problem]:
    """Yield each role without `mem` for which the default of its partition is too small."""
    if (model := sizes_of(config)) is None:
        return
    for role, of_node, _ in _host_memory(config, model):
        needed = of_node / (1 << 20)
        request = _request(config, role)
        if any(request.options.get(name) is not None for name in MEMORY_OPTIONS):
            continue
        for partition in _partitions(request, cluster):
            given = partition.default_memory(request.cpus, request.gpus)
            if given < needed:
                yield Problem(
                    f"roles.{role}.mem",
                    f"is null, and a job in partition {partition.name} then gets {given:,.0f}M per "
                    f"node ({partition.default_of}); a node of this role is estimated to need "
                    f"{needed / 1024:.0f} GiB: roles.{role}.mem={needed / 1024 + 1:.0f}G",
                )
                break


def _host_memory(config: Config, model: Sizes) -> Iterator[tuple[str, float, float]]:
    """Yield (role, bytes that its node needs, those that are assumed) of the roles with GPUs.

    Without GPUs, the estimate of a rank is of host memory, and the rest is small.
    """
    found = sizing.estimate(config, model)
    nodes = {
        "trainer": (found.trainer_node, found.trainer_processes),
        "rollout": (found.rollout_node, found.rollout_processes),
    }
    for role, (needed, assumed) in nodes.items():
        if getattr(config.roles, role).gpus_per_node:
            yield role, needed, assumed


def too_large(config: Config, model: Sizes, found: Devices) -> Iterator[Problem]:
    """Yield each role that cannot fit into GPUs of that memory."""
    needed, roles = sizing.estimate(config, model), config.roles
    trainer, rollout = roles.trainer.gpus_per_node > 0, roles.rollout.gpus_per_node > 0
    if trainer and found.trainer is not None and needed.trainer > found.trainer:
        yield Problem(
            "roles.trainer.gpus_per_node",
            f"a rank is estimated to need {_gib(needed.trainer)} of GPU memory, and a GPU has "
            f"{_gib(found.trainer)}{_alternatives(config, model, needed.trainer)}",
        )
    elif trainer and rollout and found.shared and found.rollout is not None:
        yield from _sharing(config, needed, found.rollout)
    if rollout:
        yield from _server(config, needed, found.rollout)


def _server(config: Config, needed: Estimate, memory: float | None) -> Iterator[Problem]:
    """Yield what is wrong with the memory of a server, whose GPUs have so many bytes."""
    rollout, length = config.rollout, config.model.max_length
    if any(each.partition("=")[0] in UNKNOWN_SIZES for each in rollout.arguments):
        return
    one = f"{_gib(needed.cache_of_one)} of KV cache for one sequence of model.max_length={length}"
    cache = rollout.kv_cache_bytes
    if cache is not None and cache < needed.cache_of_one:
        yield Problem("rollout.kv_cache_bytes", f"{cache:,} are less than {one}")
    elif memory is not None:
        limit = memory * (1.0 if cache else rollout.memory_utilization)
        if needed.weights + (cache or needed.cache_of_one) > limit:
            of = "" if cache else f" (rollout.memory_utilization={rollout.memory_utilization:g})"
            held = f"{_gib(cache)} of rollout.kv_cache_bytes" if cache else one
            yield Problem(
                "rollout.tensor_parallel",
                f"a server needs {_gib(needed.weights)} per GPU for weights and {held}, and may "
                f"use {_gib(limit)} of {_gib(memory)}{of}: raise rollout.tensor_parallel or "
                f"{'lower rollout.kv_cache_bytes' if cache else 'rollout.memory_utilization'}, or "
                "lower model.max_length",
            )


def _sharing(config: Config, needed: Estimate, memory: float) -> Iterator[Problem]:
    """Yield a problem if a trainer rank and a server do not fit into one GPU together."""
    cache = config.rollout.kv_cache_bytes
    server = needed.weights + cache if cache else config.rollout.memory_utilization * memory
    if needed.trainer + server <= memory:
        return
    share = (memory - needed.trainer) / memory
    yield Problem(
        "rollout.kv_cache_bytes" if cache else "rollout.memory_utilization",
        f"a server takes {_gib(server)} of a GPU of {_gib(memory)}, and the trainer's rank beside "
        f"it is estimated to need {_gib(needed.trainer)}: that leaves a server "
        f"{_gib(share * memory)}"
        + ("" if cache else f", rollout.memory_utilization={int(share * 100) / 100:g}"),
    )


def _alternatives(config: Config, model: Sizes, needed: float) -> str:
    """Say which keys lower what a trainer rank needs, and to what, each of them alone."""
    changes: list[Mapping[str, Any]] = [
        {"trainer.gradient_checkpointing": True},
        {"trainer.tokens_per_micro_batch": config.model.max_length},
        {"trainer.offload": True},
        {"algorithm.kl_coef": 0.0, "algorithm.kl_metric": False},
        {"roles.trainer.nodes": 2 * config.roles.trainer.nodes},
        {"model.lora.rank": config.model.lora.rank or 32},
    ]
    found = []
    for change in changes:
        other = copy.deepcopy(config)
        for key, value in change.items():
            *path, name = key.split(".")
            part: Any = other
            for each in path:
                part = getattr(part, each)
            setattr(part, name, value)
        if (less := sizing.estimate(other, model).trainer) < 0.99 * needed:
            keys = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            found.append((less, f"{keys} ({_gib(less)})"))
    return "; less with " + ", ".join(text for _, text in sorted(found)) if found else ""


# --- the memory of a role's GPUs


def type_bytes(name: str) -> float | None:
    """Return the memory of a type of GPU, by its name in a cluster's gres; None if not known.

    >>> [type_bytes(name) for name in ("a100", "nvidia_a100-sxm4-40gb", "1g.10gb", "big")]
    [85899345920.0, 42949672960.0, 10737418240.0, None]
    """
    name = name.lower()
    if stated := re.search(r"(\d+)gb", name):
        return float(stated[1]) * GIB
    known = [GPU_GIB[word] for word in re.split(r"[^a-z0-9]+", name) if word in GPU_GIB]
    return max(known) * float(GIB) if known else None


def of_machine(
    config: Config, memory: Mapping[str, float], environment: Mapping[str, str]
) -> Devices:
    """Return the memory of this machine's GPUs, by what the driver says of each (`memory`)."""
    visible = devices.visible_devices(environment, devices.machine_devices())
    trainer, rollout = config.roles.trainer, config.roles.rollout
    sides = devices.role_devices(visible, trainer.gpus_per_node, rollout.gpus_per_node)
    ranks = set(sides[0][: trainer.ranks_per_node])
    served = set(sides[1][: config.rollout.servers * config.rollout.tensor_parallel])
    least = [_least(memory.get(entry) for entry in side) for side in sides]
    return Devices(least[0], least[1], bool(ranks & served))


def driver_memory() -> dict[str, float]:
    """Return the bytes of this machine's GPUs, by index and by UUID; empty without a driver."""
    rows = devices.query_gpus("index", "uuid", "memory.total")
    known = [(names, mib.removesuffix(" MiB")) for *names, mib in rows]
    return {
        name: float(mib) * (1 << 20) for names, mib in known if mib.isdecimal() for name in names
    }


def of_job(config: Config, cluster: Cluster | None) -> Devices:
    """Return the memory of the GPUs of a Slurm job, as far as their types tell."""

    def of_role(role: str) -> float | None:
        request = _request(config, role)
        kinds = [kind for kind, _ in request.gpu_kinds]
        if all(kinds) or cluster is None:
            return _least(type_bytes(kind) for kind in kinds)
        found = [
            _largest(nodes)
            for partition in _partitions(request, cluster)
            for nodes in cluster_check.sufficient_nodes(request, partition)[0]
        ]
        return max((each for each in found if each), default=None) if all(found) else None

    return Devices(of_role("trainer"), of_role("rollout"))


def _request(config: Config, role: str) -> Request:
    """Return what the job of a role requests; with launch=single, one job is for both."""
    found = requests(config)
    return found[0] if len(found) == 1 else found[sbatch.ROLES.index(role)]


def _partitions(request: Request, cluster: Cluster) -> list[Partition]:
    names = partitions_of(request, cluster)
    return [cluster.partitions[name] for name in names if name in cluster.partitions]


def _least(sizes: Iterable[float | None]) -> float | None:
    """Return the smallest; None if one is not known, or if there is none."""
    found = list(sizes)
    return min((each for each in found if each), default=None) if all(found) else None


def _largest(nodes: Nodes) -> float | None:
    """Return the memory of the largest type of GPU of a node; None if one is not known."""
    found = [type_bytes(kind) for kind, _ in gpus_of(nodes.gres)]
    return max((each for each in found if each), default=None) if all(found) else None


def _cluster() -> Cluster | None:
    try:
        return read_cluster() if slurm.is_installed() else None
    except slurm.SlurmError:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
