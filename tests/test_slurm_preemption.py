"""Preemption, warning signals and the time limit: a run saves, is requeued and resumes."""

from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import Submitted, evaluations_off, sbatch, stand_in, submitted

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 5


@pytest.mark.parametrize("partition", ["main", "sudden"])  # with a grace of 20 s, and of none
def test_a_preempted_run_is_requeued_once_and_resumes(
    cluster: Cluster, tmp_path: Path, partition: str
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "trainer.steps=60",
        f"cluster.partition={partition}",
        *stand_in(tmp_path),
    )
    run.reach(7)
    important = cluster.command(
        "sbatch", "--parsable", "-p", "high", "--nodes=5", "--exclusive", "--wrap", "sleep 3"
    )
    until("the preemption", lambda: run.state() == "PENDING", 60, run.story)
    saved = read_json(run.run.checkpoints / "latest.json")["step"]
    assert saved == run.steps()[-1] >= 7, run.story()
    until(
        "the end of the important job",
        lambda: cluster.jobs()[important] == "COMPLETED",
        90,
        cluster.story,
    )
    cluster.skip_requeue_delay(run.job)
    run.completes(60, attempts=2)
    assert (
        f"starts at step {saved}" in run.log("trainer-0")
        and cluster.job(run.job)["Restarts"] == "1"
    )


def test_a_warning_signal_saves_requeues_and_resumes(cluster: Cluster, tmp_path: Path) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=40", *stand_in(tmp_path))
    run.reach(7)
    before = read_json(run.run.run_json)["id"]
    cluster.command("scancel", "--batch", "--signal=USR2", run.job)
    run.is_requeued()
    saved = read_json(run.run.checkpoints / "latest.json")["step"]
    assert saved == run.steps()[-1]
    run.completes(40, attempts=2)
    assert read_json(run.run.run_json)["id"] == before  # and so the same W&B run
    assert read_json(run.run.path / "logs" / "attempt-0" / "attempt.json")["outcome"] == "requeue"


def test_a_job_of_a_template_requeues_itself_too(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "trainer.steps=40",
        *evaluations_off(),
        *stand_in(tmp_path),
    ]
    job = sbatch(
        cluster,
        tmp_path,
        "single_job_grpo.sbatch",
        *overrides,
        options=("--cpus-per-task=2", "--mem=1G"),
    )
    run = Submitted(cluster, tmp_path / "run", job)
    run.reach(7)
    cluster.command("scancel", "--batch", "--signal=USR2", run.job)
    run.is_requeued()
    run.completes(40, attempts=2)
    assert cluster.job(run.job)["Restarts"] == "1"


def test_the_warning_before_the_time_limit_comes_in_time(cluster: Cluster, tmp_path: Path) -> None:
    run = submitted(
        cluster, tmp_path / "sweep", "trainer.steps=400", "launch.minutes=1", *stand_in(tmp_path)
    )
    # Slurm checks time limits every minute or so, so the warning may come up to a minute early:
    # here soon after the start.
    until(
        "Slurm's warning", lambda: "Slurm takes the nodes" in run.log("supervisor"), 150, run.story
    )
    run.is_requeued()
    at = len(run.steps())
    run.reach(at + 5)
    cluster.command("scancel", run.job)
    run.leaves_nothing()
    assert run.steps() == list(range(1, len(run.steps()) + 1))


def test_requeues_without_progress_are_limited(cluster: Cluster, tmp_path: Path) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        "trainer.steps=300",
        "trainer.checkpoint_every=300",
        "launch.requeues=0",
        "launch.save_timeout_s=0.1",
        "launch.grace_s=0.1",
        *stand_in(tmp_path),
    )
    run.reach(2)
    cluster.command("scancel", "--batch", "--signal=USR2", run.job)
    run.is_requeued()
    run.ends("FAILED")
    assert "giving up" in run.log("supervisor")
    run.leaves_nothing()
