"""Training in Slurm jobs with the real parts, vLLM, verl and an Atropos environment, on a private cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import ROOT, Cluster, until
from slurm_parts import Submitted, require_slurm, sbatch, submit

from atropos_hpc.run_dir import read_json, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.verl, pytest.mark.run, pytest.mark.timeout(900)]

SMALL = ["evaluation.every=0", "evaluation.before=false", "evaluation.after=false", "cluster.shared=[/]", "roles.rollout.cpus_per_task=4"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=3) as cluster:
        yield cluster


def test_a_sweep_over_the_kl_coefficient(cluster: Cluster, tmp_path: Path) -> None:
    """Three points, one trainer node with two ranks and one rollout node each, one at a time."""
    sweep = tmp_path / "sweep"
    overrides = ["algorithm.kl_coef=0,0.001,0.01", "hydra.launcher.slots=1", "roles.trainer.ranks_per_node=2", "trainer.steps=4",
                 "evaluation.after=true", "environment.config.eval_problems=100", *SMALL[:2], *SMALL[3:]]  # fmt: skip
    submit(cluster, sweep, *overrides)
    rows = json.loads((sweep / "jobs.json").read_text())
    points = [Submitted(cluster, Path(row["run_dir"]), row["job"]) for row in rows]
    assert len(points) == 3
    for point in points:
        point.completes(4, seconds=400)
        assert point.log("trainer-0") and point.log("trainer-1") and point.log("server-0-0")
    command = [str(Path(sys.executable).with_name("atropos-hpc")), "report", str(sweep), "--json"]
    report = json.loads(subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=True).stdout)
    assert [(row["state"], row["step"]) for row in report] == [("complete", 4)] * 3
    assert all(0 <= row["accuracy"] <= 1 and row["kl"] is not None for row in report)
    assert [row["accuracy"] for row in report if row["best"]] == [max(row["accuracy"] for row in report)]


def test_a_template_over_two_trainer_nodes_preempted_in_the_middle(cluster: Cluster, tmp_path: Path) -> None:
    template = (ROOT / "slurm" / "het_grpo.sbatch").read_text()
    (tmp_path / "two.sbatch").write_text(template.replace("#SBATCH --nodes=1", "#SBATCH --nodes=2", 1))
    overrides = [f"run_dir={tmp_path / 'run'}", "trainer.steps=14", "trainer.checkpoint_every=100", *SMALL]
    run = Submitted(cluster, tmp_path / "run", sbatch(cluster, tmp_path, str(tmp_path / "two.sbatch"), *overrides))
    run.reach(4, seconds=300)
    important = cluster.command("sbatch", "--parsable", "-p", "high", "--nodes=3", "--exclusive", "--wrap", "sleep 1")
    until("the preemption", lambda: run.state() == "PENDING", 60, run.story)
    saved = read_json(run.run.checkpoints / "latest.json")["step"]
    assert saved == run.steps()[-1] >= 4, run.story()
    until("the end of the important job", lambda: cluster.jobs()[important] == "COMPLETED", 90, cluster.story)
    cluster.skip_requeue_delay(run.job)
    run.completes(14, attempts=2, seconds=400)
    assert f"starts at step {saved}" in run.log("trainer-0") and f"starts at step {saved}" in run.log("trainer-1")
    assert cluster.job(run.job)["Restarts"] == "1"
    assert sum(line["sequences"] for line in read_lines(run.run.metrics)) == 14 * 256  # each batch once
