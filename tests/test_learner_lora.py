"""LoRA: only the adapter is trained, published and saved; merged, it is the trained policy."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
from learner_ranks import MAX_LENGTH, on_ranks, one_batch, state_of, train, whole  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: E402

from atropos_hpc import config as schema  # noqa: E402
from atropos_hpc.config import AlgorithmConf, LoraConf, ModelConf, PolicyConf, TrainerConf  # noqa: E402
from atropos_hpc.contracts.metrics import Evaluation  # noqa: E402
from atropos_hpc.learner.backends.verl import VerlBackend  # noqa: E402
from atropos_hpc.learner.checkpoint import Checkpoints  # noqa: E402
from atropos_hpc.learner.main import backend_class  # noqa: E402
from atropos_hpc.learner.publisher import Publisher  # noqa: E402
from atropos_hpc.policy import lora  # noqa: E402
from atropos_hpc.policy.manifest import verify  # noqa: E402
from atropos_hpc.policy.store import PolicyStore  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_json, write_json  # noqa: E402

FSDP2 = 0  # where a ZeRO stage is meant
TARGETS = ["q_proj", "v_proj", "down_proj"]


def backend_of(path: Path, stage: int) -> VerlBackend:
    model = ModelConf(
        path=str(path),
        dtype="float32",
        max_length=MAX_LENGTH,
        lora=LoraConf(rank=4, alpha=8, targets=TARGETS),
    )
    trainer = TrainerConf(
        learning_rate=1e-2,
        steps=20,
        deepspeed={"zero_optimization": {"stage": stage}} if stage else {},
    )
    return backend_class("deepspeed" if stage else "verl")(
        model, trainer, AlgorithmConf(kl_coef=0.01), 0
    )


def published(run: RunDir) -> tuple[Path, int]:
    """Directory and number of the newest policy version."""
    store = PolicyStore(run.policy)
    latest = store.latest()
    assert latest is not None
    return store.directory(latest), latest.version


def weights_of(backend: VerlBackend) -> dict[str, torch.Tensor]:
    return whole(backend.weights())


def two_steps_and_two_more(
    rank: int, world: int, path: Path, run: RunDir, stage: int = FSDP2
) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=2)
    before = weights_of(backend)
    first = train(backend, 2)
    publishing = Publisher(run.policy, PolicyConf(), "bfloat16")
    publishing.publish(backend, 2)
    checkpoints.save(backend, state_of(backend))
    publishing.wait()
    assert checkpoints.wait() == 2 and publishing.newest == 2
    batch = one_batch(backend, truncated=False)
    tokens = [tuple(ids.tolist()) for ids in batch.tensors["input_ids"].unbind()]
    log_probs = dict(
        zip(tokens, [row.clone() for row in backend.log_probs(batch).unbind()], strict=True)
    )
    reference = dict(
        zip(tokens, [row.clone() for row in batch.tensors["ref_log_prob"].unbind()], strict=True)
    )
    after = weights_of(backend)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    return moved, first, train(backend, 2), weights_of(backend), log_probs, reference


def resumed(rank: int, world: int, path: Path, run: RunDir, stage: int) -> Any:
    backend, checkpoints = backend_of(path, stage), Checkpoints(run, keep=2)
    checkpoints.load_latest(backend, state_of(backend))
    return train(backend, 2), weights_of(backend)


@pytest.mark.parametrize(
    "world, stage",
    [
        (1, FSDP2),
        (2, FSDP2),
        *(pytest.param(2, stage, marks=pytest.mark.deepspeed) for stage in (1, 2, 3)),
    ],
)
def test_only_the_adapter_moves_and_it_is_what_is_published_and_saved(
    small_model: Path, run: RunDir, world: int, stage: int
) -> None:
    from transformers import AutoModelForCausalLM

    ranks = on_ranks(world, two_steps_and_two_more, small_model, run, stage)
    moved, first, metrics, end, _, _ = ranks[0]
    assert len(moved) == 6 and all(".lora_" in name for name in moved), moved
    assert (
        first[0]["kl_reference"] == pytest.approx(0, abs=1e-6) and metrics[1]["kl_reference"] > 1e-4
    )

    directory, version = published(run)
    assert version == 2
    verify(directory)
    assert read_json(directory / "manifest.json")["kind"] == "adapter"
    assert {path.name for path in directory.iterdir()} == {"manifest.json", lora.FILE, lora.CONFIG}
    tensors, config = (load_file(directory / lora.FILE), read_json(directory / lora.CONFIG))
    merged = lora.merge([load_file(small_model / "model.safetensors")], tensors, config)
    exact = AutoModelForCausalLM.from_pretrained(
        small_model, dtype=torch.float64, attn_implementation="eager"
    )
    for which, weights in ((5, None), (4, merged[0])):
        if weights is not None:
            exact.load_state_dict(
                {name: tensor.double() for name, tensor in weights.items()}, strict=False
            )
        for rank in ranks:
            for tokens, got in rank[which].items():
                ids = torch.tensor(tokens)
                with torch.no_grad():
                    want = (
                        exact(ids[None], use_cache=False)
                        .logits[0, :-1]
                        .log_softmax(-1)
                        .gather(-1, ids[1:, None])[:, 0]
                    )
                trained = got != 0  # the others are not computed; of a filler that is all
                assert trained.any() or len(tokens) == 2
                assert torch.allclose(got[trained].double(), want[-len(got) :][trained], atol=1e-5)

    again, weights = on_ranks(world, resumed, small_model, run, stage)[0]
    assert again == metrics and all(torch.equal(weights[name], end[name]) for name in end), (
        "bit-equal"
    )
    keys = FileSystemReader(run.checkpoints / "step-2-0").read_metadata().state_dict_metadata
    assert all(".lora_" in key or key.startswith("train.") for key in keys), keys


def test_peft_reads_what_is_published(small_model: Path, run: RunDir) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    on_ranks(1, two_steps_and_two_more, small_model, run)
    directory, _ = published(run)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32), str(directory)
    )
    merged = lora.merge(
        [load_file(small_model / "model.safetensors")],
        load_file(directory / lora.FILE),
        read_json(directory / lora.CONFIG),
    )[0]
    theirs = model.merge_and_unload().state_dict()
    assert all(torch.allclose(theirs[name], tensor, atol=1e-6) for name, tensor in merged.items())
    with pytest.raises(ValueError, match="no weights for"):
        lora.merge([{}], load_file(directory / lora.FILE), read_json(directory / lora.CONFIG))


def test_an_export_merges_the_adapter(small_model: Path, run: RunDir, tmp_path: Path) -> None:
    from atropos_hpc.environments.make_base import make_tokenizer
    from atropos_hpc.learner.export import export

    on_ranks(2, two_steps_and_two_more, small_model, run)
    make_tokenizer().save_pretrained(small_model)
    model = {
        "path": str(small_model),
        "dtype": "float32",
        "lora": {"rank": 4, "alpha": 8, "targets": TARGETS},
    }
    config = dataclasses.asdict(schema.Config(run_dir=str(run.path)))
    config["model"] |= model
    write_json(run.run_json, {"id": "test", "config": config})
    append_record(run.evaluations, Evaluation(2, accuracy=0.25, sequences=10))
    assert export(run, tmp_path / "out") == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a LoRA adapter of rank 4, merged" in card and "| 2 | 0.250 | 10 |" in card
    directory, _ = published(run)
    tensors, config = (load_file(directory / lora.FILE), read_json(directory / lora.CONFIG))
    (merged,) = lora.merge([load_file(small_model / "model.safetensors")], tensors, config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == merged.keys() and all(
        written[name].equal(merged[name]) for name in merged
    )
