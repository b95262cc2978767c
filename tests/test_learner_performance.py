"""What a step computes, counted and as a fraction of what its devices can do."""

import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from learner_ranks import MAX_LENGTH, make_groups, on_ranks, settings_of  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.learner.performance import Computed, Devices, FlopRates, flop_rates  # noqa: E402
from atropos_hpc.observe.metrics import StepTimes  # noqa: E402

TIMES = StepTimes(20.0, {"update": 10.0})
RATES = FlopRates(token=1e9, pair=0.0, output=0.0)
COMPUTED = Computed(tokens=989_000, pairs=0.0, trained=0.0)


def test_flops_are_those_that_torch_counts(model_path: Path) -> None:
    """torch counts masked pairs of queries and keys as well, and the rotary frequencies."""
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        embedded = model.get_input_embeddings()(torch.arange(tokens)[None])
        embedded.requires_grad_(True)  # else the first layer has no gradient of its input
        model(inputs_embeds=embedded).logits.sum().backward()
    rates = flop_rates(model, model.config)
    assert rates is not None
    counted = counter.get_total_flops() - sum(
        count
        for name, counts in counter.get_flop_counts().items()
        if name.endswith("rotary_emb")
        for count in counts.values()
    )
    assert rates.of(Computed(tokens, tokens**2, tokens)) == counted


def test_frozen_matrices_have_no_gradient_of_their_own(model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    trained = flop_rates(model, model.config)
    frozen = flop_rates(model.requires_grad_(False), model.config)
    assert trained is not None and frozen is not None
    assert frozen.token / trained.token == pytest.approx(2 / 3)


def test_a_mixture_of_experts_has_no_count(model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.config.num_experts = 8
    assert flop_rates(model, model.config) is None


def computed(rank: int, world: int, path: Any, share: bool) -> Any:
    trainer = TrainerConf(share_prefixes=share, gradient_checkpointing=False)
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH)
    backend = VerlBackend(model, trainer, AlgorithmConf(kl_coef=0), seed=0, reference=False)
    batch = make_batch(make_groups()[rank::world], settings_of(budget=4096), 0)
    batch.set_old_log_probs(backend.log_probs(batch))
    backend.update(batch, 0)
    lengths = batch.tensors["input_ids"].offsets().diff()
    return backend.computed, int(lengths.sum()), int(lengths.square().sum())


def test_shared_prefixes_count_once(model_path: Path) -> None:
    whole, tokens, squares = on_ranks(1, computed, model_path, False)[0]
    assert (whole.tokens, whole.pairs) == (tokens, squares / 2)
    shared, _, _ = on_ranks(1, computed, model_path, True)[0]
    assert shared.trained == whole.trained > 0
    assert shared.tokens < whole.tokens and shared.pairs < whole.pairs


@pytest.mark.parametrize(
    ("device", "dtype", "rates", "mfu"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", RATES, 0.0125),
        ("NVIDIA H100 80GB HBM3", "float32", RATES, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", RATES, None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", None, None),
    ],
)
def test_the_mfu_of_a_gpu_is_null_unless_its_peak_and_the_count_are_known(
    device: str, dtype: str, rates: FlopRates | None, mfu: float | None
) -> None:
    found = Devices(8, device, dtype).metrics(4000, COMPUTED, rates, TIMES)
    assert found["perf/throughput"] == 200 and found["perf/throughput_per_gpu"] == 25
    assert found["perf/mfu"] == pytest.approx(mfu) if mfu else math.isnan(found["perf/mfu"])


def test_a_cpu_has_no_mfu() -> None:
    assert "perf/mfu" not in Devices(1, None, "bfloat16").metrics(4000, COMPUTED, RATES, TIMES)
