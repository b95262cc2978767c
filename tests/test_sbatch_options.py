"""Options of sbatch in the config: where they go, and which are refused. No Slurm is needed."""

import pytest
from config_parts import composed
from sbatch_parts import lines

from atropos_hpc.launch.slurm import sbatch, sbatch_checks


@pytest.mark.parametrize("allocation", ["het", "split", "single"])
def test_sbatch_options_of_the_cluster_reach_every_script(allocation: str) -> None:
    given = "{mem: 3G, constraint: a100, mail-type: FAIL, requeue: false}"
    config = composed(f"launch={allocation}", f"cluster.sbatch={given}")
    texts = [sbatch.script(config, "o", "c")]
    texts += [sbatch.rollout_script(config, "o", "c")] if allocation == "split" else []
    for options in (each for text in texts for each in lines(text)):
        assert {"--mem=3G", "--constraint=a100", "--mail-type=FAIL"} <= set(options)
        assert "--requeue" not in options
    own = composed(
        f"launch={allocation}",
        f"cluster.sbatch={given}",
        *(f"roles.{role}.{key}" for role in sbatch.ROLES for key in ("mem=5G", "constraint=ib")),
    )
    for options in lines(sbatch.script(own, "o", "c")):
        assert {"--mem=5G", "--constraint=ib"} <= set(options) and "--mem=3G" not in options


def test_a_slot_keeps_the_users_own_dependency() -> None:
    config = composed("launch=het", "cluster.sbatch={dependency: 'afterok:7'}")
    (first, _) = lines(sbatch.script(config, "o", "c", "slot"))
    assert "--dependency=afterok:7,singleton" in first


@pytest.mark.parametrize(
    "override, key, instead",
    [
        ("cluster.sbatch={partition: gpu}", "cluster.sbatch.partition", "cluster.partition"),
        ("cluster.sbatch={account: me}", "cluster.sbatch.account", "cluster.account"),
        ("cluster.sbatch={qos: high}", "cluster.sbatch.qos", "cluster.qos"),
        ("cluster.sbatch={time: 60}", "cluster.sbatch.time", "launch.minutes"),
        ("cluster.sbatch={signal: USR1}", "cluster.sbatch.signal", "launch.signal_s"),
        ("cluster.sbatch={nodes: 3}", "cluster.sbatch.nodes", "roles.*.nodes"),
        ("cluster.sbatch={--job-name: x}", "cluster.sbatch.--job-name", "launch.job_name"),
        ("cluster.sbatch={gres: 'gpu:1'}", "cluster.sbatch.gres", "roles.*.gres"),
        ("cluster.sbatch={array: 0-3}", "cluster.sbatch.array", "sweep a key"),
        ("roles.rollout.sbatch={output: x}", "roles.rollout.sbatch.output", "the log of every job"),
        ("roles.trainer.sbatch={mem: 3G}", "roles.trainer.sbatch.mem", "roles.trainer.mem"),
        ("roles.trainer.mem=lots", "roles.trainer.mem", "such as 64G"),
        ("roles.rollout.mem=1.5G", "roles.rollout.mem", "such as 64G"),
        ("roles.rollout.mem=64Gi", "roles.rollout.mem", "such as 64G"),
    ],
)
def test_sbatch_options_that_would_vanish_are_refused_by_key(
    override: str, key: str, instead: str
) -> None:
    found = list(sbatch_checks.problems(composed("launch=het", override)))
    assert [problem.key for problem in found] == [key] and instead in found[0].message


@pytest.mark.parametrize(
    "trainer, rollout, key",
    [
        ("partition=a", "partition=b", "partition"),
        ("constraint=a", "constraint=b", "constraint"),
        ("gres=gpu:a100:2", "gres=gpu:h100:4", "gres"),
        ("gpus_per_node=2", "gres=gpu:4", "gres"),
        ("sbatch={exclude: n1}", "sbatch={exclude: n2}", "sbatch.exclude"),
    ],
)
def test_a_single_job_refuses_what_its_roles_ask_for_differently(
    trainer: str, rollout: str, key: str
) -> None:
    config = composed("launch=single", f"roles.trainer.{trainer}", f"roles.rollout.{rollout}")
    found = list(sbatch_checks.problems(config))
    assert [problem.key for problem in found] == [f"roles.rollout.{key}"], found


@pytest.mark.parametrize(
    "overrides, option",
    [
        (["roles.rollout.gres=gpu:4"], "--gres=gpu:4"),
        (["roles.trainer.gres=gpu:a100:2", "roles.rollout.gres=gpu:a100:12"], "--gres=gpu:a100:12"),
        (["roles.rollout.partition=b"], "--partition=b"),
        (["roles.rollout.constraint=ib"], "--constraint=ib"),
        (["roles.trainer.mem=9G", "roles.rollout.mem=0"], "--mem=0"),  # all of it
    ],
)
def test_a_single_job_has_what_either_role_asks_for(overrides: list[str], option: str) -> None:
    config = composed("launch=single", *overrides)
    assert list(sbatch_checks.problems(config)) == []
    assert option in lines(sbatch.script(config, "o", "c"))[0]
