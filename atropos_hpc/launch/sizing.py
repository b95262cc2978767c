"""How much memory a run will want on each GPU, and on a rollout node for policy versions: an estimate from the model's config.json and the
run's own config, before anything starts.

Of a dense decoder in the manner of Llama and Qwen. Measured on no device: it is the sum of what has to be held, without what allocators
waste and libraries keep, so leave a tenth free.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config

MASTER, COMPUTE = 4, 2  # bytes of a float32 and of a bfloat16
ADAM = 3 * MASTER  # gradient and two moments, beside the weight
LOGITS = COMPUTE + 2 * MASTER  # logits, their float32 copy, its gradient


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
        extra = (queries + 2 * keys if self.biased else 0) + (
            2 * self.head_dim if self.normed else 0
        )
        return attention + extra + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def total(self) -> int:
        """All parameters; a tied output layer counts once."""
        return (
            self.layers * self.layer
            + (1 if self.tied else 2) * self.vocabulary * self.hidden
            + self.hidden
        )

    @property
    def cache_bytes(self) -> int:
        """Of one token in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * COMPUTE


@dataclass(frozen=True)
class Estimate:
    """Bytes; per GPU but for the last."""

    trainer: float
    weights: float  # of the model in a server, its share of one GPU
    cache_of_one: float  # KV cache of one sequence of model.max_length, its share of one GPU
    node_copies: float  # of a rollout node's memory: policy.cache has the newest version, and the next while it is made

    def sequences(self, gpu_bytes: float, utilization: float) -> int:
        """How many sequences of full length a server holds at once."""
        return max(0, int((gpu_bytes * utilization - self.weights) / self.cache_of_one))


def sizes(model: dict[str, Any]) -> Sizes:
    """From a parsed config.json. Raises KeyError when it is of another kind of model."""
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    kind = model.get("model_type", "")
    return Sizes(
        model["num_hidden_layers"], hidden, model["intermediate_size"], model["vocab_size"], heads,
        model.get("num_key_value_heads") or heads, model.get("head_dim") or hidden // heads, bool(model.get("tie_word_embeddings")),
        biased=kind == "qwen2", normed=kind == "qwen3",
    )  # fmt: skip


def told(config: Config) -> str | None:
    """The estimate in words, where the model is a directory with a config.json that can be read so."""
    try:
        found = estimate(
            config,
            sizes(
                json.loads(Path(config.model.path or "", "config.json").expanduser().read_text())
            ),
        )
    except (OSError, ValueError, KeyError):
        return None
    trainer, weights, cache, copies = (
        bytes_ / 2**30
        for bytes_ in (found.trainer, found.weights, found.cache_of_one, found.node_copies)
    )
    server = f"a server {weights:.2g} GiB of weights, {cache:.2g} GiB of KV cache per sequence of full length"
    return f"trainer {trainer:.2g} GiB per rank; {server}; a rollout node {copies:.2g} GiB in {config.policy.cache}"


def estimate(config: Config, model: Sizes) -> Estimate:
    """What each GPU of either role will hold."""
    ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
    lora, tokens = config.model.lora.rank > 0, config.trainer.tokens_per_micro_batch
    # sharded: the weights; unless an adapter is trained, gradient and moments too, and the frozen reference, of which it needs no copy
    held = model.total * (MASTER if lora else MASTER + ADAM + MASTER)
    if config.trainer.offload:
        held = 0
    # whole, in the dtype of computing: embedding and output as one unit, and two layers, the one at work and the next
    gathered = COMPUTE * (
        model.vocabulary * model.hidden * (1 if model.tied else 2) + 2 * model.layer
    )
    kept = 1 if config.trainer.gradient_checkpointing else model.layers
    inner = tokens * COMPUTE * (3 * model.inner + 8 * model.hidden)
    activations = (
        model.layers * tokens * model.hidden * COMPUTE
        + kept * inner
        + tokens * model.vocabulary * LOGITS
    )
    parallel = config.rollout.tensor_parallel
    cache = model.cache_bytes * config.model.max_length / min(parallel, model.kv_heads)
    published = (
        0 if lora else model.total * (MASTER if config.model.dtype == "float32" else COMPUTE)
    )  # of an adapter next to nothing
    return Estimate(
        held / ranks + gathered + activations,
        COMPUTE * model.total / parallel,
        cache,
        2 * published,
    )
