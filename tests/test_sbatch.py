"""What Slurm is given, as text. No Slurm is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import composed, on_a_login_node

from atropos_hpc import resources
from atropos_hpc.launch import hydra_api
from atropos_hpc.launch.slurm import sbatch, sbatch_checks
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.launch.slurm.srun import StepRequest, srun
from atropos_hpc.launch.steps import SlurmSteps


def lines(text: str) -> list[list[str]]:
    """The #SBATCH options of each component."""
    components: list[list[str]] = [[]]
    for line in text.splitlines():
        if line == "#SBATCH hetjob":
            components.append([])
        elif line.startswith("#SBATCH "):
            components[-1].append(line.removeprefix("#SBATCH "))
    return components


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
    allocations = {
        "trainer": Allocation(("a",), "7", 0),
        "rollout": Allocation(("b",), "8", 1),
    }
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
    assert agent[-1].splitlines()[: len(config.cluster.setup)] == config.cluster.setup


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
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_NODE": "1",
        "SBATCH_QOS": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "PATH": "p",
    }
    assert sbatch.submission_environment(env) == {"SLURM_CONF": "c", "PATH": "p"}


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
    program += "print({'torch', 'ray', 'verl', 'vllm'} & set(sys.modules))"
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


@pytest.mark.parametrize(
    "template", sorted((resources.data("slurm")).glob("*.sbatch")), ids=lambda path: path.stem
)
def test_templates_are_sound_shell_and_hand_their_arguments_on(template: Path) -> None:
    text = template.read_text()
    subprocess.run(["bash", "-n", str(template)], check=True)
    assert '"$@"' in text or "${1:?" in text
    assert "\nexec " in text


@pytest.mark.parametrize("template", ["het_grpo", "single_job_grpo", "split_trainer", "sweep_kl"])
@pytest.mark.parametrize("submitted_in", ["clone", "elsewhere"])
def test_templates_find_their_clone_from_any_directory_and_run_in_that_of_submission(
    tmp_path: Path, template: str, submitted_in: str
) -> None:
    clone, spool = tmp_path / "clone", tmp_path / "spool"
    for directory in (clone / ".venv" / "bin", clone / "slurm", tmp_path / "elsewhere", spool):
        directory.mkdir(parents=True)
    programs = {
        clone / ".venv" / "bin" / "python": 'echo "$PWD" "$@"',
        spool / "scontrol": f"echo JobId=7 Command={clone}/slurm/x.sbatch seed=1 WorkDir=/",
    }
    for path, line in programs.items():
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    counts = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
    groups = [f"{name}_HET_GROUP_{number}" for name in counts for number in (0, 1)]
    env = {
        **dict.fromkeys([*counts, *groups], "1"),
        "PATH": f"{spool}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path / submitted_in),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
    }
    text = (resources.data("slurm") / f"{template}.sbatch").read_text()
    (spool / "slurm_script").write_text(text)
    done = subprocess.run(
        ["bash", str(spool / "slurm_script"), "seed=1"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / submitted_in,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / submitted_in} -u -m atropos_hpc.train "), done
    assert "run_dir=runs/x-7" in done.stdout and done.stdout.rstrip().endswith("seed=1")


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


def test_tasks_of_a_step_with_gpus_see_all_of_them() -> None:
    """Slurm does not bind GPUs to tasks: runtime/devices.py gives each process its own."""
    request = StepRequest("trainer", ["a", "b"], 4, "out", "true")
    for gpus in (0, 4):
        conf = composed(f"roles.trainer.gpus_per_node={gpus}").roles.trainer
        line = srun(request, Allocation(("a", "b"), "7", None), conf)
        assert ("--gpu-bind=none" in line) == (gpus > 0)


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
