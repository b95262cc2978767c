"""Publishing in the background of training: deltas, full disks, damage, a second publisher."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verl
pytest.importorskip("verl")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from learner_ranks import on_ranks, tiny_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from atropos_hpc.config import PolicyConf  # noqa: E402
from atropos_hpc.contracts.members import RepublishRequest  # noqa: E402
from atropos_hpc.contracts.policy import PolicyVersion  # noqa: E402
from atropos_hpc.learner.publisher import Intervals, Publisher, ReaderLink  # noqa: E402
from atropos_hpc.policy.follower import Follower, LoadableVersion  # noqa: E402
from atropos_hpc.policy.manifest import read_manifest, verify  # noqa: E402
from atropos_hpc.policy.store import PolicyStore, Superseded  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir  # noqa: E402


class Weights:
    """In the place of a backend, which publishing asks for its module only."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.module: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        fully_shard(self.module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def weights(self) -> dict[str, torch.Tensor] | None:
        return None

    def step(self, seed: int, share: float = 0.03) -> dict[str, torch.Tensor]:
        """Move some weights on; returns all of them, whole, in bfloat16."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.module.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.mul_(torch.where(torch.rand_like(local) < share, 1.01, 1.0))
            return {
                name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
                .bfloat16()
                .clone()
                for name, tensor in self.module.state_dict().items()
            }


def until(look: Callable[[], Any], seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def newest_of(publishing: Publisher, version: int) -> PolicyVersion | None:
    """The newest version, if it is that one."""
    newest = publishing.store.latest()
    return newest if newest is not None and newest.version == version else None


def held(newest: LoadableVersion | None) -> dict[str, torch.Tensor]:
    assert newest is not None
    return stored(newest.directory)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() - {"lm_head.weight"} and all(
        torch.equal(got[name], want[name]) for name in got
    )


def follow(root: Path, cache: Path, complaints: list[RepublishRequest]) -> Follower:
    cache.mkdir(exist_ok=True)
    return Follower(
        PolicyStore(root),
        cache,
        "reader",
        lambda version, why: complaints.append(RepublishRequest(version=version, why=why)),
    )


def deltas_published(rank: int, world: int, path: Path, root: Path, cache: Path) -> Any:
    backend = Weights(path)
    publishing = Publisher(root, PolicyConf(sync="delta", anchor_every=5), "bfloat16")
    followers = [follow(root, cache / name, []) for name in ("each", "some")] if rank == 0 else []
    kinds, taken = [], 0
    for version in range(13):
        state = backend.step(100 * version + rank, share=0.9 if version == 8 else 0.03)
        publishing.publish(backend, version)  # type: ignore[arg-type]
        publishing.wait()
        assert publishing.newest == version
        dist.barrier()
        if rank == 0:
            latest = publishing.store.latest()
            assert latest is not None
            directory = publishing.store.directory(latest)
            manifest = verify(directory)
            there = {file.name for file in directory.iterdir()}
            assert {file.file for file in manifest.stored_files} <= there
            kinds.append(
                manifest.kind[0].upper()
                if not manifest.deltas
                else {"delta": "d", "full": "B"}[manifest.kind]
            )
            for follower in followers[: 1 if version % 3 else 2]:
                assert equal(held(follower.poll()), state)
                taken += 1
        dist.barrier()
    for follower in followers:
        follower.close()
    return "".join(kinds), taken


@pytest.mark.parametrize("world", [1, 2])
def test_deltas_are_bit_exact_with_anchors_and_full_versions_where_much_has_changed(
    tmp_path: Path, world: int
) -> None:
    (tmp_path / "memory").mkdir()
    run = RunDir(tmp_path / "run")
    run.create()
    model = tiny_model(tmp_path / "model", tied=True)
    (kinds, taken), *_ = on_ranks(world, deltas_published, model, run.policy, tmp_path / "memory")
    assert (
        kinds == "FddddBddFdddd"
    )  # an anchor, with a delta beside it, after five; the ninth has changed too much for one
    assert taken == 13 + 5


def full_disk(rank: int, world: int, path: Path, root: Path) -> Any:
    intervals = Intervals(retry=0.1, poll=0.1)
    alarms: list[str | None] = []
    conf = PolicyConf(keep=1)
    backend, publishing = (
        Weights(path),
        Publisher(root, conf, "bfloat16", ReaderLink(show_alarm=alarms.append), intervals),
    )
    backend.step(rank)
    publishing.publish(backend, 0)  # type: ignore[arg-type]
    publishing.wait()
    conf.max_bytes = 1000
    for version in (1, 2):  # training goes on
        state = backend.step(version)
        publishing.publish(backend, version)  # type: ignore[arg-type]
    dist.barrier()
    if rank == 0:
        until(lambda: alarms and "policy.max_bytes is 1000" in str(alarms[-1]))
        assert sorted(name for name in os.listdir(root) if name[0].isdigit()) == ["0-1"]
    dist.barrier()
    assert publishing.newest == 0
    conf.max_bytes = None
    if rank == 0:  # there is room again: it is tried again without a next version
        latest = until(lambda: newest_of(publishing, 2))
        assert equal(stored(publishing.store.directory(latest)), state)
        until(lambda: alarms[-1] is None)
    publishing.wait()
    assert publishing.newest == 2


def test_a_full_disk_pauses_publishing_with_an_alarm_and_training_goes_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    on_ranks(2, full_disk, tiny_model(tmp_path / "model", tied=True), run.policy)
    latest = PolicyStore(run.policy).latest()
    assert latest is not None and latest.version == 2


def published_again(rank: int, world: int, path: Path, root: Path, cache: Path) -> Any:
    complaints: list[RepublishRequest] = []

    def take() -> RepublishRequest | None:
        request = complaints[-1] if complaints else None
        complaints.clear()
        return request

    backend, publishing = (
        Weights(path),
        Publisher(
            root, PolicyConf(sync="delta"), "bfloat16", ReaderLink(take), Intervals(poll=0.05)
        ),
    )
    follower = follow(root, cache, complaints) if rank == 0 else None
    for version in range(3):
        state = backend.step(version)
        publishing.publish(backend, version)  # type: ignore[arg-type]
        if rank == 0:
            assert follower is not None
            latest = until(lambda number=version: newest_of(publishing, number))
            if version == 2:
                directory = publishing.store.directory(latest)
                assert read_manifest(directory).kind == "delta"
                for file in directory.glob("*.delta"):
                    file.write_bytes(file.read_bytes()[:-1])
            for _ in range(
                100
            ):  # complained of after the second look, published again within a moment
                follower._retry_at = 0
                if (newest := follower.poll()) is not None and newest.version == latest:
                    break
                time.sleep(0.1)
            assert equal(held(newest), state)
        dist.barrier()
    if rank == 0:
        assert read_manifest(directory).kind == "full"
    state = backend.step(9)  # and the next delta starts from there
    publishing.publish(backend, 3)  # type: ignore[arg-type]
    publishing.wait()
    if rank == 0 and follower is not None:
        assert equal(held(follower.poll()), state)
        follower.close()
        PolicyStore(root).claim_attempt()  # somebody starts the run a second time
    dist.barrier()
    publishing.publish(backend, 4)  # type: ignore[arg-type]
    with pytest.raises(Superseded):
        publishing.wait()


def test_a_damaged_version_is_published_again_and_a_superseded_learner_stops(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    on_ranks(
        2,
        published_again,
        tiny_model(tmp_path / "model", tied=True),
        run.policy,
        tmp_path / "memory",
    )
    latest = PolicyStore(run.policy).latest()
    assert (
        latest is not None and latest.version == 3
    )  # what the superseded learner made after it is not public
    shutil.rmtree(tmp_path / "memory")


def released(rank: int, world: int, path: Path, root: Path) -> Any:
    conf = PolicyConf()
    intervals = Intervals(retry=0.1, poll=0.05)
    publishing = Publisher(root, conf, "bfloat16", intervals=intervals, released_bytes=0)
    backend, held = Weights(path), []
    for version in range(3):
        conf.max_bytes = 1000 if version == 1 else None
        state = backend.step(version)
        publishing.publish(backend, version)  # type: ignore[arg-type]
        publishing.release()
        held.append((publishing.newest, publishing.writer.shard.size > 1 << 16))
    latest = publishing.store.latest()
    assert latest is not None and equal(stored(publishing.store.directory(latest)), state)
    PolicyStore(root).claim_attempt()  # somebody starts the run a second time
    publishing.publish(backend, 3)  # type: ignore[arg-type]
    publishing.release()  # does not wait for what has failed
    with pytest.raises(Superseded):
        publishing.wait()
    return held


def test_a_single_rank_frees_its_copy_of_a_version_that_is_public(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    (held,) = on_ranks(1, released, tiny_model(tmp_path / "model", tied=True), run.policy)
    # the second one found no space: it is kept for the next attempt
    assert held == [(0, False), (0, True), (2, False)]
