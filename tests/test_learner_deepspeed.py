"""The DeepSpeed backend: ZeRO 1, 2 and 3 agree with verl's FSDP2."""

import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.deepspeed]
pytest.importorskip("verl")
pytest.importorskip("deepspeed")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from learner_ranks import (  # noqa: E402
    MAX_LENGTH,
    on_ranks,
    one_batch,
    same,
    state_of,
    tiny_model,
    train,
    whole,
    write_shards,
)
from peak_memory import PeakMemory, existing  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from atropos_hpc.config import AlgorithmConf, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.deepspeed import (  # noqa: E402
    DeepSpeedBackend,
    _Engine,
    deepspeed_config,
)
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.policy.snapshot import snapshot  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402

FSDP2 = 0  # where a ZeRO stage is meant
SMALL_BUDGET = 150  # tokens: several micro-batches per step


def backend_of(path: Path, stage: int, dtype: str = "float32") -> VerlBackend:
    own = {"deepspeed": {"zero_optimization": {"stage": stage}}} if stage else {}
    trainer = TrainerConf(
        learning_rate=1e-3,
        warmup_steps=2,
        schedule="cosine",
        steps=20,
        gradient_checkpointing=False,
        **own,
    )
    model = ModelConf(path=str(path), dtype=dtype, max_length=MAX_LENGTH)
    return (DeepSpeedBackend if stage else VerlBackend)(
        model, trainer, AlgorithmConf(kl_coef=0.05), 0
    )


def weights_of(backend: VerlBackend) -> dict[str, torch.Tensor]:
    return whole(backend.weights())


def gradients(rank: int, world: int, path: Path, stages: list[int]) -> dict[int, Any]:
    """Of the first step with each, in several micro-batches; what that step reports."""
    from deepspeed.utils import safe_get_full_grad

    made = {}
    for stage in stages:
        backend = backend_of(path, stage)
        step, kept = backend._policy.optimizer_step, {}

        def keep(
            backend: Any = backend, step: Any = step, kept: Any = kept, stage: int = stage
        ) -> float:
            for name, parameter in backend.module.named_parameters():
                kept[name] = (
                    (safe_get_full_grad(parameter) if stage else parameter.grad.full_tensor())
                    .double()
                    .clone()
                )
            return step()

        backend._policy.optimizer_step = keep
        metrics = train(backend, 1, SMALL_BUDGET)[0]
        made[stage] = kept, metrics
    return made


def test_gradients_are_those_of_the_other_backend(small_model: Path) -> None:
    found = on_ranks(2, gradients, small_model, [FSDP2, 1, 2, 3])[0]
    want, metrics = found.pop(FSDP2)
    norm = torch.sqrt(sum((g**2).sum() for g in want.values()))
    cases = {
        **{(2, stage): case for stage, case in found.items()},
        (1, 2): on_ranks(1, gradients, small_model, [2])[0][2],
    }
    assert len(cases) == 4
    for case, (got, others) in cases.items():
        assert got.keys() == want.keys()
        assert (
            float(torch.sqrt(sum(((got[name] - g) ** 2).sum() for name, g in want.items())) / norm)
            < 1e-5
        ), case
        assert others == pytest.approx(metrics, rel=1e-5, abs=1e-6), case


def uninterrupted(rank: int, world: int, path: Path, runs: dict[int, RunDir]) -> dict[int, Any]:
    """For each stage: three steps, a checkpoint, three more steps.

    Return the weights at the checkpoint, the metrics of the later steps, and the final weights.
    """
    made = {}
    for stage, run in runs.items():
        backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=9)
        train(backend, 3, SMALL_BUDGET)
        at_save = weights_of(backend)
        checkpoints.save(backend, state_of(backend))
        metrics = train(backend, 3, SMALL_BUDGET)
        assert checkpoints.wait() == 3
        made[stage] = at_save, metrics, weights_of(backend)
    return made


def resumed(
    rank: int, world: int, path: Path, chain: list[tuple[RunDir, int, int, bool]]
) -> list[Any]:
    """For each run directory, with its stage: resume, take some steps, and save if asked.

    Return the weights as loaded, the metrics of the steps, and the final weights.
    """
    made = []
    for run, stage, steps, save in chain:
        backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=9)
        checkpoints.load_latest(backend, state_of(backend))
        loaded = weights_of(backend)
        metrics = train(backend, steps, SMALL_BUDGET)
        if save:
            checkpoints.save(backend, state_of(backend))
            checkpoints.wait()
        made.append((loaded, metrics, weights_of(backend)))
    return made


