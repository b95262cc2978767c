"""Estimate the memory of a run on each GPU, and of its nodes, before it starts.

The estimate follows from the model's config.json and the run's config, for dense decoders such as
Llama and Qwen. A trainer rank is at its peak in one of four phases:

    load       DeepSpeed: the weights in the computing dtype; one parameter at a time with ZeRO-3
    loss head  all saved activations; sums of the output layer's gradient; a chunk of logits
    backward   saved activations, gradients within one layer, the output layer's gradient
    optimizer  gradients, and as much for temporaries of the fused list operations

Each adds to what is always held: weights, two moments of Adam, the frozen reference. Tests compare
the peaks with torch's dispatcher (tests/test_sizing_tracked.py) and with a GPU's (test_sizing.py).
Not included: the allocator's fragmentation, CUDA's context and libraries. Leave a tenth free.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, environments, micro_batch_tokens
from atropos_hpc.runtime.model_sizes import COMPUTE, MASTER, Sizes, parameters_of, sizes_of
from atropos_hpc.runtime.out_of_memory import CGROUPS, OWN

CHECKPOINT = 3 * MASTER  # weight, two moments
SPLIT_CHECKPOINT = MASTER + 2 * COMPUTE  # the same with trainer.optimizer_state=bfloat16
# Logits at a time, as in learner/loss_head.py, which imports torch; and those of the temporaries.
LOSS_CHUNK = {"cuda": 96 << 20, "cpu": 1 << 25}
CACHED_LOGITS = {"cuda": 96 << 20, "cpu": 1 << 20}
# DeepSpeed's defaults, numbers of elements
BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
GIB = 2**30
PROCESS = 5 * GIB  # host memory of one that imports torch and uses a GPU: an assumption


@dataclass(frozen=True)
class Estimate:
    """Bytes; per GPU, or of a node."""

    trainer: float  # peak, with the reference
    weights: float  # of the model in a server, per GPU
    cache_of_one: float  # KV cache of one sequence of model.max_length, per GPU
    policy_cache: float  # on a rollout node: the newest version, and the next while made
    trainer_node: float  # host memory of the first trainer node, which needs most
    rollout_node: float  # host memory of a rollout node, with the policy cache
    trainer_processes: float  # of trainer_node, what is assumed for its processes
    rollout_processes: float


def estimate(config: Config, model: Sizes) -> Estimate:
    """Estimate what each GPU of either role holds at its peak."""
    lora = config.model.lora.rank > 0
    parallel = config.rollout.tensor_parallel
    stored = MASTER if config.model.dtype == "float32" else COMPUTE
    per_token = model.cache_bytes * stored / COMPUTE
    cache = per_token * config.model.max_length / min(parallel, model.kv_heads)
    published = 0 if lora else model.total * stored  # an adapter is small
    learner = Learner(config, model)
    processes = float(PROCESS * _rollout_processes(config))
    return Estimate(
        trainer=max(learner.phases().values()),
        weights=stored * model.total / parallel,
        cache_of_one=cache,
        policy_cache=2 * published,
        trainer_node=learner.node,
        rollout_node=2 * published + processes,
        trainer_processes=float(PROCESS * learner.ranks_per_node),
        rollout_processes=processes,
    )


def _rollout_processes(config: Config) -> int:
    """Count the processes of a rollout node that import torch."""
    servers = config.rollout.servers * (1 + config.rollout.tensor_parallel)
    return servers + sum(each.workers for each in environments(config).values())


class Learner:
    """The memory of one trainer rank, in bytes, with `tokens` computed in a micro-batch.

    `keys` are the tokens that are attended to: with shared prefixes, those of a prefix count once
    for every sequence. By default, half of them are such copies.
    """

    def __init__(
        self,
        config: Config,
        model: Sizes,
        tokens: int | None = None,
        keys: int | None = None,
        chunk: int | None = None,
    ) -> None:
        trainer = config.trainer
        self.model, self.tokens = model, tokens or micro_batch_tokens(config)
        self.keys = keys or self.tokens * (2 if trainer.share_prefixes else 1)
        self.device = "cuda" if config.roles.trainer.gpus_per_node else "cpu"
        self.width = MASTER if config.model.dtype == "float32" else COMPUTE
        self.lora = config.model.lora.rank > 0
        self.split = trainer.optimizer_state == "bfloat16"
        self.moments = 2 * (COMPUTE if self.split else MASTER)  # per parameter
        self.gradient = COMPUTE if self.split else MASTER
        self.recomputes = trainer.gradient_checkpointing is not False
        self.chunk = chunk or LOSS_CHUNK[self.device]
        self.ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
        self.ranks_per_node = config.roles.trainer.ranks_per_node
        size = trainer.fsdp_config.get("fsdp_size", -1)
        self.shards = self.ranks if size == -1 else size
        self.fsdp = trainer.fsdp_config
        self.zero = _zero(config) if trainer.backend == "deepspeed" else {}
        self.stage = self.zero.get("stage", 2) if self.zero else 0
        self.offload = trainer.offload
        frozen = config.algorithm.needs_reference and not self.lora and not self.offload
        self.reference = self.width * model.total / self.shards if frozen else 0.0

    def phases(self) -> dict[str, float]:
        """Return the peak of each phase."""
        held = self._held + self._gradients + self._unsharded_weights + self._gradient_buckets
        held += self._spanning_gradient if self.stage == 2 else 0
        trained = 0 if self.lora else self.model.embedding
        gradients = 0.0 if self.lora else self.gradient * self.model.total / self.shards
        return {
            "load": self._load,
            "loss head": held
            + self._saved
            + MASTER * trained
            + max(self._logits, self.width * (trained + 2 * self._chunk_logits))
            + 2 * self.width * self.model.hidden * self.tokens,
            "backward": held
            + self._saved
            + (self._layer if self.recomputes else 0)
            + 3 * self.width * self.model.inner * self.tokens
            + self.width * trained
            + (self.width * self.model.layer if not self.stage else 0),
            "optimizer": self._held
            + (0.0 if self.offload else (1 if self.split else 2) * gradients)
            + (self.width * self.model.total / self.shards if self.stage == 3 else 0)
            + self._spanning_gradient,
        }

    @property
    def node(self) -> float:
        """Return the host memory of the first node: while it loads the model, or a save is staged.

        Every rank loads all float32 weights of a model with tied embeddings, of others only the
        first. A save holds a policy version twice, and a checkpoint.
        """
        total, per_node = self.model.total, self.ranks_per_node
        loading = MASTER * total * (per_node if self.model.tied else 1)
        checkpoint = SPLIT_CHECKPOINT if self.split else CHECKPOINT
        parameter = 0 if self.lora else 2 * self.width + checkpoint
        staged = parameter * total * per_node / self.ranks
        if self.offload:
            staged += (checkpoint + MASTER) * total * per_node / self.ranks
        return max(loading, staged) + PROCESS * per_node

    @property
    def _held(self) -> float:
        """Return what is held all the time: weights, moments, reference."""
        total = self.model.total
        weights = MASTER * total / self.shards  # of FSDP2, and of ZeRO's optimizer
        moments = 0.0 if self.lora else self.moments * total / self.shards
        if not self.stage:
            return self.reference + (0.0 if self.offload else weights + moments)
        state = 0.0 if self.offload or self.lora else weights + moments
        computing = self.width * total / (self.shards if self.stage == 3 else 1)
        return self.reference + state + (0.0 if self.offload and self.stage == 3 else computing)

    @property
    def _gradients(self) -> float:
        """Return the gradients that micro-batches leave."""
        if self.lora:
            return 0.0
        total = self.model.total
        if not self.stage:
            if self.fsdp.get("use_no_sync_for_gradient_accumulation"):
                return MASTER * total
            return 0.0 if self.offload else self.gradient * total / self.shards
        return self.width * total / (1 if self.stage == 1 else self.shards)

    @property
    def _spanning_gradient(self) -> float:
        """Return the largest gradient, if ZeRO keeps it whole because no partition holds it."""
        spans = self.model.embedding > self.model.total / self.shards
        return self.width * self.model.embedding if self.stage in (1, 2) and spans else 0.0

    @property
    def _unsharded_weights(self) -> float:
        """Return the weights that are gathered during a pass: the root's, and two layers'."""
        if self.stage in (1, 2) or (self.stage == 3 and self.shards == 1):
            return 0.0  # of one rank, ZeRO-3's partition is used as it is
        if self.stage == 3:
            live = self.zero.get("stage3_max_live_parameters", MAX_LIVE)
            return self.width * min(self.model.total, live)
        if not self.fsdp.get("reshard_after_forward", True):
            return self.width * self.model.total
        return self.width * (self.model.embedding + self.model.layer)

    @property
    def _gradient_buckets(self) -> float:
        """Return ZeRO's buckets, which are allocated whole."""
        if not self.stage or self.lora:
            return 0.0
        size = self.zero.get("reduce_bucket_size", BUCKET)
        two = self.zero.get("overlap_comm", self.device == "cuda") and self.stage < 3
        return self.width * size * (2 if two else 1)

    @property
    def _layer(self) -> float:
        """Return the activations that a layer saves for its backward pass."""
        model, width = self.model, self.width
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        norm = MASTER + 2 * width  # bytes per element: in float32, normed, scaled
        normed = 2 * model.hidden + (queries + keys if model.normed else 0)
        # On a CPU, sequences are copied into blocks and back.
        states = 2 if self.device == "cuda" else 3
        per_token = norm * normed + width * (states * queries + 4 * model.inner)
        return self.tokens * per_token + self.keys * 2 * width * keys

    @property
    def _saved(self) -> float:
        """Return what all layers save, and the last norm."""
        model, width = self.model, self.width
        layer = self.tokens * model.hidden * width if self.recomputes else self._layer
        return model.layers * layer + self.tokens * model.hidden * (MASTER + 2 * width)

    @property
    def _chunk_logits(self) -> int:
        return min(self.tokens * self.model.vocabulary, self.chunk)

    @property
    def _logits(self) -> float:
        """Return a chunk of logits, its gradient, and temporaries in float32."""
        whole = self._chunk_logits
        reduced = min(whole, CACHED_LOGITS[self.device])
        if self.device == "cuda":  # one fused kernel
            return 2 * self.width * whole + MASTER * reduced
        return 3 * self.width * whole + 2 * MASTER * reduced

    @property
    def _load(self) -> float:
        """Return the weights on the device before they are sharded."""
        if self.stage in (1, 2):
            return 2 * self.width * self.model.total  # as loaded, and in one buffer
        return MASTER * self.model.total / self.shards + MASTER * self.model.embedding


