"""A sweep on a private cluster: submitted again, interrupted, stopped, resumed, looked at.

Most cases need no node, so the nodes are drained until a case wants one.
"""

import contextlib
import getpass
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import Submitted, require_slurm, stand_in, submission, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as cluster:
        yield cluster


@pytest.fixture
def drained(whole: Cluster) -> Iterator[Cluster]:
    """The cluster, with an empty queue and nodes that take no job until they are resumed."""
    whole.command("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    yield whole
    whole.command("scancel", "-u", getpass.getuser())
    with contextlib.suppress(RuntimeError):  # a test has resumed them
        whole.command("scontrol", "update", "nodename=ALL", "state=resume")
    whole.clear()


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
