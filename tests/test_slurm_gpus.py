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


def test_each_rank_and_server_has_gpus_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
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
    )
    run.completes(2)
    names = [f"trainer-{rank}" for rank in range(3)] + ["agent-0", "agent-1"]
    printed = [found for name in names for found in PRINTED.findall(run.log(name))]
    by_process = {(who, node): gpus.split(",") for who, node, gpus in printed}
    assert len(by_process) == 3 + 2 * 2, run.story()
    assert Counter(len(gpus) for gpus in by_process.values()) == {1: 3, 2: 4}
    used = [(node, gpu) for (_, node), gpus in by_process.items() for gpu in gpus]
    assert len(set(used)) == len(used) == 3 + 2 * 4
