"""status, report, stop and resume of runs in Slurm jobs, on a private cluster.

They combine the state of a job in Slurm with its run directory. The roles' programs are stand-ins,
so a case takes seconds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import Submitted, stand_in, submit, submitted

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 4


def tool(cluster: Cluster, *words: str) -> str:
    """The output of a command on the cluster's login node."""
    command = [sys.executable, "-m", "atropos_hpc.cli", *words]
    done = subprocess.run(
        command, env=cluster.env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(cluster: Cluster, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tool(cluster, "status", str(directory), "--json"))
    return found


def test_a_sweep_of_six_points_from_the_queue_to_the_page(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    submit(
        cluster,
        sweep,
        "algorithm.kl_coef=0,0.01,0.1",
        "seed=0,1",
        "trainer.steps=12",
        "hydra.launcher.slots=2",
        *stand_in(tmp_path),
    )
    states = lambda: [point["state"] for point in status(cluster, sweep)["points"]]  # noqa: E731
    seen: set[str] = set()
    until(
        "a point that runs beside one that waits",
        lambda: (seen.update(states()), {"running", "queued"} <= seen)[1],
        120,
        cluster.story,
    )
    until("the end of all points", lambda: states() == ["complete"] * 6, 240, cluster.story)
    table = tool(cluster, "report", str(sweep))
    assert table.count("complete  12/12") == 6
    page = (sweep / "report" / "report.html").read_text()
    assert (
        "6 points: 6 complete; compared: algorithm.kl_coef" in page
        and "algorithm.kl_coef=0" in page
    )


def test_one_run_queued_running_requeued_stopped_and_resumed(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = submitted(cluster, tmp_path / "sweep", "trainer.steps=2000", *stand_in(tmp_path))
    run.reach(6)
    found = status(cluster, run.run.path)
    assert (found["state"], found["slurm"], found["job"]) == ("running", "RUNNING", run.job)
    assert [shown["member"]["kind"] for shown in found["members"]] == [
        "supervisor",
        "trajectories",
        "trainer",
        "agent",
    ]

    cluster.command(
        "scancel", "-b", "-s", "USR2", run.job
    )  # what Slurm sends before the time limit
    until("the queue", lambda: run.state() == "PENDING", 60, run.story)
    assert status(cluster, run.run.path)["state"] == "queued"
    before = run.steps()[-1]
    cluster.skip_requeue_delay(run.job)
    run.reach(before + 3)
    found = status(cluster, run.run.path)
    assert (found["state"], found["attempts"]) == ("running", 2)

    tool(cluster, "stop", str(run.run.path))
    until(
        "the end of the job",
        lambda: status(cluster, run.run.path)["state"] == "stopped",
        90,
        run.story,
    )
    steps = run.steps()[-1]
    tool(cluster, "resume", str(run.run.path), f"trainer.steps={steps + 5}")
    row = read_json(tmp_path / "sweep" / "jobs.json")[0]
    assert row["job"] != run.job and row["run_dir"] == str(run.run.path)
    Submitted(cluster, run.run.path, row["job"]).completes(steps + 5, attempts=3)
    assert status(cluster, tmp_path / "sweep")["points"][0]["state"] == "complete"
