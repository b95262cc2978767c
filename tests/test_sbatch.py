"""Scripts of sbatch and steps of srun, as text. No Slurm is needed."""

import subprocess
from pathlib import Path

import pytest
from config_parts import composed
from sbatch_parts import lines

from atropos_hpc.launch import hydra_api
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.launch.steps import SlurmSteps


def test_a_het_script_has_the_trainer_first_and_each_components_own_resources() -> None:
    config = composed(
        "launch=het",
        "roles.trainer.nodes=2",
        "roles.trainer.ranks_per_node=4",
        "roles.trainer.gpus_per_node=4",
        "roles.trainer.partition=a100",
        "roles.rollout.nodes=3",
        "roles.rollout.gres=gpu:l40:2",
        "roles.rollout.mem=64G",
        "cluster.partition=gpu",
        "cluster.account=me",
        "+roles.rollout.sbatch.exclude=n7",
    )
    text = sbatch.script(config, "/out/%j.log", "python -m app", "kl-1")
    trainer, rollout = lines(text)
    assert {
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--partition=a100",
        "--account=me",
        "--no-kill",
        "--job-name=kl-1",
        "--dependency=singleton",
        "--requeue",
        "--signal=B:USR2@180",
        "--time=60",
        "--output=/out/%j.log",
    } <= set(trainer)
    assert {
        "--nodes=3",
        "--ntasks-per-node=1",
        "--gres=gpu:l40:2",
        "--partition=gpu",
        "--mem=64G",
        "--exclude=n7",
        "--no-kill",
        "--job-name=kl-1.rollout",
    } <= set(rollout)
    assert "--dependency=singleton" not in rollout and not any(
        option.startswith("--gpus") for option in rollout
    )
    assert text.rstrip().splitlines()[-2:] == ["trap '' USR2", "exec python -m app"]
    assert sbatch.gpu_hours(config) == 2 * 4 + 3 * 2


def test_a_component_may_only_outlive_a_node_where_slurm_can_do_it() -> None:
    for trainer, rollout, expected in ((1, 1, False), (1, 4, False), (2, 1, False), (2, 2, True)):
        config = composed(
            "launch=het", f"roles.trainer.nodes={trainer}", f"roles.rollout.nodes={rollout}"
        )
        assert [("--no-kill" in each) for each in lines(sbatch.script(config, "o", "c"))] == [
            expected
        ] * 2


def test_a_single_job_has_the_widest_of_everything() -> None:
    config = composed(
        "launch=single",
        "roles.trainer.ranks_per_node=2",
        "roles.trainer.cpus_per_task=6",
        "roles.rollout.nodes=2",
        "roles.rollout.cpus_per_task=8",
        "roles.rollout.gpus_per_node=4",
        "roles.trainer.gpus_per_node=2",
        "roles.trainer.mem=900M",
        "roles.rollout.mem=1G",
    )
    (options,) = lines(sbatch.script(config, "o", "c"))
    assert {
        "--nodes=3",
        "--ntasks-per-node=1",
        "--cpus-per-task=12",
        "--gpus-per-node=4",
        "--mem=1G",
        "--no-kill",
    } <= set(options)


def test_a_split_run_is_the_trainers_job_and_an_array_of_nodes() -> None:
    config = composed("launch=split", "roles.rollout.nodes=3", "roles.rollout.cpus_per_task=8")
    (trainer,), (rollout,) = (
        lines(sbatch.script(config, "o", "c")),
        lines(sbatch.rollout_script(config, "o", "c")),
    )
    assert "--nodes=1" in trainer and not any("array" in option for option in trainer)
    assert {"--array=0-2", "--nodes=1", "--cpus-per-task=8", "--requeue"} <= set(
        rollout
    ) and "--no-kill" not in rollout


SITES = {
    "local": ["--gpus-per-node=2"],
    "generic_slurm": ["--gpus-per-node=2"],
    "site_gres_pyxis": ["--gres=gpu:h100:2", "--account=my_project", "--partition=gpu"],
    "site_gpus_per_node": ["--gpus-per-node=2", "--exclusive", "--qos=normal", "--mail-type=FAIL"],
    "site_constraint": ["--constraint=a100", "--exclusive"],
}


@pytest.mark.parametrize(
    "site", sorted(path.stem for path in (hydra_api.CONFIGS / "cluster").glob("*.yaml"))
)
def test_every_site_renders(site: str) -> None:
    config = composed(
        f"cluster={site}",
        "launch=het",
        "roles.trainer.gpus_per_node=2",
        "roles.rollout.gpus_per_node=2",
        "roles.trainer.constraint=a100",
        "roles.rollout.constraint=a100",
        "roles.rollout.container=image",
        "roles.rollout.python=python3",
    )
    for component in lines(sbatch.script(config, "o", "c")):
        assert set(SITES[site]) <= set(component)
        assert site != "site_constraint" or not any("gpu" in option for option in component)
    allocations = {"trainer": Allocation(("a",), "7", 0), "rollout": Allocation(("b",), "8", 1)}
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
    steps = SlurmSteps(config, Path("/run"), allocations, addresses, Path("/logs")).all()
    agent = next(step for step in steps if step.kind == "agent").processes[0].command
    if config.cluster.container == "pyxis":
        assert "--container-image=image" in agent
    else:
        assert (
            "exec apptainer exec --nv --bind /work image python3 -m atropos_hpc.rollout.node_agent"
            in agent[-1]
        )
    opened, *program = agent[-1].splitlines()[1:]
    assert opened == "exec >>/logs/agent-0.log 2>&1"  # what the site's lines print, too
    assert program[: len(config.cluster.setup)] == config.cluster.setup


