"""Estimate the memory of a run on each GPU, and of a rollout node's policy cache, before it starts.

The estimate follows from the model's config.json and the run's config, for dense decoders such as
Llama and Qwen. Terms of the trainer, in bytes (P parameters, T tokens per micro-batch, H hidden
size, I size of the MLP):

    sharded over ranks    16 P: float32 weights and gradients, two moments of Adam
                          2 P: the frozen reference in the computing dtype
    optimizer step        4 P more: a temporary of the fused list operations
    forward and backward  gathered weights: the root's and two layers'; gradient of the output
                          layer, in the computing dtype and summed in float32; one chunk of logits
                          saved activations: (8 I + 15 H) T per layer, or 2 H T per layer and one
                          whole layer with activation checkpointing

The activation term is fitted to the four peaks in bench/results/gpu.json. The tests compare with
the same peaks, so they guard the fit and do not validate it. Leave a tenth free for the allocator
and libraries.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, micro_batch_tokens
from atropos_hpc.runtime import position_limit

MASTER, COMPUTE = 4, 2  # bytes of a float32 and of a bfloat16
TRAINED = 4 * MASTER  # weight, gradient, two moments
CHECKPOINT = 3 * MASTER  # weight, two moments
OPTIMIZER_TEMPORARY = MASTER
LOSS_CHUNK = 96 << 20  # logits; as in learner/loss_head.py, which imports torch
CHUNK_LOGIT = 2 * COMPUTE + MASTER  # logits, their gradient, a float32 temporary
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Of a model, in numbers of parameters."""

    layers: int
    hidden: int
    inner: int  # of the MLP
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    biased: bool  # query, key and value have biases, as in Qwen2
    normed: bool  # queries and keys are normed, as in Qwen3

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (queries + 2 * keys) + queries * self.hidden
        biases = queries + 2 * keys if self.biased else 0
        norms = 2 * self.head_dim if self.normed else 0
        return attention + biases + norms + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; an untied output layer has as many."""
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        """All parameters; a tied output layer counts once."""
        ends = self.embedding * (1 if self.tied else 2)
        return self.layers * self.layer + ends + self.hidden

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * COMPUTE


@dataclass(frozen=True)
class Estimate:
    """Bytes; per GPU except for the last."""

    trainer: float  # peak, with the reference
    reference: float  # the part of it that the frozen reference takes
    weights: float  # of the model in a server, per GPU
    cache_of_one: float  # KV cache of one sequence of model.max_length, per GPU
    policy_cache: (
        float  # policy.cache on a rollout node: the newest version, and the next while made
    )

    def sequences(self, gpu_bytes: float, utilization: float) -> int:
        """Return how many sequences of full length a server holds at once."""
        return max(0, int((gpu_bytes * utilization - self.weights) / self.cache_of_one))


def sizes(model: dict[str, Any]) -> Sizes:
    """Read a parsed config.json. Raises KeyError for another kind of model."""
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    kind = model.get("model_type", "")
    return Sizes(
        layers=model["num_hidden_layers"],
        hidden=hidden,
        inner=model["intermediate_size"],
        vocabulary=model["vocab_size"],
        heads=heads,
        kv_heads=model.get("num_key_value_heads") or heads,
        head_dim=model.get("head_dim") or hidden // heads,
        tied=bool(model.get("tie_word_embeddings")),
        biased=kind == "qwen2",
        normed=kind == "qwen3",
    )


def sizes_of(config: Config) -> Sizes | None:
    """Read the sizes of the config's model; None without a config.json of that kind."""
    try:
        path = position_limit.config_file(config.model.path or "")
        return sizes(position_limit.read(path)) if path else None
    except (OSError, ValueError, KeyError):
        return None


def describe(config: Config) -> str | None:
    """Render the estimate in one line; None without a config.json of that kind."""
    if (model := sizes_of(config)) is None:
        return None
    found = estimate(config, model)
    return (
        f"trainer {found.trainer / GIB:.2g} GiB per rank; "
        f"a server {found.weights / GIB:.2g} GiB of weights, "
        f"{found.cache_of_one / GIB:.2g} GiB of KV cache per sequence of full length; "
        f"a rollout node {found.policy_cache / GIB:.2g} GiB in {config.policy.cache}"
    )


def estimate(config: Config, model: Sizes) -> Estimate:
    """Estimate what each GPU of either role holds at its peak."""
    ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
    lora = config.model.lora.rank > 0
    trained = MASTER if lora else TRAINED  # an adapter leaves the base without gradient and moments
    held = 0.0 if config.trainer.offload else trained * model.total / ranks
    temporary = 0.0 if lora else OPTIMIZER_TEMPORARY * model.total / ranks
    frozen = config.algorithm.needs_reference and not lora and not config.trainer.offload
    reference = COMPUTE * model.total / ranks if frozen else 0.0
    backward = _gathered(model, lora) + _activations(config, model)
    parallel = config.rollout.tensor_parallel
    cache = model.cache_bytes * config.model.max_length / min(parallel, model.kv_heads)
    stored = MASTER if config.model.dtype == "float32" else COMPUTE
    published = 0 if lora else model.total * stored  # an adapter is small
    return Estimate(
        trainer=held + reference + max(temporary, backward),
        reference=reference,
        weights=COMPUTE * model.total / parallel,
        cache_of_one=cache,
        policy_cache=2 * published,
    )


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


def free_memory() -> int:
    """Return the bytes that this process may still allocate: of the machine, and of its cgroup."""
    import psutil

    found = [psutil.virtual_memory().available]
    mount = Path("/sys/fs/cgroup")
    group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    for directory in (mount / group, *(mount / group).parents):
        try:
            limit, used = ((directory / f"memory.{n}").read_text() for n in ("max", "current"))
            found.append(int(limit) - int(used))  # "max" is no limit
        except (OSError, ValueError):
            continue
    return max(0, min(found))


def stored_bytes(config: Config, model: Sizes) -> tuple[int, int]:
    """Return the bytes on disk of one policy version and of one checkpoint.

    An adapter's are small and counted as nothing.
    """
    if config.model.lora.rank > 0:
        return 0, 0
    parameter = MASTER if config.model.dtype == "float32" else COMPUTE
    return model.total * parameter, model.total * CHECKPOINT


def _gathered(model: Sizes, lora: bool) -> float:
    """Return the bytes of unsharded weights and of the output layer's gradient."""
    weights = COMPUTE * (model.embedding * (1 if model.tied else 2) + 2 * model.layer)
    gradient = 0 if lora else (2 * COMPUTE + MASTER) * model.embedding
    return weights + gradient


def _activations(config: Config, model: Sizes) -> float:
    """Return the bytes that a micro-batch leaves for its backward pass, and one chunk of logits."""
    tokens = micro_batch_tokens(config)
    layer = tokens * (8 * model.inner + 15 * model.hidden)
    if config.trainer.gradient_checkpointing is not False:
        saved = model.layers * tokens * model.hidden * COMPUTE + layer
    else:
        saved = model.layers * layer
    return saved + CHUNK_LOGIT * min(tokens * model.vocabulary, LOSS_CHUNK)