def test_resume_on_other_numbers_of_ranks_other_stages_and_the_other_backend(
    small_model: Path, tmp_path: Path
) -> None:
    stages = (1, 2, 3)
    runs = {stage: RunDir(tmp_path / str(stage)) for stage in stages}
    for run in runs.values():
        run.create()
    exact = on_ranks(2, uninterrupted, small_model, runs)[0]
    cases = [(stage, own) for stage in stages for own in (stage, stage % 3 + 1, FSDP2)]
    again = on_ranks(
        2, resumed, small_model, [(runs[stage], own, 3, False) for stage, own in cases]
    )[0]
    for (stage, own), (loaded, metrics, end) in zip(cases, again, strict=True):
        at_save, want, last = exact[stage]
        assert same(loaded, at_save), (stage, own)
        if own == stage:
            assert metrics == want and same(end, last), f"stage {stage}, 2 ranks again: bit-equal"
        assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in want], abs=1e-6), (
            stage,
            own,
        )
        assert [m["lr"] for m in metrics] == [m["lr"] for m in want]

    # 2 ranks -> 1, which takes a step and saves -> 2 again; each compared with the run that was
    # never stopped
    on_one = on_ranks(1, resumed, small_model, [(runs[stage], stage, 1, True) for stage in stages])[
        0
    ]
    on_two = on_ranks(
        2, resumed, small_model, [(runs[stage], stage, 1, False) for stage in stages]
    )[0]
    for stage, one, two in zip(stages, on_one, on_two, strict=True):
        at_save, want, _ = exact[stage]
        assert same(one[0], at_save) and same(two[0], one[2]), stage
        assert one[1][0]["loss"] == pytest.approx(want[0]["loss"], abs=1e-6), stage
        assert two[1][0]["loss"] == pytest.approx(want[1]["loss"], abs=1e-6), stage


def other_backend(rank: int, world: int, path: Path, run: RunDir, stages: tuple[int, int]) -> Any:
    """Save with the first, load with the second; return the weights of both."""
    one, checkpoints = backend_of(path, stages[0]), Checkpoints(run, keep=1)
    train(one, 1, SMALL_BUDGET)
    checkpoints.save(one, state_of(one))
    checkpoints.wait()
    other = backend_of(path, stages[1])
    checkpoints.load_latest(other, state_of(other))
    return [whole(each.state_dict()["model"]) for each in (one, other)]


@pytest.mark.parametrize("stages", [(2, FSDP2), (FSDP2, 2)])
def test_each_backend_reads_a_tied_model_of_the_other(
    tmp_path: Path, run: RunDir, stages: tuple[int, int]
) -> None:
    one, other = on_ranks(1, other_backend, tiny_model(tmp_path, True, 1), run, stages)[0]
    assert same(one, other) and "lm_head.weight" not in one


def saved_at_zero(rank: int, world: int, path: Path, run: RunDir, stage: int) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=1)
    checkpoints.save(backend, state_of(backend))
    checkpoints.wait()
    train(backend, 2, SMALL_BUDGET)
    again = backend_of(path, stage)
    checkpoints.load_latest(again, state_of(again))
    train(again, 2, SMALL_BUDGET)
    return weights_of(backend), weights_of(again)


def test_a_checkpoint_before_the_first_step(small_model: Path, run: RunDir) -> None:
    one, other = on_ranks(1, saved_at_zero, small_model, run, 2)[0]
    assert same(one, other)


def published(rank: int, world: int, path: Path, directory: Path, stages: tuple[int, ...]) -> Any:
    group, made = dist.new_group(backend="gloo"), {}
    for stage in stages:
        backend = backend_of(path, stage)
        train(backend, 1, SMALL_BUDGET)
        write_shards(
            snapshot(backend.module, torch.float32, backend.weights()),
            directory / f"{stage}-1",
            group,
        )
        made[stage] = weights_of(backend)
    return made


