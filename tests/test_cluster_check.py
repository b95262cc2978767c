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
