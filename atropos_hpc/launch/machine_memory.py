"""Compare the estimated memory of all processes of a run on this machine with what is free.

For launch.allocation=local without GPUs, where learner, servers and workers share the memory. What
is assumed for the processes themselves was measured on one machine (docs/performance.md), so a run
is refused by the rest alone.
"""

import copy
from collections.abc import Iterator

import psutil

from atropos_hpc.config import Config, environments
from atropos_hpc.contracts.answers import MemoryNeed, Problem
from atropos_hpc.runtime import sizing
from atropos_hpc.runtime.model_sizes import Sizes
from atropos_hpc.runtime.sizing import GIB

LEARNER, SERVER, WORKER, OTHERS = 0.6 * GIB, 2.1 * GIB, 0.6 * GIB, 0.3 * GIB
ROW = "this machine: all processes"


def applies(config: Config) -> bool:
    """Whether all processes share this machine's memory."""
    roles = config.roles
    gpus = roles.trainer.gpus_per_node or roles.rollout.gpus_per_node
    return config.launch.allocation == "local" and not gpus


def needed(config: Config, model: Sizes) -> tuple[float, float]:
    """Return the bytes of all processes at the learner's peak, and the part that is assumed."""
    found, rollout, trainer = sizing.estimate(config, model), config.rollout, config.roles.trainer
    ranks = trainer.nodes * trainer.ranks_per_node
    evaluates = config.evaluation.before or config.evaluation.after or config.evaluation.every
    workers = sum(each.workers for each in environments(config).values()) + bool(evaluates)
    assumed = ranks * LEARNER + rollout.servers * SERVER + workers * WORKER + OTHERS
    weights = found.weights * rollout.tensor_parallel
    packed = weights * model.embedding / model.total  # of the output layer, for its product
    server = weights + packed + (rollout.kv_cache_bytes or found.cache_of_one)
    cached = found.policy_cache / 2 if config.policy.cache.startswith("/dev/shm") else 0.0
    return ranks * found.trainer + rollout.servers * server + cached + assumed, assumed


def row(config: Config, model: Sizes) -> MemoryNeed:
    """Return the line of the table of estimates."""
    return MemoryNeed(ROW, int(needed(config, model)[0]), sizing.free_memory())


def check(config: Config, model: Sizes) -> Iterator[Problem]:
    """Yield a problem if this machine's memory is too small for the run, even if all were free."""
    total, assumed = needed(config, model)
    present = psutil.virtual_memory().total
    if total - assumed > present:
        yield Problem("model.path", f"{_text(config, model)}, and the machine has {_gib(present)}")


def warnings(config: Config, model: Sizes) -> Iterator[Problem]:
    """Yield a problem if less memory is free at present than the run is estimated to need."""
    if needed(config, model)[0] > (free := sizing.free_memory()):
        yield Problem("model.path", f"{_text(config, model)}, and {_gib(free)} are free")


def _text(config: Config, model: Sizes) -> str:
    total, _ = needed(config, model)
    less = copy.deepcopy(config)
    less.trainer.optimizer_state = "bfloat16"
    saved = needed(less, model)[0]
    possible = config.trainer.backend == "verl" and config.model.dtype == "bfloat16"
    hint = f" ({_gib(saved)} with trainer.optimizer_state=bfloat16)"
    return f"a run of it is estimated to need {_gib(total)} of memory on this machine" + (
        hint if possible and not config.model.lora.rank and saved < total else ""
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
