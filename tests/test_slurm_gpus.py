"""GPUs of a job on a private cluster, whose nodes have four device files each."""

import re
from collections import Counter
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_parts import stand_in, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 3
PRINTED = re.compile(r"^(\w+ \d+) on (\w+) uses GPUs (\S*)$", re.M)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([], id="het"),
        pytest.param(["launch=single", "roles.trainer.gpus_per_node=4"], id="single"),
        pytest.param(["roles.trainer.srun=['--gpus-per-task=1']"], id="per task"),
        pytest.param(
            [
                "roles.trainer.setup=['export CUDA_VISIBLE_DEVICES=MIG-1,MIG-2,MIG-3']",
                "roles.rollout.setup=['export CUDA_VISIBLE_DEVICES=GPU-1,GPU-2,GPU-3,GPU-4']",
            ],
            id="instances and UUIDs",
        ),
    ],
)
def test_each_rank_and_server_has_gpus_of_its_own(
    cluster: Cluster, tmp_path: Path, changes: list[str]
) -> None:
    run = submitted(
        cluster,
        tmp_path / "run",
        "trainer.steps=2",
        "roles.trainer.gpus_per_node=3",
        "roles.trainer.ranks_per_node=3",
        "roles.rollout.nodes=2",
        "roles.rollout.gpus_per_node=4",
        "rollout.servers=2",
        "rollout.tensor_parallel=2",
        *stand_in(tmp_path),
        *changes,
    )
    run.completes(2)
    names = [f"trainer-{rank}" for rank in range(3)] + ["agent-0", "agent-1"]
    printed = [found for name in names for found in PRINTED.findall(run.log(name))]
    by_process = {(who, node): gpus.split(",") for who, node, gpus in printed}
    assert len(by_process) == 3 + 2 * 2, run.story()
    assert Counter(len(gpus) for gpus in by_process.values()) == {1: 3, 2: 4}
    used = [(node, gpu) for (_, node), gpus in by_process.items() for gpu in gpus]
    assert len(set(used)) == len(used) == 3 + 2 * 4
