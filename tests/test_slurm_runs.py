"""Runs in Slurm jobs, on a private cluster of several nodes that can be killed.

The roles' programs are stand-ins, so a case takes seconds; test_slurm_training.py does the same
with the real ones.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_files import step_metrics
from slurm_cluster import Cluster, until
from slurm_parts import (
    Submitted,
    kill,
    node_of,
    require_slurm,
    sbatch,
    stand_in,
    submission,
    submit,
    submitted,
)

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=5) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole: Cluster) -> Iterator[Cluster]:
    """The cluster, with all nodes up and an empty queue."""
    yield whole
    whole.clear()


# --- a sweep


def test_a_sweep_is_one_het_job_per_point_one_after_the_other(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    overrides = [
        "algorithm.kl_coef=0,0.001,0.01",
        "trainer.steps=8",
        "hydra.launcher.slots=1",
        "roles.trainer.ranks_per_node=2",
        *stand_in(tmp_path),
    ]
    dry = submit(cluster, sweep, *overrides, "launch.dry_run=true")
    assert cluster.jobs() == {} and not sweep.exists()
    assert "3 jobs" in dry.stdout and dry.stdout.count("#SBATCH hetjob") == 3

    done = submit(cluster, sweep, *overrides)
    rows = json.loads((sweep / "jobs.json").read_text())
    assert [row["num"] for row in rows] == [0, 1, 2] and len({row["run_dir"] for row in rows}) == 3
    assert all(row["job"] in done.stdout and row["run_dir"] in done.stdout for row in rows)
    for row in rows:  # what was printed is what was handed to sbatch
        script = (sweep / ".submitit" / f"{row['job']}_submission.sh").read_text()
        assert script in dry.stdout
    points = [Submitted(cluster, Path(row["run_dir"]), row["job"]) for row in rows]
    for point in points:
        point.completes(8)
        point.said_goodbye()
    spans = [
        (lines[0].time, lines[-1].time) for lines in (step_metrics(point.run) for point in points)
    ]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    assert [point.run.config().algorithm.kl_coef for point in points] == [0, 0.001, 0.01]
    assert len({point.run.token() for point in points}) == 3
    report = subprocess.run(
        ["atropos-hpc", "report", str(sweep), "--json"],
        env=with_scripts(cluster),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(report.stdout)
    assert [(row["state"], row["step"]) for row in found] == [("complete", 8)] * 3 and sum(
        row["best"] for row in found
    ) == 1


def test_waiting_shows_progress_and_fails_when_a_point_does(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    done = submit(cluster, sweep, "trainer.steps=4,5", "launch.wait=true", *stand_in(tmp_path))
    assert "complete" in done.stderr and "step 5/5" in done.stderr
    done = submit(
        cluster,
        tmp_path / "bad",
        "trainer.steps=4,77",
        "launch.wait=true",
        "launch.restarts=0",
        *stand_in(tmp_path),
        check=False,
    )
    assert (
        done.returncode == 1 and "point 1: failed" in done.stderr and "Traceback" not in done.stderr
    )


def test_waiting_goes_on_while_slurm_starts_a_job_again(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    command = submission(sweep, "trainer.steps=40", "launch.wait=true", *stand_in(tmp_path))
    with subprocess.Popen(
        command, env=cluster.env, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as waiting:
        rows = until("the table", lambda: read_json(sweep / "jobs.json"), 60, cluster.story)
        run = Submitted(cluster, Path(rows[0]["run_dir"]), rows[0]["job"])
        run.reach(7)
        cluster.command("scancel", "--batch", "--signal=USR2", run.job)
        run.is_requeued()
        assert waiting.poll() is None
        run.completes(40, attempts=2)
        said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 0 and "queued" in said and "step 40/40" in said, said


def with_scripts(cluster: Cluster) -> dict[str, str]:
    return {**cluster.env, "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"}


# --- the templates


def test_the_het_template_with_two_trainer_nodes(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "trainer.steps=10",
        "launch.backoff_s=0.5",
        *evaluations_off(),
        *stand_in(tmp_path),
    ]
    template = (Path(__file__).parent.parent / "slurm" / "het_grpo.sbatch").read_text()
    (tmp_path / "two.sbatch").write_text(
        template.replace("#SBATCH --nodes=1", "#SBATCH --nodes=2\n#SBATCH --mem=1G", 1).replace(
            "#SBATCH --cpus-per-task=8", "#SBATCH --cpus-per-task=2\n#SBATCH --mem=1G"
        )
    )
    job = sbatch(cluster, tmp_path, str(tmp_path / "two.sbatch"), *overrides)
    run = Submitted(cluster, tmp_path / "run", job)
    run.completes(10)
    assert "rank 0 of 2 (0 of 1)" in run.log("trainer-0") and "rank 1 of 2 (0 of 1)" in run.log(
        "trainer-1"
    )


def test_the_single_job_template(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "trainer.steps=8",
        *evaluations_off(),
        *stand_in(tmp_path),
    ]
    job = sbatch(
        cluster,
        tmp_path,
        "single_job_grpo.sbatch",
        *overrides,
        options=("--nodes=3", "--cpus-per-task=2", "--mem=1G"),
    )
    run = Submitted(cluster, tmp_path / "run", job)
    run.completes(8)
    assert run.run.config().roles.rollout.nodes == 2 and run.log("agent-1")


def test_the_split_templates_meet_in_the_run_directory(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        "trainer.steps=20",
        *evaluations_off(),
        *stand_in(tmp_path),
    ]
    small = ("--cpus-per-task=1", "--mem=1G")
    rollout = sbatch(
        cluster,
        tmp_path,
        "split_rollout.sbatch",
        str(tmp_path / "run"),
        options=(*small, "--array=0-1"),
    )
    job = sbatch(cluster, tmp_path, "split_trainer.sbatch", *overrides, options=small)
    run = Submitted(cluster, tmp_path / "run", job)
    run.completes(20)
    assert "agent 0" in run.log("agent-0") and "agent 1" in run.log("agent-1")
    until(
        "the end of the rollout job",
        lambda: {s for j, s in cluster.jobs().items() if j.startswith(rollout)} == {"COMPLETED"},
        30,
        run.story,
    )


def test_the_sweep_template_submits_from_a_job(cluster: Cluster, tmp_path: Path) -> None:
    overrides = [
        "seed=0",
        "algorithm.kl_coef=0,0.1",
        "trainer.steps=3",
        "roles.trainer.mem=1G",
        "roles.rollout.mem=1G",
        "cluster.shared=[/]",
    ]
    sbatch(
        cluster,
        tmp_path,
        "sweep_kl.sbatch",
        f"run_dir={tmp_path / 'sweep'}",
        *overrides,
        *evaluations_off(),
        *stand_in(tmp_path),
        options=("--mem=1G",),
    )
    rows = until(
        "two points",
        lambda: len(found := read_json(tmp_path / "sweep" / "jobs.json")) == 2 and found,
        60,
        cluster.story,
    )
    points = [Submitted(cluster, Path(row["run_dir"]), row["job"]) for row in rows]
    for point in points:
        point.completes(3)
    assert [point.run.config().algorithm.kl_coef for point in points] == [0, 0.1]


def evaluations_off() -> list[str]:
    return ["evaluation.every=0", "evaluation.before=false", "evaluation.after=false"]


# --- signals and preemption


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


# --- what dies


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


# --- nothing is left


@pytest.mark.parametrize("allocation", ["het", "split", "single"])
def test_cancelling_the_leader_leaves_no_process(
    cluster: Cluster, tmp_path: Path, allocation: str
) -> None:
    run = submitted(
        cluster,
        tmp_path / "sweep",
        f"launch={allocation}",
        "trainer.steps=300",
        *stand_in(tmp_path),
    )
    run.reach(7)
    cluster.command("scancel", run.job)
    run.ends("CANCELLED")
    run.leaves_nothing()
    until(
        "an empty queue",
        lambda: not set(cluster.jobs().values()) & {"RUNNING", "PENDING"},
        30,
        run.story,
    )
    assert (
        read_json(run.run.checkpoints / "latest.json")["step"] == run.steps()[-1]
    )  # TERM is a wish to save


def test_cancelling_the_rollout_component_ends_the_run_and_leaves_no_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=300", *stand_in(tmp_path))
    run.reach(7)
    cluster.command("scancel", f"{run.job}+1")
    until(
        "the end",
        lambda: not set(cluster.jobs().values()) & {"RUNNING", "PENDING", "COMPLETING"},
        60,
        run.story,
    )
    run.leaves_nothing()
    assert read_json(run.run.path / "logs" / "attempt-0" / "attempt.json")["outcome"] == "stop"
    assert read_json(run.run.checkpoints / "latest.json")["step"] == run.steps()[-1]


def test_a_failed_run_leaves_no_process(cluster: Cluster, tmp_path: Path) -> None:
    run = submitted(
        cluster, tmp_path / "sweep", "trainer.steps=77", "launch.restarts=1", *stand_in(tmp_path)
    )
    run.ends("FAILED")
    run.leaves_nothing()
    assert "(crash limit)" in run.log(
        "supervisor"
    ) and "steps=77 is more than this stand-in takes" in run.log("supervisor")


def test_a_request_to_stop_ends_the_job_with_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=300", *stand_in(tmp_path))
    run.reach(7)
    subprocess.run(
        ["atropos-hpc", "stop", str(run.run.path)],
        env=with_scripts(cluster),
        check=True,
        capture_output=True,
        timeout=60,
    )
    run.ends("FAILED")  # exit code 75
    assert (
        cluster.job(run.job)["ExitCode"] == "75:0"
        and read_json(run.run.checkpoints / "latest.json")["step"] == run.steps()[-1]
    )
    run.leaves_nothing()


def test_runs_share_nodes_without_clashing(cluster: Cluster, tmp_path: Path) -> None:
    together = ["+roles.trainer.sbatch.nodelist=n0", "+roles.rollout.sbatch.nodelist=n1"]
    submit(
        cluster,
        tmp_path / "sweep",
        "seed=0,1,2",
        "trainer.steps=60",
        *together,
        *stand_in(tmp_path),
    )
    rows = json.loads((tmp_path / "sweep" / "jobs.json").read_text())
    runs = [Submitted(cluster, Path(row["run_dir"]), row["job"]) for row in rows]
    for run in runs:
        run.ends()
        assert run.steps() == list(range(1, 61)), run.story()
    for run in runs:
        run.leaves_nothing()
    spans = [(lines[0].time, lines[-1].time) for lines in (step_metrics(run.run) for run in runs)]
    assert max(start for start, _ in spans) < min(end for _, end in spans)  # all three at once
    assert all("trainer on n0; rollout on n1" in run.log("supervisor") for run in runs)
