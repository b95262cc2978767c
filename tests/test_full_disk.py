"""A resource that runs out would only show as a wait: it is refused, or named on the console."""

import errno
import fcntl
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atropos_hpc.config import Config
from atropos_hpc.contracts.members import AgentState, TrainerState, TrajectoriesState
from atropos_hpc.launch import cluster_check, storage_check
from atropos_hpc.observe.console import Console
from atropos_hpc.runtime import deadlines, sizing
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import Refused
from bench.parts.published import CONFIGS

MIB = 2**20
QWEN = CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"]
# 494 M parameters: 942 MiB in bfloat16, 5,654 MiB with float32 moments


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(run_dir=str(tmp_path / "runs" / "new"))
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    config.model.path = str(tmp_path)
    return config


def with_free(monkeypatch: pytest.MonkeyPatch, mib: int, inodes: int = 1000) -> None:
    status = SimpleNamespace(f_bavail=mib, f_frsize=MIB, f_files=1000, f_favail=inodes)
    monkeypatch.setattr(os, "statvfs", lambda path: status)


def found(config: Config) -> list[tuple[str, str]]:
    problems = storage_check.check(config, Path(config.run_dir))
    return [(problem.key, problem.message) for problem in problems]


@pytest.mark.parametrize(("mib", "fits"), [(6_500, False), (6_700, True)])
def test_a_full_disk_is_refused_with_what_is_free_and_what_is_needed(
    config: Config, monkeypatch: pytest.MonkeyPatch, mib: int, fits: bool, tmp_path: Path
) -> None:
    with_free(monkeypatch, mib)
    if fits:
        assert found(config) == []
        return
    ((key, says),) = found(config)
    assert key == "run_dir" and says.startswith(f"{tmp_path} has 6,500 MiB free")
    assert "at least 6,660 MiB: 942 for a policy version, 5,653 for a checkpoint, 64 stay" in says


def test_a_full_disk_is_refused_without_the_models_size_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.path = "some/hub-name"
    with_free(monkeypatch, 63)
    assert "has 63 MiB free, but the run needs at least 64 MiB" in found(config)[0][1]
    with_free(monkeypatch, 1000, inodes=0)
    assert [key for key, says in found(config) if "no inode" in says] == ["run_dir"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_is_as_large_as_its_weight_files(config: Config, dtype: str) -> None:
    mixture = {**QWEN, "model_type": "qwen3_moe", "num_experts": 128, "torch_dtype": dtype}
    model = Path(config.model.path or "")
    (model / "config.json").write_text(json.dumps(mixture))
    assert sizing.stored_bytes(config) == (0, 0)
    least = deadlines.save_timeout_s(config)
    for part in ("1", "2"):
        with (model / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(30 << 30)
    billions = (15 if dtype == "float32" else 30) << 30
    assert sizing.stored_bytes(config) == (2 * billions, 12 * billions)
    seconds = 2 * 14 * billions / (config.cluster.storage_gb_per_s * 1e9)
    assert deadlines.save_timeout_s(config) == least + seconds


@pytest.mark.parametrize(
    "call, number, says",
    [
        ("fsync", errno.EDQUOT, "Disk quota exceeded"),
        ("flock", errno.ENOSYS, "flock"),
        ("flock", errno.EOPNOTSUPP, "flock"),
    ],
)
def test_a_full_quota_and_a_filesystem_without_locks_are_refused_by_the_key_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, says: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl if call == "flock" else os, call, fails)
    problem = storage_check.unwritable("run_dir", tmp_path)
    assert problem is not None and problem.key == "run_dir"
    assert str(tmp_path) in problem.message and says in problem.message
    if call == "flock":
        with pytest.raises(Refused, match="run_dir: .*flock"), storage_check.locked(tmp_path / "l"):
            pass


def test_a_cache_of_created_models_that_cannot_be_written_is_refused_with_the_variable_to_set(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 6_700)
    monkeypatch.setenv("ATROPOS_HPC_CACHE", "/proc/cache")
    assert found(config) == [], "of a model with a path, nothing is created"
    config.model.path, config.model.make = None, "atropos_hpc.environments.make_base"
    ((key, says),) = found(config)
    assert key == "model.make" and "/proc" in says and "ATROPOS_HPC_CACHE" in says


def test_the_last_of_several_mounts_on_one_directory_is_the_filesystem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounts = "none / tmpfs rw\nd /scratch tmpfs rw\nfs /scratch lustre rw\nx /my\\040dir nfs rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self: mounts)
    assert cluster_check.filesystem_type(Path("/scratch/runs")) == "lustre"
    assert cluster_check.filesystem_type(Path("/my dir/run")) == "nfs"
    assert cluster_check.filesystem_type(Path("/other")) == "tmpfs"


def test_a_full_cache_and_a_store_below_one_version_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 1_800)
    config.policy.sync, config.policy.max_bytes = "delta", 1000
    config.model.lora.rank = 0
    assert {"policy.cache", "policy.max_bytes"} < {key for key, _ in found(config)}
    config.model.lora.rank = 8
    assert found(config) == [], "an adapter is small"


def test_a_full_disk_of_any_member_is_named_on_the_console_once(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    console, says = Console(run, 5), "a version needs 9 bytes, but /full has 3 left"

    def show(alarm: str | None) -> str:
        caplog.clear()
        console._next_look = 0.0
        states: list[Any] = [TrainerState, AgentState, TrajectoriesState]
        with caplog.at_level(logging.INFO, "atropos_hpc.alarm"):
            console.show({kind.__name__: kind(alarm=alarm) for kind in states})
        return caplog.text

    assert show(says).count(says) == 3
    assert says not in show(says)
    assert show(None).count("resolved") == 3


def waits_in_vain(rank: int, world: int, run: RunDir) -> str:
    from atropos_hpc.learner.collective import Collective
    from atropos_hpc.runtime.membership import Member

    collective = Collective(run, Member(run, TrainerState(rank=rank), "n0", rank))
    with pytest.raises(TimeoutError) as ended:
        collective.wait("batch 0", "the server", lambda: False, 0.1, lambda: "/full has 3 left")
    return str(ended.value)


@pytest.mark.verl
def test_a_wait_that_fails_meanwhile_a_disk_is_full_names_the_disk(run: RunDir) -> None:
    from learner_ranks import on_ranks

    assert on_ranks(1, waits_in_vain, run)[0].endswith("in vain; last: /full has 3 left")
