"""Models of random weights for benchmarks."""

from typing import Any


def random_qwen3(
    vocabulary: int, width: int, layers: int, heads: tuple[int, int], **more: Any
) -> Any:
    """Build a Qwen3. `heads`: attention heads and key-value heads; `more`: other config fields."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}
    fixed = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **{**shape, **fixed, **more}))
