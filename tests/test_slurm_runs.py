"""Runs in Slurm jobs on a private cluster: sweeps to their end, and no process left after any end.

The roles' programs are stand-ins, so a case takes seconds; test_slurm_training.py does the same
with the real ones.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import step_metrics
from slurm_cluster import Cluster, until
from slurm_parts import Submitted, stand_in, submission, submit, submitted

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 5


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
