"""Estimates of a learner rank's memory, compared with what torch's dispatcher counts."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.deepspeed]
pytest.importorskip("verl")
pytest.importorskip("deepspeed")

import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402
from learner_ranks import on_ranks, settings_of  # noqa: E402
from peak_memory import PeakMemory, existing  # noqa: E402

from atropos_hpc.config import AlgorithmConf, Config  # noqa: E402
from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.learner import loss_head, split_adamw  # noqa: E402
from atropos_hpc.learner.batch import make_batch  # noqa: E402
from atropos_hpc.learner.main import backend_class  # noqa: E402
from atropos_hpc.runtime import model_sizes, sizing  # noqa: E402

CHUNK = 1 << 17  # logits; scaled down as the models are
BUCKET = 50_000  # elements of ZeRO's buckets, likewise
FSDP2, SPLIT = 0, -1  # where a ZeRO stage is meant; SPLIT: FSDP2 with a bfloat16 state
PROMPT, ANSWER, GROUP = 48, 80, 4  # tokens, and sequences of a group


@dataclass(frozen=True)
class Case:
    """A model, as in its config.json, and how it is trained."""

    model: dict[str, Any]
    recomputes: bool
    shares: bool


def _case(kind: str, tied: bool, recomputes: bool, shares: bool, **model: int) -> Case:
    config = {"model_type": kind, "tie_word_embeddings": tied, "max_position_embeddings": 512}
    names = {"heads": "num_attention_heads", "kv": "num_key_value_heads", "size": "hidden_size"}
    names |= {"inner": "intermediate_size", "layers": "num_hidden_layers", "words": "vocab_size"}
    made = {names.get(name, name): value for name, value in model.items()}
    return Case({**config, **made}, recomputes, shares)


CASES = {
    "activations": _case(
        "qwen2", True, False, True, size=128, inner=512, layers=4, heads=4, kv=2, words=1024
    ),
    "normed queries": _case(
        "qwen3", False, True, True, size=96, inner=256, layers=3, heads=4, kv=1, words=1024,
        head_dim=32,
    ),
    "untied": _case(
        "llama", False, True, False, size=128, inner=352, layers=3, heads=8, kv=8, words=4096
    ),
    "embedding": _case(
        "qwen2", True, False, False, size=64, inner=128, layers=2, heads=4, kv=2, words=8192
    ),
    "deep": _case(
        "qwen3", True, False, True, size=96, inner=192, layers=8, heads=3, kv=1, words=512,
        head_dim=32,
    ),
}  # fmt: skip


def config_of(case: Case, stage: int, world: int, path: Path) -> Config:
    config = Config(run_dir="/run")
    config.model.path, config.model.max_length = str(path), 256
    config.algorithm = AlgorithmConf(kl_coef=0, kl_metric=False)  # no reference
    trainer = config.trainer
    trainer.gradient_checkpointing, trainer.share_prefixes = case.recomputes, case.shares
    trainer.tokens_per_micro_batch = GROUP * (PROMPT + ANSWER)  # a group in each
    trainer.optim = {"override_optimizer_config": {"foreach": True}}  # as on a GPU
    if stage == SPLIT:
        trainer.optimizer_state, trainer.optim = "bfloat16", {}
    elif stage:
        trainer.backend = "deepspeed"
        zero = {"stage": stage, "reduce_bucket_size": BUCKET}
        trainer.deepspeed = {"zero_optimization": {**zero, "stage3_param_persistence_threshold": 0}}
    config.roles.trainer.ranks_per_node = world
    return config


def groups_of(count: int, vocabulary: int) -> list[Group]:
    """Groups of sequences that share their prompt."""
    rng, length = np.random.default_rng(0), PROMPT + ANSWER
    position = np.tile(np.arange(length), GROUP)
    trained = position >= PROMPT
    made = []
    for gid in range(count):
        tokens = rng.integers(0, vocabulary, GROUP * length).astype(np.int32)
        tokens[~trained] = np.tile(tokens[:PROMPT], GROUP)
        log_probs = np.where(trained, -7.0, 1.0).astype(np.float32)
        lengths = np.full(GROUP, length, np.uint32)
        scores = rng.random(GROUP)
        made.append(Group(lengths, scores, tokens, trained, gid=gid, inference_logprobs=log_probs))
    return made


def tracked(rank: int, world: int, cases: list[tuple[Config, int]]) -> list[dict[str, float]]:
    """Return the peaks of this rank's passes and of its optimizer step, and the tokens computed."""
    loss_head.CHUNK_LOGITS["cpu"], split_adamw.CHUNK["cpu"] = CHUNK, 1 << 10
    gc.freeze()  # looking for tensors need not pass over all imported modules
    return [_tracked(rank, world, config, vocabulary) for config, vocabulary in cases]


def _tracked(rank: int, world: int, config: Config, vocabulary: int) -> dict[str, float]:
    before = existing()
    memory = PeakMemory(ignored=frozenset(storage._cdata for storage in before))
    trainer, found, computed = config.trainer, {}, []
    backend = backend_class(trainer.backend)(
        config.model, trainer, config.algorithm, 0, reference=False
    )
    groups = groups_of(2 * world, vocabulary)[rank::world]
    step = backend._policy.optimizer_step

    def watched_step() -> Any:
        found["passes"] = memory.peak
        gc.collect()
        dist.barrier()  # gloo's threads hold tensors of the passes until the other rank has them
        memory.reset()
        return step()

    def update(version: int) -> None:
        batch = make_batch(groups, settings_of(config.algorithm, trainer.tokens_per_micro_batch), 0)
        backend.update(batch, version)

    backend.module.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: computed.append(inputs[0].shape[1])
    )
    update(0)  # makes the optimizer's state
    backend._policy.optimizer_step = watched_step
    memory.track_existing()
    memory.reset()
    with memory:
        update(1)
    return {**found, "step": memory.peak, "tokens": max(computed)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_peaks_are_within_ten_percent_of_what_the_dispatcher_counts(
    tmp_path: Path, name: str, world: int
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    case, stages = CASES[name], (FSDP2, SPLIT, 1, 2, 3)
    options = {key: value for key, value in case.model.items() if key != "model_type"}
    shape = AutoConfig.for_model(case.model["model_type"], **options)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    configs = [config_of(case, stage, world, tmp_path) for stage in stages]
    work = [(config, case.model["vocab_size"]) for config in configs]
    keys = GROUP * (PROMPT + ANSWER)
    ratios = {}
    for stage, config, got in zip(stages, configs, on_ranks(world, tracked, work)[0], strict=True):
        assert got["tokens"] == (PROMPT + GROUP * ANSWER if case.shares else keys)
        model = model_sizes.sizes(case.model)
        phases = sizing.Learner(config, model, int(got["tokens"]), keys, CHUNK).phases()
        passes = max(phases["loss head"], phases["backward"])
        ratios[stage, "passes"] = passes / got["passes"]
        ratios[stage, "step"] = phases["optimizer"] / got["step"]
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
    print(world, name, {key: round(ratio, 3) for key, ratio in ratios.items()})
