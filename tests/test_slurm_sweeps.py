"""A sweep on a private cluster: submitted again, interrupted, stopped, resumed, looked at.

Most cases need no node, so the nodes are drained until a case wants one.
"""

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import ROOT, Cluster, until
from slurm_parts import Submitted, sbatch, stand_in, submission, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
NODES = 4


@pytest.fixture
def drained(whole_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with an empty queue and nodes that take no job until they are resumed."""
    whole_cluster.command("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    yield whole_cluster
    whole_cluster.command("scancel", "-u", getpass.getuser())
    with contextlib.suppress(RuntimeError):  # a test has resumed them
        whole_cluster.command("scontrol", "update", "nodename=ALL", "state=resume")
    whole_cluster.clear()


def table(sweep: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((sweep / "jobs.json").read_text())
    return rows


def queued(cluster: Cluster) -> list[str]:
    """The jobs in the queue, by their leaders."""
    pending = [job for job, state in cluster.jobs().items() if state == "PENDING"]
    return [job.removesuffix("+0") for job in pending if not job.endswith("+1")]


def wrapped_sbatch(directory: Path, lines: str) -> str:
    """A PATH whose sbatch runs these shell lines first. $count: how often it was called."""
    bin_dir = directory / "bin"
    bin_dir.mkdir()
    (bin_dir / "sbatch").write_text(
        f'#!/bin/bash\ncase "$*" in *--test-only*) exec /usr/bin/sbatch "$@";; esac\n'
        f"echo >>{directory}/calls; count=$(wc -l <{directory}/calls)\n{lines}\n"
        'exec /usr/bin/sbatch "$@"\n'
    )
    (bin_dir / "sbatch").chmod(0o755)
    return f"{bin_dir}:{os.environ['PATH']}:/usr/sbin"


def test_a_sweep_submitted_again_queues_only_what_is_neither_live_nor_complete(
    drained: Cluster, tmp_path: Path
) -> None:
    cluster, sweep, usual = drained, tmp_path / "sweep", ["trainer.steps=3", *stand_in(tmp_path)]
    submit(cluster, sweep, "seed=0,1", *usual)
    first = table(sweep)
    again = submit(cluster, sweep, "seed=0,1", *usual)
    assert f"point 1 is queued (job {first[1]['job']})" in again.stdout and table(sweep) == first

    other = submit(cluster, sweep, "seed=5,6", *usual, check=False)
    assert other.returncode == 2 and "seed: is 5, but" in other.stderr, other.stderr
    assert table(sweep) == first and len(queued(cluster)) == 2

    cluster.command("scancel", first[0]["job"])
    submit(cluster, sweep, "seed=0,1,2", *usual)  # one more, and the cancelled one
    rows = table(sweep)
    assert rows[1] == first[1] and rows[0]["job"] != first[0]["job"] and len(rows) == 3
    assert len(queued(cluster)) == 3

    cluster.command("scontrol", "update", "nodename=ALL", "state=resume")
    for row in rows:
        Submitted(cluster, Path(row["run_dir"]), row["job"]).completes(3)
    done = submit(cluster, sweep, "seed=2,1", *usual)  # in another order
    assert "point 2 is complete" in done.stdout and "point 1 is complete" in done.stdout
    assert table(sweep) == rows and queued(cluster) == []


def test_a_partial_submission_is_completed_by_the_same_command(
    drained: Cluster, tmp_path: Path
) -> None:
    cluster, sweep = drained, tmp_path / "sweep"
    command = submission(sweep, "seed=0,1,2", *stand_in(tmp_path))
    refusal = 'if [ "$count" -ge 2 ]; then echo "sbatch: error: no more jobs" >&2; exit 1; fi'
    env = {**cluster.env, "PATH": wrapped_sbatch(tmp_path, refusal)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr.count("no more jobs") == 1, done.stderr
    assert "1 of 3 points were queued. Not submitted: point 1, 2." in done.stderr
    submit(cluster, sweep, "seed=0,1,2", *stand_in(tmp_path))
    assert len(table(sweep)) == 3 == len(queued(cluster))


def test_a_lost_answer_of_sbatch_makes_no_second_job(drained: Cluster, tmp_path: Path) -> None:
    cluster, sweep = drained, tmp_path / "sweep"
    timeout = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    lines = (
        f'if [ "$count" = 1 ]; then /usr/bin/sbatch "$@" >/dev/null; echo "{timeout}" >&2; exit 1\n'
        f'elif [ "$count" = 2 ]; then echo "{timeout}" >&2; exit 1; fi'
    )
    env = {**cluster.env, "PATH": wrapped_sbatch(tmp_path, lines)}
    subprocess.run(
        submission(sweep, "seed=0,1", *stand_in(tmp_path)),
        env=env,
        capture_output=True,
        timeout=100,
        check=True,
        cwd=tmp_path,
    )
    assert sorted(row["job"] for row in table(sweep)) == sorted(queued(cluster))
    assert len(queued(cluster)) == 2 and (tmp_path / "calls").read_text().count("\n") == 3


def test_ctrl_c_while_submitting_says_what_is_queued(drained: Cluster, tmp_path: Path) -> None:
    cluster, sweep = drained, tmp_path / "sweep"
    env = {**cluster.env, "PATH": wrapped_sbatch(tmp_path, "sleep 1")}
    with subprocess.Popen(
        submission(sweep, "seed=0,1,2", *stand_in(tmp_path)),
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as submitting:
        until("the first sbatch", (tmp_path / "calls").exists, 60)
        os.killpg(submitting.pid, signal.SIGINT)  # as a terminal does: sbatch gets it, too
        said = submitting.communicate(timeout=60)[1]
    assert submitting.returncode == 130 and "1 of 3 points were queued" in said, said
    assert "Traceback" not in said and [row["job"] for row in table(sweep)] == queued(cluster)


def tool(cluster: Cluster, *words: str | Path, code: int = 0) -> str:
    """What a command says on the cluster's login node."""
    command = [sys.executable, "-m", "atropos_hpc.cli", *map(str, words)]
    done = subprocess.run(
        command, env=cluster.env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_queued_points_are_seen_cancelled_and_resumed_once_in_their_slots(
    drained: Cluster, tmp_path: Path
) -> None:
    cluster, sweep = drained, tmp_path / "sweep"
    submit(cluster, sweep, "seed=0,1", "hydra.launcher.slots=1", *stand_in(tmp_path))
    first = table(sweep)
    assert json.loads(tool(cluster, "status", sweep / "1", "--json"))["state"] == "queued"
    assert "has written no log yet" in tool(cluster, "logs", sweep / "1")
    assert "is already queued" in tool(cluster, "resume", sweep / "1", code=2)
    assert f"cancelled: job {first[1]['job']}" in tool(cluster, "stop", sweep / "1")
    assert json.loads(tool(cluster, "status", sweep / "1", "--json"))["state"] == "cancelled"

    said = tool(cluster, "resume", sweep)
    assert f"point 0 is queued (job {first[0]['job']})" in said and len(queued(cluster)) == 2
    assert "is already queued" in tool(cluster, "resume", sweep / "1", code=2)
    tool(cluster, "resume", sweep)
    assert len(queued(cluster)) == 2
    assert [row["slot"] for row in table(sweep)] == [row["slot"] for row in first]
    names = {cluster.job(job)["JobName"] for job in queued(cluster)}
    assert names == {first[0]["slot"]}
    assert tool(cluster, "stop", sweep).count("cancelled: job") == 2 and queued(cluster) == []
    assert "nothing runs" in tool(cluster, "stop", sweep, code=1)


def test_a_point_that_failed_before_its_run_began_shows_its_jobs_log(
    drained: Cluster, tmp_path: Path
) -> None:
    cluster, sweep = drained, tmp_path / "sweep"
    submit(cluster, sweep, "seed=0", "trainer.steps=3", *stand_in(tmp_path))
    (tmp_path / "model").rename(tmp_path / "away")
    cluster.command("scontrol", "update", "nodename=ALL", "state=resume")
    job = table(sweep)[0]["job"]
    until("the end", lambda: cluster.job(job)["JobState"] == "FAILED", 60, cluster.story)
    for command in ("status", "logs"):
        for place in (sweep / "0", sweep):
            said = tool(cluster, command, place)
            shown = "model.path: there is no" in said
            assert shown or (command == "status" and "ended before the run began" in said), said
    (tmp_path / "away").rename(tmp_path / "model")
    tool(cluster, "resume", sweep)
    Submitted(cluster, sweep / "0", table(sweep)[0]["job"]).completes(3)


def test_the_job_of_a_persons_script_is_not_resumed_without_it(
    drained: Cluster, tmp_path: Path
) -> None:
    cluster, run_dir = drained, tmp_path / "run"
    script = tmp_path / "edited.sbatch"
    script.write_text((ROOT / "slurm" / "het_grpo.sbatch").read_text())
    cluster.command("scontrol", "update", "nodename=ALL", "state=resume")
    overrides = [f"run_dir={run_dir}", "trainer.steps=2000", *stand_in(tmp_path)]
    options = ("--mem=1G", "--cpus-per-task=1")
    job = sbatch(cluster, tmp_path, str(script), *overrides, options=options)
    run = Submitted(cluster, run_dir, job)
    run.reach(2)
    tool(cluster, "stop", run_dir)
    run.ends("FAILED")
    said = tool(cluster, "resume", run_dir, code=2)
    assert f"sbatch {script}" in said and f"run_dir={run_dir}" in said
    assert queued(cluster) == []
