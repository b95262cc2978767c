"""The Hydra launcher up to sbatch: imports, points and refusals. No Slurm is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import on_a_login_node

from atropos_hpc.launch import hydra_api


def test_a_submission_imports_no_torch_ray_verl_or_vllm(tmp_path: Path) -> None:
    from slurm_parts import QUICK, stand_in

    arguments = [
        "-m",
        "hydra/launcher=submitit_slurm",
        f"run_dir={tmp_path / 'sweep'}",
        "launch.dry_run=true",
    ]
    said, heavy = on_a_login_node(*arguments, *QUICK, *stand_in(tmp_path), cwd=tmp_path)
    assert heavy == "[]" and "#SBATCH hetjob" in said
    # what a real submission has in addition
    program = "import sys, submitit, atropos_hpc.launch.submitit_api; "
    program += "print({'torch', 'ray', 'verl', 'vllm', 'numpy'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        == "set()\n"
    )


def test_our_launchers_stand_in_for_those_of_the_same_name(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [
        sys.executable,
        "-m",
        "atropos_hpc.train",
        "hydra/launcher=submitit_slurm",
        "--cfg",
        "hydra",
        "-p",
        "hydra.launcher",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert (
        "atropos_hpc.launch.hydra_api.SlurmLauncher" in done.stdout
        and "timeout_min" not in done.stdout
    )


def test_sweeps_are_found_and_say_what_they_vary(tmp_path: Path) -> None:
    for sweep, count in (("kl_coef", 15), ("lr_x_kl", 9)):
        command = [
            sys.executable,
            "-m",
            "atropos_hpc.train",
            "-m",
            f"+sweep={sweep}",
            "launch.dry_run=true",
            f"run_dir={tmp_path / sweep}",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
        )
        assert (
            done.stdout.count("-m atropos_hpc.train ") == count
            and "algorithm.kl_coef=0.01" in done.stdout
        )


def test_points_composed_in_short_are_what_hydra_composes() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    hydra_api.register()
    common = [
        hydra_api.DEMO,
        "run_dir=/runs",
        "launch=het",
        "+roles.trainer.sbatch.exclusive=true",
        "trainer.steps=7",
        "environment.config={eval_problems: 3}",
    ]
    sweeps = [
        [
            ["algorithm.kl_coef=0.5", "seed=3"],
            ["algorithm.kl_coef=0", "seed=4"],
            ["algorithm.kl_coef=1", "staleness=on_policy"],
        ],
        [["seed=5", "wandb.group=seed-${seed}"], ["seed=6", "wandb.group=seed-${seed}"]],
        [
            ["environment.config={eval_problems: 4}"],
            ["seed=1", "environment.config={}"],
            ["model.path=null", "seed=2"],
        ],
    ]
    with initialize_config_dir(str(hydra_api.CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", common, RunMode.MULTIRUN)
        launcher: Launcher = hydra_api.SlurmLauncher(slots=0)
        launcher.setup(hydra_context=HydraContext(loader, None), task_function=None, config=master)  # type: ignore[arg-type]
        for sweep in sweeps:
            points = launcher.points.compose([[*common, *overrides] for overrides in sweep], 0)  # type: ignore[attr-defined]
            for point, overrides in zip(points, sweep, strict=True):
                whole = loader.load_sweep_config(master, [*common, *overrides])
                OmegaConf.set_struct(whole, False)
                del whole["hydra"]
                whole.run_dir, whole.wandb.group = f"/runs/{point.num}", whole.wandb.group or "runs"
                assert point.config == OmegaConf.to_object(whole) and point.run_dir == Path(
                    f"/runs/{point.num}"
                )
                assert isinstance(point.config.algorithm.kl_coef, float)
        assert len(launcher.points.templates) < sum(map(len, sweeps))  # type: ignore[attr-defined]


def test_a_slurm_allocation_without_a_job_is_refused_with_what_to_do(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "atropos_hpc.train",
        "launch=het",
        f"run_dir={tmp_path / 'run'}",
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert (
        done.returncode == 2
        and "launch.allocation: het needs a job" in done.stderr
        and "slurm/*.sbatch" in done.stderr
    )
    assert not (tmp_path / "run").exists()
