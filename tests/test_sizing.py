"""Estimates of memory, compared with what a GPU measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.config import Config
from atropos_hpc.runtime import model_sizes, sizing
from bench.parts.published import CONFIGS

MEASURED = Path(__file__).parent.parent / "bench" / "results" / "gpu.json"
SHAPES = {  # of bench/gpu/parts.py
    size: CONFIGS[f"Qwen/Qwen2.5-{size}-Instruct"] for size in ("0.5B", "1.5B")
}
SMALLER = {**SHAPES["0.5B"], "vocab_size": 32_768, "num_hidden_layers": 8} | {
    "num_key_value_heads": 14,
    "tie_word_embeddings": False,
}


def rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(MEASURED.read_text())["rows"] if "peak GiB" in row]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["what"])
def test_the_estimate_is_within_three_percent_of_the_measured_peak(row: dict[str, Any]) -> None:
    """Nothing of the formula was fitted to these peaks."""
    sizes = model_sizes.sizes(SHAPES[row["what"].split()[1].rstrip(",")])
    config = Config(run_dir="/run")
    config.roles.trainer.gpus_per_node = 1
    config.trainer.gradient_checkpointing = "with activation" in row["what"]
    config.algorithm.kl_coef, config.algorithm.kl_metric = 0, False  # it lay in host memory
    # the largest of the five micro-batches; no prompts were shared
    phases = sizing.Learner(config, sizes, tokens=7548, keys=7548).phases()
    assert max(phases.values()) / sizing.GIB == pytest.approx(row["peak GiB"], rel=0.03)


@pytest.mark.parametrize(
    ("kl_coef", "kl_metric", "held"), [(0.01, False, 2), (0.0, True, 2), (0.0, False, 0)]
)
def test_a_reference_that_nothing_needs_takes_no_memory(
    kl_coef: float, kl_metric: bool, held: int
) -> None:
    config = Config(run_dir="/run")
    config.algorithm.kl_coef, config.algorithm.kl_metric = kl_coef, kl_metric
    sizes = model_sizes.sizes(SHAPES["0.5B"])
    assert sizing.Learner(config, sizes).reference == held * sizes.total


@pytest.mark.verl
def test_the_chunk_of_logits_is_the_loss_head_s() -> None:
    from atropos_hpc.learner.loss_head import CACHED_LOGITS, CHUNK_LOGITS

    assert CHUNK_LOGITS == sizing.LOSS_CHUNK and sizing.CACHED_LOGITS["cpu"] == CACHED_LOGITS


@pytest.mark.parametrize(
    ("free_gib", "gpus", "asked", "recomputed"),
    [(24, 0, None, False), (8, 0, None, True), (64, 1, None, True), (8, 0, False, False)],
)
def test_activations_are_recomputed_where_memory_is_short(
    tmp_path: Path, free_gib: int, gpus: int, asked: bool | None, recomputed: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALLER))
    config = Config(run_dir="/run")
    config.model.path, config.trainer.gradient_checkpointing = str(tmp_path), asked
    config.roles.trainer.gpus_per_node = gpus
    assert sizing.recomputes_activations(config, free_gib * sizing.GIB) is recomputed


def decides(rank: int, _world: int, free_gib: tuple[int, ...], config: Config) -> bool:
    from atropos_hpc.learner.main import recompute_activations

    return recompute_activations(config, free_gib[rank] * sizing.GIB)


@pytest.mark.verl
@pytest.mark.parametrize(("free_gib", "recomputed"), [((24, 8), True), ((24, 24), False)])
def test_all_ranks_recompute_activations_where_one_is_short_of_memory(
    tmp_path: Path, free_gib: tuple[int, ...], recomputed: bool
) -> None:
    from learner_ranks import on_ranks

    (tmp_path / "config.json").write_text(json.dumps(SMALLER))
    config = Config(run_dir="/run")
    config.model.path = str(tmp_path)
    assert on_ranks(2, decides, free_gib, config) == [recomputed] * 2
