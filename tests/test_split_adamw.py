"""AdamW with weights in two halves: the arithmetic, and a run with it."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from learner_ranks import MAX_LENGTH, on_ranks, same, state_of, tiny_model, train, whole  # noqa: E402

from atropos_hpc import validate_trainer  # noqa: E402
from atropos_hpc.config import AlgorithmConf, Config, ModelConf, TrainerConf  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.learner.split_adamw import SplitAdamW, join, split  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402


def weights_of(optimizer: SplitAdamW, parameter: torch.Tensor) -> torch.Tensor:
    lower = optimizer.state[parameter]["lower"]
    return join(parameter.detach().view(torch.int16), lower.view(torch.int16))


def test_two_halves_are_the_exact_weight_and_the_upper_one_its_nearest_bfloat16() -> None:
    torch.manual_seed(0)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0xBF808000 - (1 << 32)]).int()
    weights = torch.cat([torch.randn(10_000), torch.zeros(1), ties.view(torch.float32)])
    upper, lower = split(weights)
    assert torch.equal(join(upper, lower.to(torch.int16)), weights)
    error = (upper.view(torch.bfloat16).float() - weights).abs()
    assert torch.equal(error, (weights.bfloat16().float() - weights).abs())


def test_a_hundred_steps_move_the_weights_as_torchs_adamw_does() -> None:
    torch.manual_seed(0)
    start, scale = torch.randn(20_000).bfloat16(), torch.rand(20_000) * 0.01
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.float())
    options = {"lr": 1e-5, "weight_decay": 0.01}  # a step is far below a bfloat16's precision
    split_adamw = SplitAdamW([ours], **options)
    adamw = torch.optim.AdamW([theirs], **options)
    for _ in range(100):
        ours.grad = ((torch.randn(20_000) + 0.3) * scale).bfloat16()
        theirs.grad = ours.grad.float()
        split_adamw.step()
        adamw.step()
    moved = theirs.detach() - start.float()
    error = weights_of(split_adamw, ours) - theirs.detach()
    assert error.norm() < 0.01 * moved.norm()


def test_the_second_moment_decays_although_a_step_is_below_its_precision() -> None:
    parameter = torch.nn.Parameter(torch.ones(5_000, dtype=torch.bfloat16))
    optimizer = SplitAdamW([parameter], lr=1e-5)
    for step in range(400):
        parameter.grad = torch.full_like(parameter, float(step == 0))
        optimizer.step()
    square = optimizer.state[parameter]["exp_avg_sq"].float()
    assert square.mean().item() == pytest.approx(1e-3 * 0.999**399, rel=0.02)


def backend_of(path: Path, optimizer_state: str = "bfloat16") -> VerlBackend:
    trainer = TrainerConf(learning_rate=1e-4, optimizer_state=optimizer_state)
    model = ModelConf(path=str(path), max_length=MAX_LENGTH)
    return VerlBackend(model, trainer, AlgorithmConf(kl_coef=0), 0, reference=False)


def all_of(backend: VerlBackend) -> dict[str, torch.Tensor]:
    state = backend.state_dict()
    lower = {name: moments["lower"] for name, moments in state["optimizer"].items()}
    found = whole({**state["model"], **{f"{name}.lower": each for name, each in lower.items()}})
    return {name: each.view(torch.int16) for name, each in found.items()}


def saved_and_trained_on(rank: int, world: int, path: Path, run: RunDir) -> object:
    backend, checkpoints = backend_of(path), Checkpoints(run, keep=2)
    train(backend, 2)
    checkpoints.save(backend, state_of(backend))
    metrics = train(backend, 2)
    checkpoints.wait()
    return metrics, all_of(backend)


def resumed(rank: int, world: int, path: Path, run: RunDir) -> object:
    backend, checkpoints = backend_of(path), Checkpoints(run, keep=2)
    assert checkpoints.load_latest(backend, state_of(backend))
    return train(backend, 2), all_of(backend)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resume_is_bit_equal_in_both_halves(tmp_path: Path, world: int) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    model = tiny_model(tmp_path / "model", tied=True)
    metrics, after = on_ranks(world, saved_and_trained_on, model, run)[0]
    again, end = on_ranks(world, resumed, model, run)[0]
    assert metrics == again and same(after, end)
    assert any(name.endswith("lower") and bool(each.any()) for name, each in after.items())


def exact(backend: VerlBackend) -> dict[str, torch.Tensor]:
    """Return the weights in float32, and the moments."""
    state = backend.state_dict()
    found = whole(state["model"])
    for name, each in state["optimizer"].items():
        moments = whole(each)
        if "lower" in moments:
            halves = (half.view(torch.int16) for half in (found[name], moments["lower"]))
            found[name] = join(*halves)
        found |= {f"{name}.{key}": moments[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}
    return found


def saved_with(rank: int, world: int, path: Path, run: RunDir, optimizer_state: str) -> object:
    backend, checkpoints = backend_of(path, optimizer_state), Checkpoints(run, keep=2)
    train(backend, 2)
    checkpoints.save(backend, state_of(backend))
    checkpoints.wait()
    return exact(backend)


def loaded_with(rank: int, world: int, path: Path, run: RunDir, optimizer_state: str) -> object:
    backend, checkpoints = backend_of(path, optimizer_state), Checkpoints(run, keep=2)
    assert checkpoints.load_latest(backend, state_of(backend))
    found = exact(backend)
    assert train(backend, 1)[0]["grad_norm"] > 0
    return found


@pytest.mark.parametrize(
    "written, resumed_with", [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_a_resume_with_another_optimizer_state_has_the_exact_weights(
    tmp_path: Path, written: str, resumed_with: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    model = tiny_model(tmp_path / "model", tied=True, layers=1)
    before = on_ranks(1, saved_with, model, run, written)[0]
    after = on_ranks(2, loaded_with, model, run, resumed_with)[0]
    assert same(before, after)
    assert any(not torch.equal(each, each.bfloat16().float()) for each in before.values())


@pytest.mark.parametrize(
    "key, value",
    [
        ("trainer.backend", "deepspeed"),
        ("model.dtype", "float32"),
        ("model.lora.rank", 8),
        ("trainer.optim", {"optimizer": "Adafactor"}),
    ],
)
def test_what_excludes_it_is_refused(key: str, value: object) -> None:
    config = Config(run_dir="/run")
    config.trainer.optimizer_state = "bfloat16"
    *path, name = key.split(".")
    part: object = config
    for each in path:
        part = getattr(part, each)
    assert not list(validate_trainer.errors(config))
    setattr(part, name, value)
    (error,) = validate_trainer.errors(config)
    assert error[0] == "trainer.optimizer_state" and key in error[1]
