"""Settings of verl's engine and optimizer reach it, and change a step only if they should."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from learner_ranks import MAX_LENGTH, on_ranks, same, state_of, train, whole  # noqa: E402
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    PolicyLossConfig,
)

from atropos_hpc import schema, validate_trainer  # noqa: E402
from atropos_hpc.config import AlgorithmConf, Config, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402

BUDGET = 150  # tokens: several micro-batches per step


def test_the_names_that_the_checks_know_are_verls() -> None:
    for section, known, made in (
        ("fsdp_config", validate_trainer.FSDP_CONFIG, FSDPEngineConfig),
        ("optim", validate_trainer.OPTIM, FSDPOptimizerConfig),
    ):
        owned = {
            key.partition(".")[2] for key in validate_trainer.SET_BY_RUN if key.startswith(section)
        }
        assert set(known) | owned <= {field.name for field in dataclasses.fields(made)}
        assert not set(known) & owned
    choices = {name: key.choices for name, key, _ in schema.values(Config())}
    assert set(choices["algorithm.loss"]) <= set(POLICY_LOSS_REGISTRY)
    fields = {
        each.name
        for made in (PolicyLossConfig, FSDPActorConfig)
        for each in dataclasses.fields(made)
    }
    assert {name for names in validate_trainer.LOSS_OPTIONS.values() for name in names} <= fields


def backend_of(
    path: Path, attention: str = "sdpa", algorithm: AlgorithmConf | None = None, **trainer: Any
) -> VerlBackend:
    options = {
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "schedule": "cosine",
        "steps": 10,
        "gradient_checkpointing": False,
        **trainer,
    }
    model = ModelConf(path=str(path), dtype="float32", max_length=MAX_LENGTH, attention=attention)
    return VerlBackend(
        model,
        TrainerConf(**options),
        algorithm or AlgorithmConf(kl_coef=0.05, entropy_coef=0.01),
        0,
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "offload by FSDP2": {"offload": True},
    "offload by verl": {"fsdp_config": {"param_offload": True, "optimizer_offload": True}},
    "replicas": {"fsdp_config": {"fsdp_size": 1}},
    "weights stay whole": {
        "fsdp_config": {"reshard_after_forward": False, "forward_prefetch": True}
    },
    "gradients every micro-batch": {
        "fsdp_config": {"use_no_sync_for_gradient_accumulation": False}
    },
    "padded packs": {"fsdp_config": {"pad_to_length": True, "pad_to_length_bucket": 64}},
    "entropy": {
        "fsdp_config": {"entropy_checkpointing": True, "entropy_from_logits_chunk_size": 16}
    },
}


def with_each(rank: int, world: int, path: Path, run: RunDir) -> dict[str, Any]:
    """Two steps, a checkpoint, and a step of a backend that resumes from it.

    Return the metrics of each step, and the final weights.
    """
    made = {}
    for name, trainer in SETTINGS.items():
        backend, checkpoints = backend_of(path, **trainer), Checkpoints(run, keep=1)
        metrics = train(backend, 2, BUDGET)
        checkpoints.save(backend, state_of(backend))
        assert checkpoints.wait() == 2
        again = backend_of(path, **trainer)
        checkpoints.load_latest(again, state_of(again))
        made[name] = metrics + train(again, 1, BUDGET), whole(again.weights())
    return made


def test_what_changes_where_things_lie_leaves_the_steps_as_they_are(
    small_model: Path, run: RunDir
) -> None:
    found = on_ranks(2, with_each, small_model, run)[0]
    plain, weights = found["none"]
    for name, (metrics, others) in found.items():
        for one, other in zip(plain, metrics, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6), name
        assert max(float((others[key] - weights[key]).abs().max()) for key in weights) < 1e-5, name


def another_optimizer(rank: int, world: int, path: Path, run: RunDir) -> Any:
    optim = {
        "optimizer": "SGD",
        "override_optimizer_config": {"momentum": 0.9},
        "min_lr_ratio": 0.5,
    }
    backend, checkpoints = backend_of(path, optim=optim), Checkpoints(run, keep=1)
    metrics = train(backend, 3)
    checkpoints.save(backend, state_of(backend))
    metrics += train(backend, 2)
    checkpoints.wait()
    again = backend_of(path, optim=optim)
    checkpoints.load_latest(again, state_of(again))
    return (
        metrics,
        train(again, 2),
        whole(backend.weights()),
        whole(again.weights()),
        type(backend._policy.optimizer).__name__,
    )


def test_another_optimizer_and_floor_of_the_schedule(small_model: Path, run: RunDir) -> None:
    metrics, resumed, one, other, name = on_ranks(2, another_optimizer, small_model, run)[0]
    assert name == "SGD" and metrics[3:] == resumed and same(one, other)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(4)]
    assert [m["lr"] for m in metrics] == pytest.approx(
        [0.0, *(1e-3 * (0.5 + 0.5 * value) for value in cosine)]
    )


def stand_in_for_flash_attention() -> Callable[..., torch.Tensor]:
    """Stand in for flash-attn, which has no CPU build: dense attention per sequence of a pack."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        position_ids: torch.Tensor,
        **__: Any,
    ) -> torch.Tensor:
        sequence = (position_ids[0] == 0).cumsum(0)
        mask = (sequence[:, None] == sequence[None]) & (
            torch.arange(len(sequence))[:, None] >= torch.arange(len(sequence))[None]
        )
        heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)

    return attend


