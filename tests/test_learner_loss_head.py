"""The loss head: log-probs and entropies without logits of [tokens, vocabulary]."""

import pytest

torch = pytest.importorskip("torch")
from peak_memory import PeakMemory  # noqa: E402

from atropos_hpc.learner import loss_head  # noqa: E402
from atropos_hpc.learner.loss_head import LossHead, Supports, Targets  # noqa: E402

pytestmark = pytest.mark.verl


@pytest.mark.parametrize("tokens", [4096, 32768])
def test_a_logit_costs_at_most_six_bytes_at_any_size(tokens: int) -> None:
    vocabulary, size = 151_936, 64
    layer = torch.nn.Linear(size, vocabulary, bias=False, device="meta", dtype=torch.bfloat16)
    hidden = torch.empty(1, tokens, size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    head = LossHead(layer, vocabulary)
    rows = torch.arange(tokens, device="meta")
    head.targets = Targets(tokens, rows, rows, rows, torch.empty(tokens, device="meta"))
    with PeakMemory("meta") as memory:
        found = layer(hidden)
        found.sum().backward()
    assert 0.1 < memory.peak / (tokens * vocabulary) <= 6.0


def random_supports(labels: torch.Tensor, vocabulary: int) -> tuple[Supports, torch.Tensor]:
    """Supports of 1 to 20 ids, with the label, of two tokens of three; and the same as a mask."""
    mask = torch.zeros(len(labels), vocabulary, dtype=torch.bool)
    for i, label in enumerate(labels.tolist()):
        mask[i, torch.randperm(vocabulary)[: int(torch.randint(20, ()))]] = True
        mask[i, label] = True
    counts = mask.sum(-1)
    counts[::3] = 0
    ids = torch.cat([mask[i].nonzero()[:, 0] for i in range(len(labels)) if counts[i]])
    mask[::3] = True
    # the ids of the tokens may lie anywhere
    shift = 7
    starts = counts.cumsum(0) - counts + shift
    return Supports(starts, counts, torch.cat([ids.new_full((shift,), vocabulary), ids])), mask


def log_prob_and_entropy(
    logits: torch.Tensor, mask: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    """Of one token, over the ids of the mask."""
    log_p = logits[mask].log_softmax(-1)
    return torch.stack([log_p[mask[:label].sum()], -(log_p.exp() * log_p).sum()])


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("differentiable_entropy", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_float64(
    truncated: bool, differentiable_entropy: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        loss_head.CHUNK_LOGITS, "cpu", 97 * 70
    )  # several chunks, the last one short
    torch.manual_seed(0)
    tokens, size, vocabulary = 301, 16, 97
    layer = torch.nn.Linear(size, vocabulary, bias=bias)
    exact = torch.nn.Linear(size, vocabulary, bias=bias).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    hidden = torch.randn(1, tokens, size, requires_grad=True)
    hidden64 = hidden.detach().double().requires_grad_()
    rows = torch.randperm(tokens)[:230].sort().values
    labels = torch.randint(vocabulary, (230,))
    temperatures = torch.rand(230) + 0.5

    z = exact(hidden64)[0, rows] / temperatures.double()[:, None]
    everything = torch.ones(230, vocabulary, dtype=torch.bool)
    kept, mask = random_supports(labels, vocabulary) if truncated else (None, everything)
    want = torch.stack([log_prob_and_entropy(*row) for row in zip(z, mask, labels, strict=True)])
    weights = torch.randn(230, 2, dtype=torch.float64)
    if not differentiable_entropy:
        weights[:, 1] = 0
    (want * weights).sum().backward()

    head = LossHead(layer, vocabulary)
    head.differentiable_entropy = differentiable_entropy
    head.targets = Targets(tokens, rows, rows, labels, temperatures, kept)
    found = layer(hidden)[0]
    (found[rows] * weights.float()).sum().backward()

    others = torch.ones(tokens, dtype=torch.bool).index_fill(0, rows, False)
    assert not found[others].any()
    assert torch.allclose(found[rows].double(), want, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), hidden64.grad, atol=1e-5)
    for parameter, wanted in zip(layer.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(parameter.grad.double(), wanted.grad, atol=1e-4)


def test_weight_gradients_of_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokens, size, vocabulary = 4096, 8, 64
    labels, temperatures = torch.randint(vocabulary, (tokens,)), torch.ones(tokens)
    hidden = torch.randn(1, tokens, size, dtype=torch.bfloat16)
    errors = []
    weight = torch.randn(vocabulary, size) * 0.1
    gradients = {}
    for chunk in (tokens, 64):
        monkeypatch.setitem(loss_head.CHUNK_LOGITS, "cpu", chunk * vocabulary)
        layer = torch.nn.Linear(size, vocabulary, bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(weight)
        head = LossHead(layer, vocabulary)
        rows = torch.arange(tokens)
        head.targets = Targets(tokens, rows, rows, labels, temperatures)
        layer(hidden)[0, :, 0].sum().backward()
        gradients[chunk] = layer.weight.grad.float()
    errors = (gradients[64] - gradients[tokens]).norm() / gradients[tokens].norm()
    assert errors < 2 * 2**-8  # a rounding to bfloat16 of each, not of 64 partial sums


def test_a_node_without_a_compiler_is_recognized(caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        assert not loss_head.compiles.__wrapped__("cpu")
    assert "torch.compile fails, so the loss head is slower" in caplog.text


def test_without_targets_the_layer_gives_logits() -> None:
    layer = torch.nn.Linear(4, 9)
    hidden = torch.randn(2, 3, 4)
    want = layer(hidden)
    LossHead(layer, 9)
    assert torch.equal(layer(hidden), want)


def test_a_model_that_transforms_its_logits_is_recognized() -> None:
    class Config:
        final_logit_softcapping = 30.0

    class Plain:
        final_logit_softcapping = None
        logit_scale = 1.0

    assert loss_head.transforms_logits(Config()) == "final_logit_softcapping"
    assert loss_head.transforms_logits(Plain()) is None
