"""Jobs that Slurm holds to their memory and cores by cgroup v2, where this machine allows it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cgroups import ConstrainedCluster, missing_controllers
from slurm_cluster import ROOT
from slurm_parts import require_slurm, stand_in, submitted

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing_controllers()), reason=f"no {missing_controllers()} here"),
]
EAT = "b'x' * (2 << 30)"
SHOW = "from atropos_hpc.runtime.cores import variables; print(variables(0, 1, bind=True))"


@pytest.fixture(scope="module")
def constrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConstrainedCluster]:
    require_slurm()
    with ConstrainedCluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=2) as cluster:
        yield cluster


def roles_that_run(directory: Path, module: str, code: str) -> list[str]:
    """The stand-ins, one of which runs `code` before it starts."""
    overrides = stand_in(directory)
    (directory / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *{module}*) {sys.executable} -c "{code}" || exit 1;; esac\n'
        f'exec {sys.executable} {ROOT}/tests/slurm_stand_in.py "$@"\n'
    )
    return overrides


@pytest.mark.parametrize("role,module", [("trainer", "learner"), ("rollout", "node_agent")])
def test_a_role_beyond_its_memory_ends_the_run_with_the_key_to_raise(
    role: str, module: str, constrained: ConstrainedCluster, tmp_path: Path
) -> None:
    run = submitted(
        constrained,
        tmp_path / "run",
        "launch.restarts=0",
        "roles.trainer.mem=700M",
        "roles.rollout.mem=700M",
        *roles_that_run(tmp_path, module, EAT),
    )
    run.ends("FAILED", seconds=300)
    assert f"out of memory: its job needs more roles.{role}.mem" in run.log("supervisor")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_a_process_plans_with_the_cores_of_its_step_only(constrained: ConstrainedCluster) -> None:
    step = ["srun", "--ntasks=1", "--cpus-per-task=1", "--mem=500M", sys.executable, "-c", SHOW]
    assert "'OMP_NUM_THREADS': '1'" in constrained.command(*step, timeout=300)
