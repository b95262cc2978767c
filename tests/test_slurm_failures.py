"""Processes and nodes of a run in a Slurm job die: it goes on, or is requeued and resumes."""

import os
import signal
from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import kill, node_of, stand_in, submitted

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 5


def test_a_killed_rank_restarts_the_trainer_inside_the_same_allocation(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "trainer.steps=30",
        "roles.trainer.ranks_per_node=2",
        *stand_in(tmp_path),
    )
    run.reach(12)
    kill(run.member("trainer")["pid"])
    run.completes(30)
    assert "starts at step 10" in run.log("trainer-0") and cluster.job(run.job)["Restarts"] == "0"
    assert "start it again" in run.log("supervisor")


def test_a_killed_agent_is_started_again_and_the_trainer_is_not_touched(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=40", *stand_in(tmp_path))
    run.reach(5)
    kill(run.member("agent")["pid"])
    run.completes(40)
    assert (
        run.log("agent-0").count("agent 0 on") == 2
        and run.log("trainer-0").count("starts at step") == 1
    )


@pytest.mark.parametrize("role", ["trainer", "rollout"])
def test_one_node_per_role_and_any_dies_slurm_requeues_and_the_run_resumes(
    cluster: Cluster, tmp_path: Path, role: str
) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=200", *stand_in(tmp_path))
    run.reach(12)
    cluster.kill_node(node_of(run, role))
    run.is_requeued(90)
    run.reach(30)
    assert run.steps() == list(range(1, len(run.steps()) + 1)) and "starts at step" in run.log(
        "trainer-0"
    )
    cluster.command("scancel", run.job)
    run.leaves_nothing()


@pytest.mark.parametrize("agents", ["live", "are asked to end"])
def test_the_leaders_node_dies_where_slurm_lets_the_rest_live_and_an_agent_requeues(
    cluster: Cluster, tmp_path: Path, agents: str
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "trainer.steps=400",
        "roles.trainer.nodes=2",
        "roles.rollout.nodes=2",
        *stand_in(tmp_path),
    )
    run.reach(12)
    pids = [
        member["pid"]
        for member in read_json(run.run.roster)["members"].values()
        if member["kind"] == "agent"
    ]
    cluster.kill_node(node_of(run, "trainer"))
    for pid in (
        pids if agents == "are asked to end" else ()
    ):  # by whatever ends a step whose srun is gone
        os.kill(pid, signal.SIGTERM)
    run.is_requeued(120)
    at = len(run.steps())
    run.reach(at + 3)
    assert run.steps() == list(range(1, len(run.steps()) + 1))
    cluster.command("scancel", run.job)
    run.leaves_nothing()


def test_a_lost_rollout_node_is_dropped_where_slurm_lets_the_job_live(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "trainer.steps=250",
        "roles.trainer.nodes=2",
        "roles.rollout.nodes=2",
        *stand_in(tmp_path),
    )
    run.reach(5)
    cluster.kill_node(node_of(run, "rollout"))
    run.completes(250, seconds=180)
    assert (
        "node lost" in run.log("supervisor") and run.log("trainer-0").count("starts at step") == 1
    )
    assert cluster.job(run.job)["Restarts"] == "0"


def test_a_split_run_goes_on_without_a_rollout_node_and_takes_it_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    apart = ["+roles.trainer.sbatch.exclusive=true", "+roles.rollout.sbatch.exclusive=true"]
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "launch=split",
        "trainer.steps=500",
        "roles.rollout.nodes=2",
        *apart,
        *stand_in(tmp_path),
    )
    run.reach(3)
    until("both agents", lambda: run.log("agent-0") and run.log("agent-1"), 30, run.story)
    node = run.log("agent-1").split(" on ")[1].split()[0]
    others = {node_of(run, "trainer"), run.log("agent-0").split(" on ")[1].split()[0]}
    assert node not in others
    cluster.kill_node(node)
    at = len(run.steps())
    run.reach(at + 20)  # it goes on
    until(
        "the node's agent again", lambda: run.log("agent-1").count("agent 1 on") == 2, 90, run.story
    )
    assert (
        run.log("trainer-0").count("starts at step") == 1
        and cluster.job(run.job)["Restarts"] == "0"
    )
    cluster.command("scancel", run.job)
    run.leaves_nothing()


@pytest.mark.parametrize("why", ["warned", "preempted without grace"])
def test_a_requeued_split_leader_finds_its_rollout_job_again(
    cluster: Cluster, tmp_path: Path, why: str
) -> None:
    trainer = [
        "roles.trainer.partition=sudden",
        "+roles.trainer.sbatch.nodelist=n0",
        "+roles.rollout.sbatch.nodelist=n1",
    ]
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "launch=split",
        "trainer.steps=60",
        *trainer,
        *stand_in(tmp_path),
    )
    run.reach(7)
    rollout = read_json(run.run.path / "rollout_job.json")["job"]
    if why == "warned":
        cluster.command("scancel", "--batch", "--signal=USR2", run.job)
    else:
        cluster.command("sbatch", "-p", "high", "--nodelist=n0", "--exclusive", "--wrap", "sleep 1")
    run.is_requeued()
    run.completes(60, attempts=2)
    assert read_json(run.run.path / "rollout_job.json")["job"] == rollout
    assert run.log("agent-0").count("agent 0 on") == 1  # it never stopped
    assert cluster.job(run.job)["Restarts"] == "1"
