"""The config.json of published models, as far as their sizes follow from it."""

from typing import Any

KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)


def _config(*values: str | int, **more: int) -> dict[str, Any]:
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
    return {**common, **dict(zip(KEYS, values, strict=True)), **more}


CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": _config("qwen2", 896, 24, 14, 2, 4864, 151936, True, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": _config("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 32768),
    "Qwen/Qwen2.5-3B-Instruct": _config("qwen2", 2048, 36, 16, 2, 11008, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": _config("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 32768),
    "Qwen/Qwen2.5-32B-Instruct": _config("qwen2", 5120, 64, 40, 8, 27648, 152064, False, 32768),
    "Qwen/Qwen3-4B": _config("qwen3", 2560, 36, 32, 8, 9728, 151936, True, 40960, head_dim=128),
}
