"""Which process computes on which CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_hpc.config import Config
from atropos_hpc.launch.steps import local_steps
from atropos_hpc.rollout import vllm_server
from atropos_hpc.runtime import cores


@pytest.mark.parametrize(("cpus", "parts"), [(8, 3), (8, 8), (2, 1), (64, 7)])
def test_processes_of_a_kind_have_disjoint_cpus_that_use_all(cpus: int, parts: int) -> None:
    divided = [cores.part(range(cpus), index, parts) for index in range(parts)]
    assert sorted(cpu for own in divided for cpu in own) == list(range(cpus))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1


def test_more_processes_than_cpus_have_one_each() -> None:
    assert [cores.part([4, 6], index, 5) for index in range(5)] == [[4], [6], [4], [6], [4]]


def test_a_process_stays_on_the_cpus_that_it_was_given() -> None:
    last = max(os.sched_getaffinity(0))
    program = "import os; from atropos_hpc.runtime import cores; print(cores.bind());" + (
        "print(*os.sched_getaffinity(0))"
    )
    variables = {**os.environ, cores.CPUS: str(last), cores.THREADS: "1"}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, env=variables, text=True, capture_output=True, check=True).stdout
    assert said.splitlines() == [f"1 threads on CPUs {last}", str(last)]


def test_the_ranks_of_a_machine_divide_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cores.THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    config = Config(run_dir="/run")
    config.roles.trainer.ranks_per_node = 2
    ranks = local_steps(config, Path("/run"))[-1].processes
    assert [rank.variables[cores.CPUS] for rank in ranks] == ["0,1,2", "3,4,5"]
    assert [rank.variables[cores.THREADS] for rank in ranks] == ["3", "3"]
    monkeypatch.setenv(cores.THREADS, "1")  # of the user's shell
    assert cores.THREADS not in local_steps(config, Path("/run"))[-1].processes[0].variables
    assert "has 3 threads" in cores.describe(config)


def test_threads_of_a_server_do_not_spin_on_cpus_that_are_shared() -> None:
    config = Config(run_dir="/run")
    config.rollout.variables = {"OMP_NUM_THREADS": "5"}
    found = vllm_server.variables(config.rollout, config.model, gpus=False)
    assert found.items() >= {**cores.PASSIVE_WAITING, "OMP_NUM_THREADS": "5"}.items()
    assert "has" in cores.describe(config) and " 5;" in cores.describe(config)


@pytest.mark.parametrize(
    ("flags", "dtype", "gpus", "warned"),
    [
        ("fpu avx512f amx_tile", "bfloat16", 0, True),
        ("fpu avx512f avx512_bf16", "bfloat16", 0, False),
        ("fpu avx512f", "float32", 0, False),
        ("fpu avx512f", "bfloat16", 8, False),
    ],
)
def test_a_cpu_that_only_emulates_bfloat16_is_named(
    flags: str,
    dtype: str,
    gpus: int,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (info := tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cores, "CPUINFO", info)
    config = Config(run_dir="/run")
    config.model.dtype = dtype
    config.roles.trainer.gpus_per_node = config.roles.rollout.gpus_per_node = gpus
    found = cores.slow_dtype(config)
    assert (found is not None) == warned
    assert found is None or found.key == "model.dtype"
