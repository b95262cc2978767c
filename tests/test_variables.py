"""Variables of the user's shell: what reaches a run's processes and Slurm's commands."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.config import Config
from atropos_hpc.launch import role_environment, run
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.runtime import environment, slurm
from atropos_hpc.runtime.environment import DROP, PASS, RULES, RUN, SLURM
from atropos_hpc.validate import problems

ROOT = Path(__file__).parents[1]

# variable, for whom -> what has to happen; at least one for each pattern of the table
EXPECTED = {
    ("VLLM_API_KEY", RUN): DROP,
    ("VLLM_ALLOW_INSECURE_SERIALIZATION", RUN): DROP,
    ("VLLM_HOST_IP", RUN): DROP,
    ("VLLM_PORT", RUN): DROP,
    ("VLLM_USE_MODELSCOPE", RUN): DROP,
    ("VLLM_CACHE_ROOT", RUN): PASS,
    ("VLLM_CONFIG_ROOT", RUN): PASS,
    ("VLLM_ASSETS_CACHE", RUN): PASS,
    ("VLLM_LOGGING_LEVEL", RUN): PASS,
    ("VLLM_CPU_OMP_THREADS_BIND", RUN): PASS,
    ("VLLM_TARGET_DEVICE", RUN): PASS,
    ("VLLM_NCCL_SO_PATH", RUN): PASS,
    ("PYTHONPATH", RUN): PASS,
    ("PYTHONUSERBASE", RUN): PASS,
    ("PYTHONNOUSERSITE", RUN): PASS,
    ("PYTHONDONTWRITEBYTECODE", RUN): PASS,
    ("PYTHONHOME", RUN): DROP,
    ("PYTHONEXECUTABLE", RUN): DROP,
    ("PYTHONPLATLIBDIR", RUN): DROP,
    ("__PYVENV_LAUNCHER__", RUN): DROP,
    ("PYTHONINSPECT", RUN): DROP,
    ("PYTHONOPTIMIZE", RUN): DROP,
    ("PYTHONWARNINGS", RUN): DROP,
    ("PYTHONSTARTUP", RUN): DROP,
    ("PYTHONIOENCODING", RUN): DROP,
    ("MASTER_ADDR", RUN): DROP,
    ("MASTER_PORT", RUN): DROP,
    ("RANK", RUN): DROP,
    ("WORLD_SIZE", RUN): DROP,
    ("LOCAL_RANK", RUN): DROP,
    ("LOCAL_WORLD_SIZE", RUN): DROP,
    ("GROUP_RANK", RUN): DROP,
    ("ROLE_RANK", RUN): DROP,
    ("ROLE_WORLD_SIZE", RUN): DROP,
    ("TORCHELASTIC_RUN_ID", RUN): DROP,
    ("OMPI_COMM_WORLD_RANK", RUN): DROP,
    ("PMI_RANK", RUN): DROP,
    ("PMIX_RANK", RUN): DROP,
    ("ACCELERATE_MIXED_PRECISION", RUN): DROP,
    ("RAY_ADDRESS", RUN): DROP,
    ("WANDB_API_KEY", RUN): PASS,
    ("WANDB_BASE_URL", RUN): PASS,
    ("WANDB_RUN_ID", RUN): DROP,
    ("WANDB_RESUME", RUN): DROP,
    ("WANDB_SWEEP_ID", RUN): DROP,
    ("WANDB_SERVICE", RUN): DROP,
    ("WANDB__SERVICE", RUN): DROP,
    ("TOKENIZERS_PARALLELISM", RUN): DROP,
    ("HF_TOKEN", RUN): PASS,
    ("HF_HOME", RUN): PASS,
    ("HF_HUB_OFFLINE", RUN): PASS,
    ("HUGGING_FACE_HUB_TOKEN", RUN): PASS,
    ("TRANSFORMERS_CACHE", RUN): PASS,
    ("OMP_NUM_THREADS", RUN): PASS,
    ("MKL_NUM_THREADS", RUN): PASS,
    ("KMP_AFFINITY", RUN): PASS,
    ("GOMP_SPINCOUNT", RUN): PASS,
    ("NCCL_SOCKET_IFNAME", RUN): PASS,
    ("NCCL_IB_HCA", RUN): PASS,
    ("GLOO_SOCKET_IFNAME", RUN): PASS,
    ("UCX_NET_DEVICES", RUN): PASS,
    ("FI_PROVIDER", RUN): PASS,
    ("TP_SOCKET_IFNAME", RUN): PASS,
    ("http_proxy", RUN): PASS,
    ("HTTPS_PROXY", RUN): PASS,
    ("OPENAI_API_KEY", RUN): PASS,
    ("PATH", RUN): PASS,
    ("LD_LIBRARY_PATH", RUN): PASS,
    ("CUDA_VISIBLE_DEVICES", RUN): PASS,
    ("SLURM_JOB_ID", RUN): PASS,
    ("SLURM_CONF", SLURM): PASS,
    ("SLURM_JOB_ID", SLURM): PASS,
    ("SBATCH_ACCOUNT", SLURM): DROP,
    ("SBATCH_ACCOUNT", RUN): DROP,
    ("SALLOC_PARTITION", SLURM): DROP,
    ("SRUN_CPUS_PER_TASK", RUN): DROP,
    ("SQUEUE_FORMAT", SLURM): DROP,
    ("SINFO_PARTITION", SLURM): DROP,
    ("SCONTROL_ALL", SLURM): DROP,
    ("SACCT_FORMAT", SLURM): DROP,
    ("SLURM_TIME_FORMAT", SLURM): DROP,
    ("SLURM_BITSTR_LEN", SLURM): DROP,
}


@pytest.mark.parametrize(("name", "whom"), EXPECTED, ids=lambda value: value.replace(" ", "-"))
def test_variable_of_the_shell_is_passed_or_dropped(name: str, whom: str) -> None:
    assert (name in environment.kept({name: "1"}, whom)) == (EXPECTED[name, whom] == PASS)


def test_every_pattern_of_the_table_of_variables_decides_about_one_that_is_tested() -> None:
    decided = {(environment.decide(name, whom), whom) for name, whom in EXPECTED}
    for rule in RULES:
        assert any((rule, whom) in decided for whom in rule.whom), rule
        for pattern in rule.patterns.split():
            single = environment.Rule(pattern, rule.whom, rule.action, "")
            assert any(single.matches(name, whom) for name, whom in EXPECTED), pattern


def test_documentation_shows_the_table_of_variables() -> None:
    rows = ["| variables | for | what happens | why |", "|---|---|---|---|"]
    for rule in RULES:
        names = ", ".join(f"`{pattern}`" for pattern in rule.patterns.split())
        rows.append(f"| {names} | {', '.join(rule.whom)} | {rule.action} | {rule.reason} |")
    assert "\n".join(rows) in (ROOT / "docs" / "slurm.md").read_text()


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A shell that has set every variable that is dropped."""
    dropped = {name: "hostile" for (name, _), action in EXPECTED.items() if action == DROP}
    for name, value in dropped.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "kept")
    return dropped