def test_what_is_published(small_model: Path, tmp_path: Path) -> None:
    for stage, weights in on_ranks(2, published, small_model, tmp_path, (2, 3))[0].items():
        stored = {
            name: tensor
            for path in (tmp_path / f"{stage}-1").glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        assert stored.keys() == load_file(small_model / "model.safetensors").keys()
        assert all(torch.equal(stored[name], weights[name]) for name in stored), stage


def loaded(rank: int, world: int, path: Path, stages: tuple[int, ...]) -> list[float]:
    """Return the most memory that sharding takes, in bytes per parameter of the whole model."""
    peaks, build = [], _Engine._build_fsdp_module

    def watched(engine: _Engine, module: torch.nn.Module) -> torch.nn.Module:
        before = existing()  # held, so that none of their addresses is used again
        with PeakMemory(ignored=frozenset(each._cdata for each in before)) as memory:
            sharded = build(engine, module)
        peaks.append(memory.peak)
        return sharded

    _Engine._build_fsdp_module = watched  # type: ignore[method-assign]
    for stage in stages:
        backend = backend_of(path, stage, "bfloat16")
    shapes = (getattr(p, "ds_numel", p.numel()) for p in backend.module.parameters())
    total = sum(shapes)
    return [peak / total for peak in peaks]


def test_zero_3_never_holds_the_whole_model_and_others_in_the_computing_dtype(
    tmp_path: Path,
) -> None:
    """Rank 1 receives the weights; rank 0 has them in host memory, which here counts, too."""
    _, (whole_model, sharded) = on_ranks(2, loaded, tiny_model(tmp_path, layers=8), (2, 3))
    assert 2.0 <= whole_model < 2.4
    assert 1.0 <= sharded < 1.4


def in_bfloat16(rank: int, world: int, path: Path) -> Any:
    backend = backend_of(path, 2, "bfloat16")
    metrics = train(backend, 2, SMALL_BUDGET)
    return (
        metrics,
        {p.dtype for p in backend.module.parameters()},
        {t.dtype for t in backend.state_dict()["model"].values()},
    )


def test_bfloat16_keeps_float32_for_the_optimizer(small_model: Path) -> None:
    metrics, computing, kept = on_ranks(2, in_bfloat16, small_model)[0]
    assert (
        computing == {torch.bfloat16}
        and kept == {torch.float32}
        and all(m["grad_norm"] > 0 for m in metrics)
    )


def over_a_bad_step(rank: int, world: int, path: Path, stage: int, dtype: str) -> Any:
    """What a step whose loss is NaN changes and reports, and then a good one."""
    backend = backend_of(path, stage, dtype)
    train(backend, 1)
    before = whole(backend.state_dict()["model"])
    moments = [whole(each) for each in backend.state_dict()["optimizer"].values()]
    norm = backend.update(one_batch(backend), 1, kl_coef=float("nan"))["grad_norm"]
    kept = same(before, whole(backend.state_dict()["model"]))
    after = [whole(each) for each in backend.state_dict()["optimizer"].values()]
    kept = kept and all(map(same, moments, after))
    next_norm = train(backend, 1)[0]["grad_norm"]
    return norm, kept, next_norm, same(before, whole(backend.state_dict()["model"]))


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]
)
def test_a_non_finite_gradient_is_a_skipped_step_as_with_the_other_backend(
    small_model: Path, stage: int, dtype: str
) -> None:
    for norm, kept, next_norm, stuck in on_ranks(2, over_a_bad_step, small_model, stage, dtype):
        assert not math.isfinite(norm) and kept, "the weights and moments are unchanged"
        assert 0 < next_norm < math.inf and not stuck


def test_deepspeeds_json_is_passed_on_below_what_the_run_decides() -> None:
    trainer = TrainerConf(
        grad_clip=0.5,
        offload=True,
        deepspeed={"wall_clock_breakdown": True, "zero_optimization": {"stage": 3}},
    )
    made = deepspeed_config(ModelConf(dtype="bfloat16"), trainer)
    assert (
        made["wall_clock_breakdown"]
        and made["gradient_clipping"] == 0.5
        and made["bf16"] == {"enabled": True}
    )
    assert (
        made["zero_optimization"]["stage"] == 3
        and made["zero_optimization"]["offload_param"]["device"] == "cpu"
    )
