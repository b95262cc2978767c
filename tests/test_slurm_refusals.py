"""Impossible and misspelt submissions, of which Slurm would leave many pending.

None is queued, and each message has the key and the limit.
"""

import subprocess
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_parts import stand_in, submit

from atropos_hpc.launch import cluster_check
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.cluster import Partition
from atropos_hpc.launch.slurm.request import Request

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(200)]
NODES = 3


@pytest.mark.parametrize(
    "override, key, says",
    [
        # what the cluster does not have
        ("cluster.partition=gpu", "cluster.partition", "there is no partition gpu; there are main"),
        ("roles.rollout.partition=hihg", "roles.rollout.partition", "did you mean high?"),
        ("cluster.partition=closed", "cluster.partition", "partition closed is not up"),
        (
            "roles.trainer.gpus_per_node=9",
            "roles.trainer.gpus_per_node",
            "9 GPUs: no node of partition main has as much; the most is 4",
        ),
        ("roles.trainer.gres=gpu:h100:2", "roles.trainer.gres", "2 h100: no node"),
        (
            "roles.rollout.mem=99G",
            "roles.rollout.mem",
            "99G: no node of partition main has as much; the most is 16000M",
        ),
        (
            "roles.trainer.cpus_per_task=32",
            "roles.trainer.cpus_per_task",
            "32 CPUs: no node of partition main has as much; the most is 16",
        ),
        (
            "roles.trainer.ranks_per_node=20",
            "roles.trainer.cpus_per_task",
            "20 CPUs (20 ranks of 1)",
        ),
        ("roles.rollout.nodes=5", "roles.rollout.nodes", "5 exceed the 3 nodes of partition main"),
        (
            "roles.rollout.nodes=9",
            "roles.rollout.nodes",
            "9 exceed the 8 that partition main allows per job",
        ),
        (
            "roles.trainer.constraint=smal",
            "roles.trainer.constraint",
            "they have fake, small; did you mean small?",
        ),
        (
            "launch.minutes=2000",
            "launch.minutes",
            "2000 exceed the 1440 that partition main allows",
        ),
        (
            "cluster.partition=physics",
            "roles.trainer.account",
            "partition physics is for physics only",
        ),
        (
            "+roles.trainer.sbatch.exclusve=true",
            "roles.trainer.sbatch.exclusve",
            "unrecognized option '--exclusve'",
        ),
        ("roles.rollout.nodes=3", "roles.rollout.nodes", "need 4 different nodes"),
        (
            "+roles.trainer.sbatch.reservation=nothing",
            "roles.trainer.sbatch.reservation",
            "equested reservation",
        ),
        # what cannot be
        ("roles.rollout.nodes=0", "roles.rollout.nodes", "must be at least 1, not 0"),
        (
            "+roles.trainer.sbatch.nodes=3",
            "roles.trainer.sbatch.nodes",
            "change roles.trainer.nodes instead",
        ),
        (
            "launch.minutes=1",
            "launch.signal_s",
            "is not less than the time limit, launch.minutes=1",
        ),
        ("launch.save_timeout_s=600", "launch.signal_s", "less than a checkpoint may take"),
        ("cluster.gpus=gres", "cluster.gpus", "--gres=gpu:{n}"),
        ("launch.allocation=hett", "launch.allocation", "did you mean het?"),
        ("roles.rollout.python=/no/python", "roles.rollout.python", "there is no /no/python"),
        ("model.path=/no/model", "model.path", "there is no /no/model"),
        # typing errors
        (
            "roles.trainer.gpu_per_node=4",
            "roles.trainer.gpu_per_node",
            "did you mean roles.trainer.gpus_per_node?",
        ),
        ("roles.traner.nodes=2", "roles.traner", "did you mean roles.trainer?"),
        ("hydra.launcher.slot=1", "slot", "hydra.launcher"),
        ("hydra/launcher=submitit_slrum", "hydra/launcher/submitit_slrum", "submitit_slurm"),
        # where the run would be
        (
            "cluster.shared=[/lustre]",
            "run_dir",
            "is not below a directory of cluster.shared: /lustre",
        ),
        ("run_dir=/proc/runs", "run_dir", "/proc/runs"),
    ],
)
def test_a_submission_that_cannot_work_is_refused(
    cluster: Cluster, tmp_path: Path, override: str, key: str, says: str
) -> None:
    usual = ["launch.signal_s=60"] if override == "launch.minutes=1" else []
    done = submit(cluster, tmp_path / "sweep", *stand_in(tmp_path), *usual, override, check=False)
    queued = cluster.jobs()
    if queued:
        cluster.clear()
    assert done.returncode == 2 and queued == {}, done.stdout + done.stderr
    assert key in done.stderr and says in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


def test_all_problems_are_reported_at_once_with_their_points(
    cluster: Cluster, tmp_path: Path
) -> None:
    wrong = ["roles.rollout.nodes=1,5", "roles.trainer.gpus_per_node=9", "launch.minutes=2000"]
    done = submit(cluster, tmp_path / "sweep", *stand_in(tmp_path), *wrong, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("  ")]
    assert len(lines) == 3 and any(
        line.startswith("  roles.rollout.nodes: ") and line.endswith("(point 1)") for line in lines
    )
    assert any(line.endswith("(point 0, 1)") for line in lines) and cluster.jobs() == {}


def test_validate_asks_the_cluster_too(cluster: Cluster, tmp_path: Path) -> None:
    import sys

    command = [
        str(Path(sys.executable).with_name("atropos-hpc")),
        "validate",
        "launch=het",
        "cluster.shared=[/]",
        f"run_dir={tmp_path / 'run'}",
    ]
    good = subprocess.run(
        [*command, *stand_in(tmp_path)],
        env=cluster.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert good.returncode == 0, good.stderr
    bad = subprocess.run(
        [*command, *stand_in(tmp_path), "cluster.partition=gpu"],
        env=cluster.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert bad.returncode == 2 and "cluster.partition: there is no partition gpu" in bad.stderr


def test_accounts_that_a_partition_refuses_are_named() -> None:
    from config_parts import composed

    config = composed("launch=het", "cluster.partition=gpu", "cluster.account=physics")
    denied = {"account": ("physics",)}
    partition = Partition("gpu", True, True, 1e9, 1e9, (), {}, denied)
    options = sbatch.options(config, "trainer")
    request = Request("roles.trainer", options)
    found = list(cluster_check._limits(60, request, partition))
    assert [str(problem) for problem in found] == [
        "roles.trainer.account: partition gpu is not for physics"
    ]


def test_het_jobs_need_the_backfill_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    from config_parts import composed

    config = composed("launch=het")
    found = list(cluster_check._scheduler(config, cluster_check.Cluster({}, "sched/builtin", 1001)))
    assert [problem.key for problem in found] == [
        "launch.allocation"
    ] and "use split or single" in found[0].message