def over_ulysses(
    rank: int, world: int, path: Path, attention: str, algorithm: AlgorithmConf, fsdp: Any
) -> Any:
    from transformers import PreTrainedModel, modeling_utils
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = stand_in_for_flash_attention()
    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    modeling_utils.lazy_import_flash_attention = lambda *_, **__: None
    fsdp_config = {"ulysses_sequence_parallel_size": 2, **fsdp} if world > 1 else {}
    backend = backend_of(path, attention, algorithm, fsdp_config=fsdp_config)
    return (
        (backend.data_rank, backend.data_world),
        train(backend, 3, BUDGET),
        whole(backend.weights()),
    )


@pytest.mark.parametrize(
    "attention, fsdp",
    [
        ("sdpa", {}),
        ("flash_attention_2", {}),
        ("sdpa", {"pad_to_length": True, "pad_to_length_bucket": 64}),
    ],
)
def test_sequences_shared_by_two_ranks_are_trained_as_on_one(
    small_model: Path, attention: str, fsdp: dict[str, Any]
) -> None:
    algorithm = AlgorithmConf(
        advantage="reinforce_plus_plus_baseline", kl_coef=0.05, kl_in="reward"
    )
    given = (small_model, attention, algorithm, fsdp)
    (place, want, weights), *_ = on_ranks(1, over_ulysses, *given)
    assert place == (0, 1)
    for place, metrics, others in on_ranks(2, over_ulysses, *given):
        assert place == (0, 1), "both have the whole batch"
        for one, other in zip(want, metrics, strict=True):
            assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
        assert max(float((others[key] - weights[key]).abs().max()) for key in weights) < 1e-5


def unsharded_gradients(rank: int, world: int, path: Path, keep: bool) -> list[int]:
    """Bytes of unsharded gradients that are held when a micro-batch begins, for each of them."""
    from torch.distributed.fsdp import FSDPModule

    fsdp = {"use_no_sync_for_gradient_accumulation": True} if keep else {}
    backend = backend_of(path, fsdp_config=fsdp)
    engine, found = backend._policy, []
    forward_step = engine.forward_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        groups = [
            module._get_fsdp_state()._fsdp_param_group
            for module in engine.module.modules()
            if isinstance(module, FSDPModule)
        ]
        parameters = [p for group in groups if group is not None for p in group.fsdp_params]
        held = [
            gradient
            for parameter in parameters
            for gradient in (
                parameter.unsharded_accumulated_grad,
                getattr(parameter, "_unsharded_param", None) is not None
                and parameter._unsharded_param.grad,
            )
            if isinstance(gradient, torch.Tensor)
        ]
        found.append(sum(gradient.numel() * gradient.element_size() for gradient in held))
        return forward_step(*args, **kwargs)

    engine.forward_step = watched
    train(backend, 1, BUDGET)
    return found


def test_no_unsharded_gradient_outlives_a_micro_batch(small_model: Path) -> None:
    for held in on_ranks(2, unsharded_gradients, small_model, False):
        assert len(held) > 2 and not any(held)
    for held in on_ranks(2, unsharded_gradients, small_model, True):
        assert any(held), "the other setting holds them, and the test sees it"
