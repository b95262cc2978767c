"""What a cluster can never start, by recorded answers of sinfo and scontrol. No Slurm is needed."""

import pytest
from config_parts import composed

from atropos_hpc.launch import cluster_check
from atropos_hpc.launch.slurm.cluster import Cluster, parse_cluster

NODES = """\
main|4|16|64000|gpu:a100:2(S:0),gpu:h100:2(S:1)|a100,ib
main|2|64|256000|gpu:h100:8(S:0-1)|h100,eth
small|6|8|32000|(null)|(null)
closed|9|64|256000|(null)|(null)
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default={default}"
    " MaxNodes={most} MaxTime=1-00:00:00 MinNodes={least} LLN=NO MaxCPUsPerNode={cpus}"
    " Nodes=n[0-5] State={state} DefMemPerNode=UNLIMITED MaxMemPerNode={mem}\n"
)
USUAL = {"default": "NO", "most": 5, "least": 0, "cpus": "UNLIMITED", "mem": "UNLIMITED"}
PARTITIONS = (
    PARTITION.format(name="main", state="UP", **{**USUAL, "default": "YES"})
    + PARTITION.format(name="small", state="UP", **{**USUAL, "least": 2, "cpus": 4, "mem": 16000})
    + PARTITION.format(name="closed", state="DOWN", **USUAL)
)
SETTINGS = "MaxArraySize            = 1001\nSchedulerType           = sched/backfill\n"
RECORDED = parse_cluster(NODES, PARTITIONS, SETTINGS + "MaxMemPerNode           = 200000\n")


def found(*overrides: str, cluster: Cluster = RECORDED) -> list[str]:
    config = composed("launch=het", *overrides)
    return [str(each) for each in cluster_check.resources(config, cluster)]


@pytest.mark.parametrize(
    "overrides, key, says",
    [
        # sums over components
        ("roles.trainer.nodes=3 roles.rollout.nodes=4", "roles.rollout.nodes", "7 different nodes"),
        (
            "roles.trainer.constraint=h100 roles.rollout.constraint=h100 roles.trainer.nodes=2",
            "roles.rollout.nodes",
            "need 3 different nodes, but partition main has 2",
        ),
        ("launch=single roles.trainer.nodes=3 roles.rollout.nodes=3", "roles.rollout.nodes", "6 ("),
        (
            "launch=single roles.trainer.cpus_per_task=65",
            "roles.rollout.cpus_per_task",
            "65 CPUs: no node",
        ),
        # limits of the partition and of the cluster
        ("cluster.partition=small roles.rollout.nodes=2", "roles.trainer.nodes", "less than the 2"),
        (
            "cluster.partition=small roles.trainer.cpus_per_task=5",
            "roles.trainer.cpus_per_task",
            "5 CPUs exceed the 4 per node",
        ),
        ("cluster.partition=small roles.rollout.mem=20G", "roles.rollout.mem", "exceed the 16000M"),
        ("roles.rollout.mem=240G", "roles.rollout.mem", "245760M exceed the 200000M per node"),
        ("+cluster.sbatch.mem=240G", "roles.trainer.mem", "245760M exceed the 200000M per node"),
        # what no node has together
        ("roles.trainer.constraint='a100&eth'", "roles.trainer.constraint", "a100&eth together"),
        ("roles.trainer.constraint=h10|eht", "roles.trainer.constraint", "no node"),
        ("roles.trainer.gres='gpu:a100:2,gpu:h100:3'", "roles.trainer.gres", "3 h100: no node"),
        ("roles.trainer.gres='gpu:a100:3'", "roles.trainer.gres", "3 a100: no node"),
        ("roles.trainer.gpus_per_node=9", "roles.trainer.gpus_per_node", "9 GPUs: no node"),
        (
            "cluster.gpus='--gres=gpu:a100:{n}' roles.trainer.gpus_per_node=3",
            "roles.trainer.gpus_per_node",
            "3 a100: no node",
        ),
        # several partitions, of which none fits
        ("cluster.partition='closed,small' roles.trainer.mem=20G", "cluster.partition", "not up"),
        ("cluster.partition='main,mian'", "cluster.partition", "there is no partition mian"),
    ],
)
def test_what_can_never_start_is_refused_by_key(overrides: str, key: str, says: str) -> None:
    lines = found(*overrides.split(" "))
    assert any(line.startswith(f"{key}: ") and says in line for line in lines), lines


@pytest.mark.parametrize(
    "overrides",
    [
        "roles.trainer.nodes=2 roles.rollout.nodes=4",
        "cluster.partition='small,main' roles.trainer.mem=60G roles.trainer.cpus_per_task=16",
        "cluster.partition='main,closed'",
        "roles.trainer.constraint='a100&ib' roles.rollout.constraint='h100|v100'",
        "roles.trainer.constraint='[a100|h100]'",
        "roles.trainer.gres='gpu:a100:2,gpu:h100:2' roles.rollout.gpus_per_node=4",
        "roles.trainer.gpus_per_node=4 roles.trainer.constraint=a100",
        "launch=split roles.rollout.nodes=40",  # one task after the other
        "launch=single roles.trainer.nodes=2 roles.rollout.nodes=3",
    ],
)
def test_what_can_start_is_not_refused(overrides: str) -> None:
    assert found(*overrides.split(" ")) == []


# As `scontrol -o show assoc_mgr flags=qos` prints it (22.05), without resources of no interest
QOS_RECORDS = """\
Current Association Manager state
QOS Records
QOS=free(1) GrpJobs=N(0) GrpJobsAccrue=N(0) GrpSubmitJobs=N(0) GrpWall=N(0.00) \
GrpTRES=cpu=N(0),node=N(0),gres/gpu=N(0) GrpTRESMins=cpu=600(0) GrpTRESRunMins=cpu=N(0) \
MaxWallPJ= MaxTRESPJ= MaxTRESPN=gres/gpu=1 MaxTRESMinsPJ=gres/gpu=1 MinTRESPJ= \
Account Limits=No Accounts User Limits=No Users
QOS=perjob(2) GrpJobs=N(0) GrpSubmitJobs=N(0) GrpTRES=node=N(0) MaxWallPJ=90 \
MaxTRESPJ=node=2,gres/gpu=4 Account Limits=No Accounts User Limits=No Users
QOS=group(3) GrpJobs=5(1) GrpSubmitJobs=9(5) GrpTRES=cpu=100(1),mem=N(1),node=3(1) MaxWallPJ= \
MaxTRESPJ= Account Limits= physics={MaxJobsPA=6(1) MaxSubmitJobsPA=7(5) \
MaxTRESPA=cpu=40(1),mem=N(16000),node=N(1),gres/gpu=N(0)} User Limits= 0={MaxJobsPU=N(1) \
MaxSubmitJobsPU=N(5) MaxTRESPU=cpu=N(1),node=N(1),gres/gpu=3(0)}
QOS=one(4) GrpJobs=N(0) GrpSubmitJobs=N(0) GrpTRES=node=N(0) MaxWallPJ= MaxTRESPJ= \
Account Limits=No Accounts User Limits= 7={MaxJobsPU=1(0) MaxSubmitJobsPU=1(0)}
QOS=large(5) GrpTRES=node=9(0)
"""
OF_PARTITION = PARTITIONS.replace("PartitionName=small", "PartitionName=small QoS=group")
WITH_QOS = parse_cluster(NODES, OF_PARTITION, SETTINGS, QOS_RECORDS)
GPUS = "roles.trainer.gpus_per_node=2 roles.rollout.gpus_per_node=2"


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (
            "cluster.qos=perjob launch.minutes=91",
            "launch.minutes: 91 exceed the 90 that QOS perjob allows per job",
        ),
        (
            "cluster.qos=group roles.rollout.nodes=3",
            "roles.rollout.nodes: 4 of both roles exceed the 3 that QOS group allows at a time"
            " (GrpTRES)",
        ),
        (
            f"cluster.qos=group {GPUS}",
            "roles.rollout.gpus_per_node: 4 GPUs of both roles exceed the 3 that QOS group allows"
            " at a time (MaxTRESPU)",
        ),
        (
            "cluster.qos=group cluster.gpus='--gres=gpu:a100:{n}' launch=split " + GPUS,
            "roles.rollout.gpus_per_node: 4 GPUs of both roles exceed the 3 that QOS group allows"
            " at a time (MaxTRESPU)",
        ),
        (
            "cluster.qos=group roles.trainer.cpus_per_task=16 roles.rollout.cpus_per_task=32",
            "roles.rollout.cpus_per_task: 48 CPUs of both roles exceed the 40 that QOS group allows"
            " at a time (MaxTRESPA)",
        ),
        (
            "cluster.qos=group launch=single roles.rollout.nodes=3",
            "roles.rollout.nodes: 4 (with roles.trainer.nodes) exceed the 3 that QOS group allows"
            " at a time (GrpTRES)",
        ),
        (
            "cluster.partition=small roles.trainer.nodes=2 roles.rollout.nodes=2"
            " roles.trainer.cpus_per_task=4 roles.rollout.cpus_per_task=4",
            "roles.rollout.nodes: 4 of both roles exceed the 3 that QOS group allows at a time"
            " (GrpTRES)",
        ),
        (
            "cluster.qos=one",
            "launch.allocation: 2 jobs of both roles exceed the 1 that QOS one allows at a time"
            " (MaxJobsPU)",
        ),
    ],
)
def test_what_a_qos_never_lets_start_is_refused_by_key(overrides: str, problem: str) -> None:
    assert found(*overrides.split(" "), cluster=WITH_QOS) == [problem]


@pytest.mark.parametrize(
    "overrides",
    [
        f"cluster.qos=free {GPUS}",
        "cluster.qos=perjob roles.rollout.nodes=2",  # Slurm compares the components one by one
        "cluster.qos=group roles.rollout.nodes=2",
        "cluster.qos=group launch=split roles.rollout.nodes=9",  # one task after the other
        "cluster.qos=one launch=single",
        "roles.trainer.qos=group roles.rollout.qos=free roles.rollout.nodes=4",
        "cluster.partition=small cluster.qos=large roles.trainer.nodes=2 roles.rollout.nodes=2"
        " roles.trainer.cpus_per_task=4 roles.rollout.cpus_per_task=4",  # either may hold
    ],
)
def test_what_a_qos_lets_start_is_not_refused(overrides: str) -> None:
    assert found(*overrides.split(" "), cluster=WITH_QOS) == []
