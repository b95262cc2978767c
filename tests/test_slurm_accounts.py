"""Accounts, QOS and limits of a cluster with slurmdbd, and a site's job_submit/lua.

What the cluster would refuse, or never start, is refused by key before anything is queued.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_accounting import AccountedCluster, missing_programs
from slurm_parts import require_slurm, stand_in, submit, submitted

from atropos_hpc.runtime.run_dir import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(200)]

LIMITS = "MaxWall=30 MaxTRESPerJob=node=2,gres/gpu=4"
ACCOUNTS = [
    "add account physics",
    "add account chemistry",
    "add account small MaxWall=20",
    f"add qos short {LIMITS} MaxSubmitJobsPerUser=4 Flags=DenyOnLimit",
    f"add qos lenient {LIMITS}",  # accepts what exceeds the limits, and never starts it
    "add qos strict Flags=DenyOnLimit",
    "add qos secret",
    "add user {user} account=physics qos=normal,short,lenient,strict",
    "add user {user} account=small qos=strict",
    "modify user {user} set defaultaccount=physics",
]
LUA = """
if job.comment == "outdated" then
    slurm.log_user("projects of 2025 have ended; see https://site.example/projects")
    return slurm.ERROR
end
"""
SHORT = ["cluster.qos=short", "launch.minutes=20"]


@pytest.fixture(scope="module")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountedCluster]:
    require_slurm()
    if missing := missing_programs():
        pytest.skip(f"needs {', '.join(missing)}; `make apt` installs them where it may")
    directory = tmp_path_factory.mktemp("slurm") / "cluster"
    with AccountedCluster(directory, 4, ACCOUNTS, LUA) as cluster:
        yield cluster


INVALID_ACCOUNT = "sbatch refuses it: Invalid account or account/partition combination specified"
INVALID_QOS = "sbatch refuses it: Invalid qos specification"


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["cluster.account=nothing"], f"cluster.account: {INVALID_ACCOUNT}"),
        (["roles.rollout.account=chemistry"], f"roles.rollout.account: {INVALID_ACCOUNT}"),
        (["cluster.qos=nothing"], f"cluster.qos: {INVALID_QOS}"),
        (["roles.trainer.qos=secret"], f"roles.trainer.qos: {INVALID_QOS}"),
        (
            [*SHORT, "launch.minutes=60"],
            "launch.minutes: 60 exceed the 30 that QOS short allows per job",
        ),
        (
            ["cluster.qos=lenient", "launch.minutes=60"],
            "launch.minutes: 60 exceed the 30 that QOS lenient allows per job",
        ),
        (
            [*SHORT, "roles.rollout.nodes=3"],
            "roles.rollout.nodes: 3 exceed the 2 that QOS short allows per job",
        ),
        (
            [*SHORT, "roles.rollout.nodes=2", "roles.rollout.gpus_per_node=3"],
            "roles.rollout.gpus_per_node: 6 GPUs exceed the 4 that QOS short allows per job",
        ),
        (
            ["cluster.account=small", "launch.minutes=60"],
            "launch.minutes: sbatch refuses it: AssocMaxWallDurationPerJobLimit; Job violates",
        ),
        (
            ["+cluster.sbatch.comment=outdated"],
            "sbatch refuses it: projects of 2025 have ended; see https://site.example/projects",
        ),
    ],
)
def test_what_accounting_forbids_is_refused_by_key_and_leaves_nothing(
    cluster: AccountedCluster, tmp_path: Path, overrides: list[str], says: str
) -> None:
    done = submit(cluster, tmp_path / "sweep", *stand_in(tmp_path), *overrides, check=False)
    assert done.returncode == 2 and "nothing was queued" in done.stderr, done.stdout + done.stderr
    assert cluster.command("squeue", "-h") == ""
    assert says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "sweep").exists()


def test_validate_names_a_limit_of_a_qos(cluster: AccountedCluster, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("atropos-hpc"))
    config = ["launch=het", "cluster.shared=[/]", f"run_dir={tmp_path / 'run'}"]
    wrong = [*SHORT, "roles.trainer.nodes=3"]
    command = [program, "validate", *config, *stand_in(tmp_path), *wrong]
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "roles.trainer.nodes: 3 exceed the 2 that QOS short allows per job" in done.stderr


def test_a_run_within_its_limits_is_charged_to_its_account(
    cluster: AccountedCluster, tmp_path: Path
) -> None:
    charged = ["trainer.steps=5", "cluster.account=physics", *SHORT]
    run = submitted(cluster, tmp_path / "sweep", *charged, *stand_in(tmp_path))
    run.completes(5)
    job = cluster.job(run.job)
    assert (job["Account"], job["QOS"]) == ("physics", "short")


def require_limits_of_het_jobs_at_submission(cluster: AccountedCluster) -> None:
    if cluster.command("sinfo", "--version").split()[-1] >= "26.05":
        pytest.skip("this Slurm accepts such heterogeneous jobs, and lets them wait")


def test_more_points_than_a_qos_lets_wait_are_named_with_sbatchs_words(
    cluster: AccountedCluster, tmp_path: Path
) -> None:
    require_limits_of_het_jobs_at_submission(cluster)
    points = [*SHORT, "trainer.steps=5", "algorithm.kl_coef=0,0.001,0.01"]
    slots = ["hydra.launcher.slots=1"]
    done = submit(cluster, tmp_path / "sweep", *points, *slots, *stand_in(tmp_path), check=False)
    assert done.returncode == 1
    assert "sbatch refused point 2 (cluster.qos): sbatch" in done.stderr
    assert "QOSMaxSubmitJobPerUserLimit; sbatch: error: Batch job submission failed" in done.stderr
    assert "2 of 3 points were queued. Not submitted: point 2." in done.stderr
    assert {row["num"] for row in read_json(tmp_path / "sweep" / "jobs.json")} == {0, 1}


def test_het_components_that_exceed_a_limit_together_are_refused_at_submission(
    cluster: AccountedCluster, tmp_path: Path
) -> None:
    """`sbatch --test-only` looks at each of them only."""
    require_limits_of_het_jobs_at_submission(cluster)
    wide = [*SHORT, "roles.rollout.nodes=2", *stand_in(tmp_path)]
    done = submit(cluster, tmp_path / "sweep", *wide, check=False)
    assert done.returncode == 1 and cluster.command("squeue", "-h") == ""
    assert "sbatch refused point 0 (cluster.qos): sbatch" in done.stderr
    assert "Job violates accounting/QOS policy" in done.stderr
