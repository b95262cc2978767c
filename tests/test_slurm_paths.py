"""Runs on a private cluster whose directory's name means something to Hydra, shells and Slurm."""

import stat
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_parts import stand_in, submit, submitted

from atropos_hpc.launch.slurm.sbatch import submission_environment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
NODES = 3
NASTY = """it's "so" [a,b] {c: 1} (größe) #&~=1;x"""


@pytest.mark.parametrize("launch", ["het", "split"])
def test_nasty_path_of_a_run_on_slurm_gets_its_logs_and_is_its_users_alone(
    launch: str, cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / NASTY
    run = submitted(cluster, sweep, f"launch={launch}", "trainer.steps=5", *stand_in(tmp_path))
    run.completes(5)
    logs = {path.name for path in run.run.logs.iterdir()}
    assert {"supervisor.log", "trainer-0.log", "agent-0.log"} <= logs, logs
    job_log = sweep / ".submitit" / f"{run.job}_0_log.out"
    assert job_log.stat().st_size
    for path in [job_log, *run.run.path.rglob("*")]:
        assert path.is_symlink() or not stat.S_IMODE(path.stat().st_mode) & 0o077, path


@pytest.mark.parametrize("name", ["50%", "%j", "%%", "back\\slash"])
def test_nasty_path_that_slurm_would_expand_is_refused_before_anything_is_queued(
    name: str, cluster: Cluster, tmp_path: Path
) -> None:
    before = cluster.jobs()
    done = submit(cluster, tmp_path / name, *stand_in(tmp_path), check=False)
    assert done.returncode == 2 and "run_dir: " in done.stderr, done.stderr
    assert "Slurm takes" in done.stderr and "Traceback" not in done.stderr
    assert cluster.jobs() == before and not (tmp_path / name).exists()


def test_variables_of_the_shell_change_neither_the_check_nor_the_job(
    cluster: Cluster, tmp_path: Path
) -> None:
    hostile = {"SBATCH_PARTITION": "no-such", "SBATCH_QOS": "no-such", "SQUEUE_FORMAT": "%u"}
    before = dict(cluster.env)
    cluster.env.update(hostile, SINFO_FORMAT="%u", SRUN_NTASKS="7", VLLM_API_KEY="key", RANK="3")
    try:
        run = submitted(cluster, tmp_path / "sweep", "trainer.steps=5", *stand_in(tmp_path))
        run.completes(5)
    finally:
        cluster.env.clear()
        cluster.env.update(before)
    assert not set(submission_environment(hostile))
