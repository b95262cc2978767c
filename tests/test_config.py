"""Mistakes are refused before anything starts: by key, with the nearest valid key, exit code 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import in_process
import pytest
from config_parts import composed, refused_by_key

from atropos_hpc import schema, validate
from atropos_hpc.config import Config, TrainerConf
from atropos_hpc.launch import hydra_api
from atropos_hpc.launch.hydra_api import CONFIGS
from atropos_hpc.validate import Refused


def train(
    *overrides: str, cwd: Path, variables: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, **(variables or {})}
    command = [sys.executable, "-m", "atropos_hpc.train", *overrides]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


# --- refused while composing, or by the checks that need no other process


@pytest.mark.parametrize(
    "override, key, says",
    [
        ("algorithm.kl_coeff=0.1", "algorithm.kl_coeff", "did you mean algorithm.kl_coef?"),
        ("trainr.steps=3", "trainr", "did you mean trainer?"),
        ("trainer.steps=many", "trainer.steps", "could not be converted to Integer"),
        ("environment=gsm8kk", "environment/gsm8kk", "gsm8k"),
        ("experiment=nothing", "experiment/nothing", "arithmetic_cpu"),
        ("experiment=null", "experiment", "give experiment=none"),
        ("trainer.steps", "trainer.steps", "not of the form key=value"),
        (
            "+more_environments={b: {targt: b.py:B}}",
            "more_environments.b.targt",
            "did you mean more_environments.b.target?",
        ),
        (
            "+more_environments.b={target: b.py:B}",
            "more_environments",
            "more_environments={NAME: {target: ...",
        ),
    ],
)
def test_a_mistake_in_composing_is_refused(
    tmp_path: Path, override: str, key: str, says: str
) -> None:
    done = in_process.train(f"run_dir={tmp_path / 'run'}", override)
    assert done.returncode == 2, done.stderr
    assert key in done.stderr and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and not any(tmp_path.iterdir())


def rejecting(names: str, thresholds: str) -> list[str]:
    return [
        "algorithm.old_log_probs=recompute",
        f"algorithm.correction.rejection='{names}'",
        f"algorithm.correction.rejection_threshold='{thresholds}'",
    ]


@pytest.mark.parametrize(
    "override, key, says",
    [
        *refused_by_key(
            {
                "roles.trainer.nodes=-1": "must be at least 1, not -1",
                "environment.group_size=1": "must be at least 2",
                "algorithm.kl_coef=-0.1": "must be at least 0",
                "staleness.max=-1": "must be at least 0",
                "algorithm.batch_size=100": "not a multiple of environment.group_size=8",
                "algorithm.loss=vanila": "did you mean vanilla?",
                "trainer.tokens_per_micro_batch=16": "model.max_length=32",
                "environment.target=a.arithmetic": "package.module:Class",
                "rollout.memory_utilization=1.5": "must be at most 1",
                "+environment.config.group_size=4": "environment.group_size",
                "+environment.config.total_steps=4": "change trainer.steps",
                "+environment.config.inference_weight=4": "change environment.weight",
                "environment.weight=0": "must be greater than 0",
                "environment.min_batch_allocation=1.5": "must be at most 1",
                "trainer.grad_clip=0": "must be greater than 0",
                "+algorithm.loss_options.tau_pos=2": "vanilla",
                "algorithm.kl_target=-1": "greater than 0",
                "algorithm.correction.weights=token": "recompute",
                "algorithm.correction.threshold=much": "range",
                "algorithm.correction.threshold='0'": "above 0",
                "algorithm.correction.threshold='2.0_0.5'": "range",
                "algorithm.clip_dual=1": "must be greater than 1",
                "algorithm.correction.rejection_threshold=2": "given together",
                "+trainer.fsdp_config.param_ofload=true": "did you mean param_offload?",
                "+trainer.fsdp_config.offload_policy=true": "change trainer.offload",
                "+trainer.fsdp_config.fsdp_size=3": "does not divide the 1 ranks",
                "+trainer.fsdp_config.entropy_checkpointing=true": "algorithm.entropy_coef",
                "+trainer.optim.lr=1": "change trainer.learning_rate",
                "+trainer.optim.momentum=0.9": "override_optimizer_config",
                "model.attention=flash_attention_2": "model.dtype is float32",
            }
        ),
        (
            "+more_environments={b: {target: 'b:B', python: /other/python}}",
            "more_environments.b.python",
            "one process evaluates all environments",
        ),
        (
            "+more_environments={b: {target: b.py}}",
            "more_environments.b.target",
            "package.module:Class",
        ),
        (
            "+more_environments={environment: {target: b.py:B}}",
            "more_environments.environment",
            "and not `environment`",
        ),
        (
            "+more_environments={b: {target: b.py:B, group_size: 7}}",
            "algorithm.batch_size",
            "more_environments.b.group_size",
        ),
        ("algorithm.loss=sapo", "algorithm.aggregation", "seq-mean-token-mean"),
        (
            "+trainer.fsdp_config.mixed_precision={param_dtype: bf16}",
            "trainer.fsdp_config.mixed_precision.param_dtype",
            "model.dtype",
        ),
        ("+trainer.deepspeed.bf16.enabled=true", "trainer.deepspeed", "trainer.backend=deepspeed"),
    ],
)
def test_a_wrong_value_is_refused_by_key(override: str, key: str, says: str) -> None:
    found = [str(each) for each in validate.problems(composed(override, "model.path=a/b"))]
    assert len(found) == 1 and found[0].startswith(f"{key}: ") and says in found[0], found


@pytest.mark.parametrize(
    "overrides, key, says",
    [
        (
            [
                "roles.trainer.nodes=2",
                "+trainer.fsdp_config.ulysses_sequence_parallel_size=2",
                "model.attention=eager",
            ],
            "ulysses_sequence_parallel_size",
            "sdpa",
        ),
        (
            ["trainer.offload=true", "+trainer.fsdp_config.param_offload=true"],
            "trainer.fsdp_config.param_offload",
            "keep one",
        ),
        (
            ["trainer=deepspeed", "+trainer.fsdp_config.forward_prefetch=true"],
            "trainer.fsdp_config",
            "trainer.backend=verl",
        ),
        (["trainer=deepspeed", "+trainer.optim.optimizer=SGD"], "trainer.optim.optimizer", "AdamW"),
        (
            ["trainer=deepspeed", "+trainer.deepspeed.gradient_clipping=1"],
            "trainer.deepspeed.gradient_clipping",
            "trainer.grad_clip",
        ),
        (
            ["trainer=deepspeed", "trainer.deepspeed.zero_optimization.stage=0"],
            "zero_optimization.stage",
            "1, 2, 3",
        ),
        *(
            (
                [f"algorithm.loss={option[:6]}", f"algorithm.loss_options.{option}={value}"],
                f"algorithm.loss_options.{option}",
                says,
            )
            for option, value, says in (
                ("kl_cov_ratio", 0, "greater than 0"),
                ("kl_cov_ratio", 2, "part of the tokens"),
            )
        ),
        *(
            (rejecting(names, thresholds), "algorithm.correction.rejection_threshold", says)
            for names, thresholds, says in (
                ("token_k1", "0.5", "'0.5' is not a number above 0 for token_k1, nor, for a k1"),
                ("token_k1", "2_0.5", "2_0.5"),
                ("token_k3", "0", "'0' is not"),
                ("seq_mean_k3,token_k1", "0.5_2.0,2", "for seq_mean_k3"),
            )
        ),
    ],
)
def test_contradicting_settings_of_the_trainer_are_refused(
    overrides: list[str], key: str, says: str
) -> None:
    found = [str(problem) for problem in validate.problems(composed(*overrides))]
    assert len(found) == 1 and key in found[0] and says in found[0], found


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (
            ["roles.trainer.gpus_per_node=2", "roles.trainer.ranks_per_node=4"],
            "roles.trainer.ranks_per_node",
            "gpus_per_node is 2",
        ),
        (
            ["roles.rollout.gpus_per_node=4", "rollout.servers=2", "rollout.tensor_parallel=4"],
            "rollout.servers",
            "need 8 GPUs",
        ),
    ],
)
def test_more_processes_than_gpus_are_refused(overrides: list[str], key: str, says: str) -> None:
    found = [str(problem) for problem in validate.problems(composed(*overrides))]
    assert len(found) == 1 and found[0].startswith(key) and says in found[0], found


def test_the_atropos_server_serves_one_rank_only() -> None:
    found = validate.problems(
        composed("trajectories.server=atropos", "roles.trainer.ranks_per_node=2")
    )
    assert [problem.key for problem in found] == ["trajectories.server"]


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        *(f"algorithm={name}" for name in ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo")),
    ],
)
def test_every_algorithm_is_valid(override: str) -> None:
    assert validate.problems(composed(override)) == []


def test_each_rejection_may_have_a_threshold_of_its_own_kind() -> None:
    overrides = rejecting("token_k1,seq_mean_k3", "0.5_2.0,0.06")
    assert validate.problems(composed(*overrides)) == []


ADDED = [
    ("algorithm.kl_coeff=0.5", "algorithm.kl_coeff", "did you mean algorithm.kl_coef?"),
    ("roles.rollout.node=2", "roles.rollout.node", "did you mean roles.rollout.nodes?"),
    ("polcy.keep=2", "polcy", "did you mean policy?"),
]


@pytest.mark.parametrize("override, key, says", ADDED)
def test_a_plus_does_not_let_a_misspelt_key_through(override: str, key: str, says: str) -> None:
    with pytest.raises(Refused) as refused:
        hydra_api.compose([f"+{override}"])
    assert [problem.key for problem in refused.value.problems] == [key]
    assert says in str(refused.value)


def test_every_default_is_allowed_and_explained() -> None:
    for name, key, value in schema.values(Config()):
        assert key.help and key.error(value) is None, name


def test_a_value_is_refused_with_its_bound_or_the_nearest_choice() -> None:
    assert schema.Key("", ge=1, le=8).error(9) == "must be at most 8, not 9"
    assert schema.Key("", gt=0).error(0) == "must be greater than 0, not 0"
    assert schema.Key("", gt=0).error(None) is None
    wrong = schema.Key("", choices=("full", "delta")).error("dela")
    assert wrong == "'dela' is not one of full, delta; did you mean delta?"


def test_keys_of_maps_need_no_plus() -> None:
    overrides = ["environment.config.seed=3", "trainer.fsdp_config.forward_prefetch=true"]
    config = hydra_api.compose([hydra_api.DEMO, *overrides])
    assert config.environment.config["seed"] == 3
    assert config.trainer.fsdp_config == {"forward_prefetch": True}
    more = composed("more_environments={b: {target: b.py:B}}").more_environments
    assert more["b"].target == "b.py:B" and more["b"].group_size == 8


def test_paths_of_what_exists_are_absolute_so_that_a_run_is_resumed_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").mkdir()
    for name in ("b.py", "model", "venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    interpreters = ["roles.trainer.python=venv/bin/python", "roles.rollout.python=python"]
    overrides = ["environment=atropos", "environment.target=b.py:B", "model.path=model"]
    more = "more_environments={c: {target: missing.py:C, python: ./venv/bin/python}}"
    config = hydra_api.compose([*overrides, *interpreters, more])
    assert config.environment.target == f"{tmp_path}/b.py:B"
    assert config.model.path == f"{tmp_path}/model"
    assert config.roles.trainer.python == f"{tmp_path}/venv/bin/python"
    assert config.roles.rollout.python == "python", "a name is looked up in PATH"
    assert config.more_environments["c"].target == "missing.py:C"
    assert config.more_environments["c"].python == f"{tmp_path}/venv/bin/python"
    for name in ("~no-such-user/model", "m" * 300):
        assert hydra_api.compose([*overrides, f"model.path='{name}'"]).model.path == name


def test_the_demo_is_run_only_if_nothing_else_is_asked_for() -> None:
    demo = hydra_api.compose(["run_dir=/nowhere", "algorithm.kl_coef=0.5"])
    assert demo.model.make == validate.DEMO_MODEL and demo.trainer.learning_rate == 5e-4
    other = hydra_api.compose(["environment=atropos", "environment.target=a.b:C"])
    assert other.model.make is None and other.trainer == TrainerConf()
    (problem,) = validate.problems(other)
    assert problem.key == "model.path" and "model.max_length=" in problem.message
    nothing = hydra_api.compose(["experiment=none", "environment=gsm8k", "model.path=a/b"])
    assert validate.problems(nothing) == []


@pytest.mark.parametrize("override", ["environment=gsm8k", "environment.target=a.b:C"])
def test_the_demos_model_is_refused_for_other_environments(override: str) -> None:
    (problem,) = validate.problems(composed(override, "algorithm.batch_size=8"))
    assert problem.key == "model.path" and "model.path=DIRECTORY" in problem.message


def test_no_experiment_and_no_environment_is_refused_with_what_to_give(tmp_path: Path) -> None:
    done = in_process.train(f"run_dir={tmp_path / 'run'}", "experiment=none")
    assert done.returncode == 2 and "environment.target: must be given" in done.stderr


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    done = train(
        f"run_dir={tmp_path / 'run'}",
        "algorithm.kl_coef=-1",
        "staleness.max=-2",
        "roles.rollout.python=/no/python",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    for key in ("algorithm.kl_coef", "staleness.max", "roles.rollout.python"):
        assert re.search(rf"^  {re.escape(key)}: ", done.stderr, re.M), done.stderr
    assert not (tmp_path / "run").exists()


# --- the login node


LOGIN_NODE = """
import runpy, sys
sys.argv = ["atropos_hpc.train", *sys.argv[1:]]
try:
    runpy.run_module("atropos_hpc.train", run_name="__main__")
except SystemExit:
    pass
heavy = {"torch", "ray", "verl", "vllm", "transformers", "wandb"}
print("HEAVY", sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""


def on_a_login_node(*arguments: str, cwd: Path) -> tuple[str, str]:
    """Run the command; return its output and the heavy modules that its process has imported."""
    done = subprocess.run(
        [sys.executable, "-c", LOGIN_NODE, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    heavy = next(line for line in done.stdout.splitlines() if line.startswith("HEAVY"))
    return done.stdout, heavy.removeprefix("HEAVY ")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["roles.rollout.python=/no/python", "algorithm.kl_coef=-1"]]
)
def test_help_and_a_refusal_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    """bench/startup.py measures how long they take."""
    assert on_a_login_node(*arguments, cwd=tmp_path)[1] == "[]"


# --- the files of the config


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}"
)
def test_every_choice_composes(path: Path) -> None:
    named = ["more_environments.letters.target=a.b:C"] if path.stem == "multi_env" else []
    config = composed(f"{path.parent.name}={path.stem}", "environment.target=a.b:C", *named)
    left = {problem.key for problem in validate.problems(config)}
    assert left <= {
        "model.path",
        "trainer.tokens_per_micro_batch",
    }  # what fits the tiny model that comes with no choice at all
