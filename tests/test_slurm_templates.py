"""The sbatch templates, submitted by hand to a private cluster."""

from pathlib import Path

import pytest
from slurm_cluster import Cluster, until
from slurm_parts import Submitted, evaluations_off, sbatch, stand_in

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 5


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
