"""Read the sizes of a model from its config.json: dense decoders such as Llama and Qwen."""

from dataclasses import dataclass
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.runtime import position_limit

MASTER = 4  # bytes of a float32
COMPUTE = 2  # bytes of a bfloat16
# Keys of a config.json that say how many experts a mixture has; its layers are of another size.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


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


def sizes(model: dict[str, Any]) -> Sizes:
    """Read a parsed config.json. Raises KeyError for another kind of model."""
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    kind = model.get("model_type", "")
    if any(model.get(name) for name in EXPERTS):
        raise KeyError(f"{kind} is a mixture of experts")
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
    """Read the sizes of the config's model, from its directory or from the Hugging Face cache.

    None without a config.json of a kind that `sizes` knows.
    """
    try:
        path = position_limit.config_file(config.model.path or "")
        return sizes(position_limit.read(path)) if path else None
    except (OSError, ValueError, KeyError):
        return None


def parameters_of(config: Config) -> int:
    """Return the number of the model's parameters; of a model that `sizes` does not know, by the
    sizes of its weight files. 0 if there are none."""
    if (model := sizes_of(config)) is not None:
        return model.total
    try:
        path = position_limit.config_file(config.model.path or "")
        stated = position_limit.read(path) if path else {}
        files = path.parent.glob("*.safetensors") if path else ()
        size = sum(file.stat().st_size for file in files)
    except (OSError, ValueError):
        return 0
    dtype = stated.get("dtype") or stated.get("torch_dtype")
    return size // (MASTER if dtype == "float32" else COMPUTE)
