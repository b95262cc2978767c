"""The DeepSpeed backend: ZeRO 1, 2 and 3 against verl's FSDP2, whose gradients are tested against a float64 loop."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.deepspeed]
pytest.importorskip("verl")
pytest.importorskip("deepspeed")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from learner_ranks import make_groups, on_ranks, tiny_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.deepspeed import DeepSpeedBackend, described  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.policy.publish import snapshot, write_shards  # noqa: E402
from atropos_hpc.run_dir import RunDir  # noqa: E402

FSDP2 = 0  # where a ZeRO stage is meant


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def backend_of(path: Path, stage: int, dtype: str = "float32") -> VerlBackend:
    own = {"deepspeed": {"zero_optimization": {"stage": stage}}} if stage else {}
    trainer = TrainerConf(learning_rate=1e-3, warmup_steps=2, schedule="cosine", steps=20, gradient_checkpointing=False, **own)
    model = ModelConf(path=str(path), dtype=dtype, max_length=150)
    return (DeepSpeedBackend if stage else VerlBackend)(model, trainer, AlgorithmConf(kl_coef=0.05), 0)


def train(backend: VerlBackend, steps: int) -> list[dict[str, float]]:
    metrics = []
    for _ in range(steps):
        batch = make_batch(make_groups(backend.step_count)[backend.rank :: backend.world], AlgorithmConf(), 150, 150, 0)
        batch.set_old_log_probs(backend.log_probs(batch))
        batch.set_reference_log_probs(backend.reference_log_probs(batch))
        metrics.append(backend.update(batch))
    return metrics


def whole(backend: VerlBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in backend.weights().items()}


def gradients(rank: int, world: int, path: Path, stage: int) -> Any:
    """Of the first step, in several micro-batches; what that step reports."""
    from deepspeed.utils import safe_get_full_grad

    backend = backend_of(path, stage)
    step, kept = backend._policy.optimizer_step, {}

    def keep() -> float:
        for name, parameter in backend.module.named_parameters():
            kept[name] = (safe_get_full_grad(parameter) if stage else parameter.grad.full_tensor()).double().clone()
        return step()

    backend._policy.optimizer_step = keep
    return kept, train(backend, 1)[0]


def test_gradients_are_those_of_the_other_backend(model_path: Path) -> None:
    want, metrics = on_ranks(2, gradients, model_path, FSDP2)[0]
    norm = torch.sqrt(sum((g**2).sum() for g in want.values()))
    for world, stage in ((2, 1), (2, 2), (2, 3), (1, 2)):
        got, others = on_ranks(world, gradients, model_path, stage)[0]
        assert got.keys() == want.keys()
        assert float(torch.sqrt(sum(((got[name] - g) ** 2).sum() for name, g in want.items())) / norm) < 1e-5, (world, stage)
        assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6), (world, stage)


def saved(rank: int, world: int, path: Path, run: RunDir, stage: int) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=3)
    train(backend, 3)
    at_save = whole(backend)
    checkpoints.save(backend, {})
    metrics = train(backend, 2)
    assert checkpoints.wait() == 3
    return at_save, metrics, whole(backend)


def resumed(rank: int, world: int, path: Path, run: RunDir, stage: int, save: bool = False) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=3)
    checkpoints.load_latest(backend)
    assert backend.step_count == 3
    loaded = whole(backend)
    if save:
        checkpoints.save(backend, {})
        checkpoints.wait()
    return loaded, train(backend, 2), whole(backend)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resume(model_path: Path, run: RunDir, stage: int) -> None:
    at_save, metrics, end = on_ranks(2, saved, model_path, run, stage)[0]
    loaded, again, last = on_ranks(2, resumed, model_path, run, stage)[0]
    assert again == metrics and all(torch.equal(last[name], end[name]) for name in end), "2 ranks again: bit-equal"
    for world, other in ((1, stage), (2, 4 - stage), (2, FSDP2)):  # fewer ranks; ranks again, from what one has saved; the other backend
        loaded, elsewhere, _ = on_ranks(world, resumed, model_path, run, other, True)[0]
        assert all(torch.equal(loaded[name], at_save[name]) for name in at_save), (world, other)
        assert [m["loss"] for m in elsewhere] == pytest.approx([m["loss"] for m in metrics], abs=1e-6), (world, other)
        assert [m["lr"] for m in elsewhere] == [m["lr"] for m in metrics]


def saved_at_zero(rank: int, world: int, path: Path, run: RunDir, stage: int) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=1)
    checkpoints.save(backend, {})
    checkpoints.wait()
    train(backend, 2)
    again = backend_of(path, stage)
    checkpoints.load_latest(again)
    train(again, 2)
    return whole(backend), whole(again)


def test_a_checkpoint_before_the_first_step(model_path: Path, run: RunDir) -> None:
    one, other = on_ranks(1, saved_at_zero, model_path, run, 2)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


def published(rank: int, world: int, path: Path, directory: Path, stage: int) -> Any:
    backend = backend_of(path, stage)
    train(backend, 1)
    shot = snapshot(backend.module, torch.float32, backend.weights())
    write_shards(shot, directory, dist.new_group(backend="gloo"))
    return whole(backend)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_published(model_path: Path, tmp_path: Path, stage: int) -> None:
    weights = on_ranks(2, published, model_path, tmp_path / "1-1", stage)[0]
    stored: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "1-1").glob("*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == load_file(model_path / "model.safetensors").keys()
    assert all(torch.equal(stored[name], weights[name]) for name in stored)


def in_bfloat16(rank: int, world: int, path: Path) -> Any:
    backend = backend_of(path, 2, "bfloat16")
    metrics = train(backend, 2)
    return metrics, {p.dtype for p in backend.module.parameters()}, {t.dtype for t in backend.state_dict()["model"].values()}


def test_bfloat16_keeps_float32_for_the_optimizer(model_path: Path) -> None:
    metrics, computing, kept = on_ranks(2, in_bfloat16, model_path)[0]
    assert computing == {torch.bfloat16} and kept == {torch.float32} and all(m["grad_norm"] > 0 for m in metrics)


def test_deepspeeds_json_is_passed_on_below_what_the_run_decides() -> None:
    trainer = TrainerConf(grad_clip=0.5, offload=True, deepspeed={"wall_clock_breakdown": True, "zero_optimization": {"stage": 3}})
    made = described(ModelConf(dtype="bfloat16"), trainer)
    assert made["wall_clock_breakdown"] and made["gradient_clipping"] == 0.5 and made["bf16"] == {"enabled": True}
    assert made["zero_optimization"]["stage"] == 3 and made["zero_optimization"]["offload_param"]["device"] == "cpu"