def test_steps_name_their_nodes_counts_and_addresses() -> None:
    config = composed(
        "launch=het",
        "roles.trainer.nodes=2",
        "roles.trainer.ranks_per_node=4",
        "roles.trainer.cpus_per_task=6",
        "roles.rollout.nodes=2",
        "roles.rollout.cpus_per_task=12",
        "roles.rollout.srun=[--exact]",
    )
    env = {
        "SLURM_JOB_ID": "7",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "a b",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "c d",
        "SLURM_JOB_ID_HET_GROUP_0": "7",
        "SLURM_JOB_ID_HET_GROUP_1": "8",
    }
    allocations = sbatch.allocated_nodes(config, env, str.split)
    addresses = {name: f"10.0.0.{i}" for i, name in enumerate("abcd")}
    built = SlurmSteps(config, Path("/run"), allocations, addresses, Path("/logs"))
    steps = {step.name: step for step in built.all()}
    assert list(steps) == ["trajectories", "agent-0", "agent-1", "trainer"]
    assert steps["trajectories"].processes[0].variables["ATROPOS_HPC_HOST"] == "10.0.0.0"
    trainer, agent = steps["trainer"].processes[0].command, steps["agent-1"].processes[0].command
    assert {
        "--het-group=0",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--nodelist=a,b",
        "--cpus-per-task=6",
        "--overlap",
    } <= set(trainer)
    assert {
        "--het-group=1",
        "--nodes=1",
        "--ntasks=1",
        "--nodelist=d",
        "--cpus-per-task=12",
        "--exact",
    } <= set(agent)
    assert steps["agent-1"].nodes == ("d",) and 'ATROPOS_HPC_HOST="10.0.0.3"' in agent[-1]
    probe = (
        trainer[-1].rpartition("exec ")[0]
        + "echo $RANK $LOCAL_RANK $WORLD_SIZE $ATROPOS_HPC_HOST $ATROPOS_HPC_NODE"
    )
    task = {"SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    shown = subprocess.run(
        ["bash", "-c", probe], env=task, capture_output=True, text=True, check=True
    ).stdout
    assert shown.split() == ["5", "1", "8", "10.0.0.1", "trainer1"]


@pytest.mark.parametrize(
    "overrides, env, key",
    [
        (["launch=het"], {"SLURM_JOB_NODELIST": "a"}, "launch.allocation"),
        (["launch=single"], {"SLURM_JOB_NODELIST": "a"}, "roles.rollout.nodes"),
        (
            ["launch=single", "roles.trainer.nodes=2"],
            {"SLURM_JOB_NODELIST": "a b c d"},
            "roles.rollout.nodes",
        ),
        (["launch=split"], {"SLURM_JOB_NODELIST": "a b"}, "roles.trainer.nodes"),
    ],
)
def test_a_job_of_another_size_than_the_config_is_refused(
    overrides: list[str], env: dict[str, str], key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        sbatch.allocated_nodes(composed(*overrides), {"SLURM_JOB_ID": "7", **env}, str.split)


def test_nothing_of_a_surrounding_job_leaks_into_a_new_one() -> None:
    env = {
        "SLURM_CONF": "c",
        "SLURM_CLUSTERS": "big",  # which the other commands of Slurm obey, too
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_NODE": "1",
        "SBATCH_QOS": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "PATH": "p",
    }
    kept = {"SLURM_CONF": "c", "SLURM_CLUSTERS": "big", "PATH": "p"}
    assert sbatch.submission_environment(env) == kept


@pytest.mark.parametrize(
    "overrides, gpus",
    [
        (["roles.trainer.gres='gpu:a100:2,gpu:h100:4'"], 6),
        (["roles.trainer.gres='gpu:4,shard:8'"], 4),
        (["roles.trainer.gpus_per_node=4", "cluster.gpus='--gres=gpu:h100:{n}'"], 4),
        (["roles.trainer.gpus_per_node=4", "cluster.gpus=''"], 4),  # whole nodes
        ([], 0),
    ],
)
def test_gpu_hours_count_every_kind_of_gpu(overrides: list[str], gpus: int) -> None:
    config = composed("launch=het", "launch.minutes=120", "roles.trainer.nodes=3", *overrides)
    assert sbatch.gpu_hours(config) == 2 * 3 * gpus