def test_run_starts_without_the_dropped_variables_and_names_them(
    hostile: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    config.trainer.steps = -1  # refused, after the environment is set up
    assert run.launch(config, tmp_path / "run", lambda: None) == 2
    kept = {name for name in hostile if name in os.environ}
    assert all(EXPECTED.get((name, RUN), PASS) == PASS for name in kept), kept
    assert os.environ["HF_TOKEN"] == "kept"
    printed = capsys.readouterr().err
    assert "VLLM_API_KEY" in printed and "hostile" not in printed


def test_checks_of_a_role_see_the_variables_that_its_processes_see(hostile: dict[str, str]) -> None:
    done = role_environment._run((), sys.executable, "-c", "import os; print(dict(os.environ))")
    assert "'HF_TOKEN': 'kept'" in done.stdout
    for name in ("PYTHONHOME", "PYTHONINSPECT", "VLLM_API_KEY", "RAY_ADDRESS"):
        assert f"'{name}'" not in done.stdout


def test_slurm_variables_of_the_shell_reach_neither_commands_nor_checks_nor_submission(
    hostile: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from atropos_hpc.launch import cluster_check

    seen: list[dict[str, str]] = []

    def run_program(command: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        seen.append(options["env"])
        return subprocess.CompletedProcess(command, 1, "", "sbatch: error: Invalid account")

    monkeypatch.setattr(subprocess, "run", run_program)
    (problem,) = cluster_check._test("launch", "#!/bin/bash")
    with pytest.raises(slurm.SlurmError):
        slurm.run_command("squeue")
    seen.append(sbatch.submission_environment(os.environ))
    assert len(seen) == 3
    for env in seen:
        assert not [name for name in env if name.startswith(("SBATCH_", "SRUN_", "SALLOC_"))]
    assert not [name for name in seen[1] if name.startswith(("SQUEUE_", "SINFO_"))]
    # the check and the submission are one environment
    assert seen[0] == seen[2]
    assert problem.key == "cluster.account" and "SBATCH_ACCOUNT" in problem.message


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_RPC_BASE_PATH"])
def test_variable_that_the_run_sets_itself_is_refused_in_the_config(name: str) -> None:
    config = Config()
    config.rollout.variables = {name: "x"}
    assert f"rollout.variables.{name}" in [problem.key for problem in problems(config)]
