"""Which process uses which GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from atropos_hpc.config import Config
from atropos_hpc.launch import steps
from atropos_hpc.runtime import devices


@pytest.mark.parametrize(
    "visible",
    [
        "0,1,2,3",
        "4,5,6,7",
        "GPU-aa,GPU-bb,GPU-cc,GPU-dd",
        "MIG-11,MIG-22,MIG-33,MIG-44",
        " 2, 0 ,3,1",
    ],
)
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_servers_of_a_node_partition_its_visible_devices(
    visible: str, tensor_parallel: int
) -> None:
    listed = devices.visible_devices({devices.VISIBLE: visible}, 8)
    servers = 4 // tensor_parallel
    given = [devices.server_devices(listed, i, tensor_parallel) for i in range(servers)]
    assert [device for own in given for device in own] == listed
    assert all(len(own) == tensor_parallel for own in given)


def test_a_server_without_enough_devices_is_refused_with_the_keys_to_change() -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.tensor_parallel.*roles\.rollout\.gpus_per_node"
    ):
        devices.server_devices(["0", "1", "2"], 1, 2)


def test_without_a_list_a_process_sees_the_whole_machine_and_with_an_empty_one_nothing() -> None:
    assert devices.visible_devices({}, 2) == ["0", "1"]
    assert devices.visible_devices({devices.VISIBLE: ""}, 2) == []


@pytest.mark.parametrize(
    ("local_rank", "count", "wanted"), [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3)]
)
def test_a_rank_that_sees_one_device_uses_it_whatever_its_number(
    local_rank: int, count: int, wanted: int
) -> None:
    assert devices.local_device(local_rank, count) == wanted


def test_a_rank_beyond_the_devices_of_its_node_is_refused() -> None:
    with pytest.raises(ValueError, match=r"roles\.trainer\.ranks_per_node"):
        devices.local_device(4, 4)


@pytest.mark.parametrize(
    ("visible", "trainer", "rollout"),
    [("0,1,2,3", "0,1", "2,3"), ("6,7", "6,7", "6,7"), ("", "", "")],
)
def test_on_one_machine_the_roles_get_devices_of_their_own_if_there_are_enough(
    visible: str, trainer: str, rollout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.VISIBLE, visible)
    config = Config(run_dir="/run")
    config.roles.trainer.gpus_per_node = config.roles.rollout.gpus_per_node = 2
    found = {
        spec.name: spec.variables[devices.VISIBLE]
        for step in steps.local_steps(config, Path("/run"))
        for spec in step.processes
        if devices.VISIBLE in spec.variables
    }
    assert found == {"agent-0": rollout, "trainer-0": trainer}


def test_a_role_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "0,1")
    for step in steps.local_steps(Config(run_dir="/run"), Path("/run")):
        for spec in step.processes:
            assert spec.variables.get(devices.VISIBLE, "") == ""


@pytest.fixture
def node(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The driver's and the kernel's files of two GPUs on two NUMA nodes."""
    gpus, pci, dev = tmp_path / "gpus", tmp_path / "pci", tmp_path / "dev"
    dev.mkdir()
    for slot, uuid, cpus, minor in (
        ("0000:17:00.0", "GPU-aa", "0-1", 0),
        ("0000:ca:00.0", "GPU-bb", "2,4", 1),
    ):
        (gpus / slot).mkdir(parents=True)
        lines = f"Model: \t\t X\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n"
        (gpus / slot / "information").write_text(lines)
        (pci / slot).mkdir(parents=True)
        (pci / slot / "local_cpulist").write_text(f"{cpus}\n")
        (dev / f"nvidia{minor}").touch()
    return gpus, pci, dev


@pytest.mark.parametrize(
    ("entries", "cpus"),
    [
        (["0"], {0, 1}),
        (["GPU-bb"], {2, 4}),
        (["1", "0"], {0, 1, 2, 4}),
        (["7"], set()),
        (["MIG-11"], set()),
        ([], set()),
    ],
)
def test_the_cpus_near_a_process_s_gpus_are_those_of_their_numa_nodes(
    node: tuple[Path, Path, Path], entries: list[str], cpus: set[int]
) -> None:
    assert devices.local_cpus(entries, *node) == cpus


def test_an_index_counts_the_gpus_that_the_job_may_use(node: tuple[Path, Path, Path]) -> None:
    (node[2] / "nvidia0").unlink()  # as the cgroup denies the GPU of another job
    assert devices.local_cpus(["0"], *node) == devices.local_cpus(["GPU-bb"], *node) == {2, 4}
    assert devices.local_cpus(["1"], *node) == set()


def test_without_a_driver_no_cpus_are_known(tmp_path: Path) -> None:
    assert devices.local_cpus(["0"], tmp_path / "none", tmp_path) == set()


@pytest.mark.verl
def test_a_role_that_asks_for_gpus_and_finds_none_is_refused_with_what_torch_found() -> None:
    program = (
        "from atropos_hpc.runtime.devices import require_gpus\n"
        "require_gpus('trainer', 0)\n"
        "require_gpus('trainer', 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    for part in ("roles.trainer.gpus_per_node=2", "torch", "driver:", devices.VISIBLE):
        assert part in last