def _zero(config: Config) -> dict[str, Any]:
    zero = config.trainer.deepspeed.get("zero_optimization", {})
    return {"stage": 2, **zero} if isinstance(zero, dict) else {"stage": 2}


def recomputes_activations(config: Config, free_bytes: float) -> bool:
    """Decide trainer.gradient_checkpointing for a rank that may use so much of its node's memory.

    null: True on a GPU, and if the rank would need more than half of it otherwise: the servers and
    workers may be on the same machine.
    """
    if config.trainer.gradient_checkpointing is not None:
        return config.trainer.gradient_checkpointing
    model = sizes_of(config)
    if config.roles.trainer.gpus_per_node or model is None:
        return True
    trainer = replace(config.trainer, gradient_checkpointing=False)
    needed = estimate(replace(config, trainer=trainer), model).trainer
    return needed * config.roles.trainer.ranks_per_node > free_bytes / 2


def free_memory(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Return the bytes that this process may still allocate: of the machine, and of its cgroup."""
    import psutil

    found = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            mount, of_files = cgroups / "memory", "total_"
            names = ("limit_in_bytes", "usage_in_bytes")
        elif not controllers:
            mount, names, of_files = cgroups, ("max", "current"), ""
        else:
            continue
        here = mount / group.lstrip("/")
        for directory in (here, *here.parents):
            try:
                limit, used = (int((directory / f"memory.{name}").read_text()) for name in names)
                lines = (directory / "memory.stat").read_text().splitlines()
                held = {name: int(count) for name, count in map(str.split, lines)}
            except (OSError, ValueError):  # "max" is no limit
                continue
            # Pages of files that were read or written count as used, and are freed at need.
            pages = (held.get(f"{of_files}{kind}_file", 0) for kind in ("active", "inactive"))
            found.append(limit - used + sum(pages))
    return max(0, min(found))


def stored_bytes(config: Config) -> tuple[int, int]:
    """Return the bytes on disk of one policy version and of one checkpoint.

    An adapter's are small and counted as nothing, and so are those of a model that is not here yet.
    """
    if config.model.lora.rank > 0:
        return 0, 0
    parameters = parameters_of(config)
    published = MASTER if config.model.dtype == "float32" else COMPUTE
    split = config.trainer.optimizer_state == "bfloat16"
    return parameters * published, parameters * (SPLIT_CHECKPOINT if split else CHECKPOINT)
