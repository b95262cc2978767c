"""Slurm's daemons on a node die while the processes of the run there live."""

from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import node_of, stand_in, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
NODES = 6


@pytest.mark.parametrize("nodes", [1, 2])  # with two per role, Slurm lets the rest live
def test_the_daemon_of_the_leaders_node_dies_and_the_whole_job_starts_again(
    cluster: Cluster, tmp_path: Path, nodes: int
) -> None:
    sizes = [f"roles.{role}.nodes={nodes}" for role in ("trainer", "rollout")]
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=4000", *sizes, *stand_in(tmp_path))
    run.reach(8)
    cluster.kill_daemons(node_of(run, "trainer"), of_steps=False)
    run.is_requeued(90)
    at = len(run.steps())
    run.reach(at + 3)
    assert run.steps() == list(range(1, len(run.steps()) + 1))
    assert len(list((run.run.path / "logs").glob("attempt-*"))) == 2
    cluster.command("scancel", run.job)
    run.leaves_nothing()


@pytest.mark.parametrize("allocation", ["het", "single"])
def test_all_daemons_of_a_rollout_node_die_and_its_processes_end_by_themselves(
    cluster: Cluster, tmp_path: Path, allocation: str
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        f"launch={allocation}",
        "trainer.steps=4000",
        *stand_in(tmp_path),
    )
    run.reach(8)
    node = node_of(run, "rollout")
    cluster.kill_daemons(node, of_steps=True)
    assert cluster.processes(node)
    run.is_requeued(90)
    at = len(run.steps())
    run.reach(at + 3)
    until("the end of the old agent", lambda: not cluster.processes(node), 60, run.story)
    cluster.command("scancel", run.job)
    run.leaves_nothing()
