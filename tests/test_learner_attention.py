"""Attention within each sequence of a pack, against dense attention with a mask."""

import random
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from atropos_hpc.learner.backends import packed_attention  # noqa: E402


def packs() -> list[list[int]]:
    """Lengths of the sequences of each."""
    rng = random.Random(0)
    return [
        [1],
        [7],
        [1, 2, 4, 8, 16],
        [64, 1, 1, 63],
        [5] * 6,
        *([rng.randrange(1, 70) for _ in range(9)] for _ in range(4)),
    ]


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("lengths", packs(), ids=str)
def test_every_sequence_sees_itself_only(lengths: list[int]) -> None:
    torch.manual_seed(0)
    heads, key_heads, total = 4, 2, sum(lengths)
    shapes = ((1, heads, total, 8), (1, key_heads, total, 8), (1, key_heads, total, 8))
    mine = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in mine]
    sequence = (positions(lengths)[0] == 0).cumsum(0)
    mask = (sequence[:, None] == sequence[None]).tril()
    want = scaled_dot_product_attention(
        *theirs, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    module: torch.nn.Module = SimpleNamespace(num_key_value_groups=2)  # type: ignore[assignment]
    got, _ = packed_attention.attend(
        module, *mine, None, scaling=0.3, position_ids=positions(lengths)
    )
    assert got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-12)
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    assert all(
        torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12)
        for one, other in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("window", [None, 6])
def test_a_models_logits_are_those_of_its_sequences_alone(window: int | None) -> None:
    """Mistral's layers attend within a window: those keep transformers' mask."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attn_implementation": packed_attention.register(),
    }
    model = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if window is None
        else MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    )
    model = model.double().eval()
    lengths = [9, 20, 1, 14]
    tokens = torch.randint(0, 50, (1, sum(lengths)))
    with torch.no_grad():
        packed = model(tokens, position_ids=positions(lengths), use_cache=False).logits[0]
        model.set_attn_implementation("eager")
        alone = [model(ids[None], use_cache=False).logits[0] for ids in tokens[0].split(lengths)]
    assert (
        float((packed - torch.cat(alone)).abs().max()) < 1e-6
    )  # "eager" takes its softmax in float32


def test_a_model_that_does_not_tell_positions_is_refused() -> None:
    tensor = torch.zeros(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="Linear.*model.attention"):
        packed_attention.attend(torch.nn.Linear(1, 1), tensor, tensor, tensor, None)


@pytest.mark.parametrize(
    ("dtype", "size", "dropout", "capability", "taken"),
    [
        (torch.bfloat16, 128, 0.0, (9, 0), True),
        (torch.float16, 64, 0.0, (8, 0), True),
        (torch.bfloat16, 128, 0.0, None, False),  # a CPU
        (torch.float16, 64, 0.0, (7, 5), False),  # FlashAttention begins with 8.0
        (torch.float32, 64, 0.0, (9, 0), False),
        (torch.bfloat16, 20, 0.0, (9, 0), False),
        (torch.bfloat16, 512, 0.0, (9, 0), False),
        (torch.bfloat16, 64, 0.1, (9, 0), False),
    ],
)
def test_what_the_kernel_for_varying_lengths_cannot_compute_goes_into_blocks(
    dtype: torch.dtype, size: int, dropout: float, capability: tuple[int, int], taken: bool
) -> None:
    assert packed_attention.takes_varlen(dtype, size, dropout, capability) is taken
