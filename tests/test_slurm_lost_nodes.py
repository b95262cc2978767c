"""A rollout node with its environment workers dies in the middle: each prompt still comes once."""

import sys
from pathlib import Path

import pytest
from prompt_coverage import FEW_PROBLEMS, assert_prompts_are_covered
from slurm_cluster import ROOT, Cluster
from slurm_parts import node_of, submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
NODES = 4
STEPS = 80


def real_prompts(directory: Path) -> list[str]:
    """Overrides for the real environment workers, without a model; see prompts_stand_in.py."""
    from atropos_hpc.environments.make_base import make_tokenizer

    overrides = ["experiment=arithmetic_cpu", f"model.path={directory / 'model'}", FEW_PROBLEMS]
    make_tokenizer().save_pretrained(directory / "model")
    (directory / "model" / "config.json").write_text("{}")
    pythons = {"trainer": sys.executable, "rollout": f"{ROOT}/.venv-rollout/bin/python"}
    for role, python in pythons.items():
        program = directory / role
        program.write_text(f'#!/bin/sh\nexec {python} {ROOT}/tests/prompts_stand_in.py "$@"\n')
        program.chmod(0o755)
        overrides.append(f"roles.{role}.python={program}")
    return [
        *overrides,
        "algorithm.batch_size=32",
        "staleness.max=1000",
        "environment.group_size=8",
        "environment.config.ensure_scores_are_not_same=false",
        "roles.rollout.nodes=2",
        f"trainer.steps={STEPS}",
    ]


def test_by_default_slurm_requeues_the_job_of_a_lost_rollout_node_and_prompts_come_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm lets a job outlive a node only where every role has two or more."""
    run = submitted(cluster, tmp_path / "sweep", *real_prompts(tmp_path))
    run.reach(12)
    node = node_of(run, "rollout")
    cluster.kill_node(node)
    # Slurm does the same by itself after SlurmdTimeout.
    cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    run.is_requeued(90)
    run.completes(STEPS, attempts=2, seconds=200)
    assert cluster.job(run.job)["Restarts"] == "1"
    assert run.log("trainer-0").count("starts at step") == 2
    assert_prompts_are_covered(run.run, epochs=3)
