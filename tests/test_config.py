"""Mistakes are refused before anything starts: one readable message, the key, the nearest valid one, exit code 2."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from atropos_hpc import validate
from atropos_hpc.config import Config
from atropos_hpc.launch import hydra_api
from atropos_hpc.train import CONFIGS

FIRST_FILES = {  # a group's first file explains every value of the section; the rest stand in config.yaml itself
    "model": "hugging_face", "environment": "atropos", "algorithm": "grpo", "trainer": "verl", "rollout": "vllm",
    "staleness": "bounded", "cluster": "local", "launch": "local",
}  # fmt: skip


def composed(*overrides: str) -> Config:
    hydra_api.register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides=["run_dir=/nowhere", *overrides]))
    assert isinstance(config, Config)
    return config


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
        ("trainer.steps", "trainer.steps", "not of the form key=value"),
        (
            "+more_environments={b: {targt: b.py:B}}",
            "more_environments.b.targt",
            "did you mean more_environments.b.target?",
        ),
        (
            "+more_environments.b={target: b.py:B}",
            "more_environments",
            "+more_environments={NAME: {target: ...",
        ),
    ],
)
def test_mistakes_in_composing(tmp_path: Path, override: str, key: str, says: str) -> None:
    done = train(f"run_dir={tmp_path / 'run'}", override, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert key in done.stderr and says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2


@pytest.mark.parametrize(
    "override, key, says",
    [
        ("roles.trainer.nodes=-1", "roles.trainer.nodes", "less than 1"),
        ("environment.group_size=1", "environment.group_size", "at least 2"),
        ("algorithm.kl_coef=-0.1", "algorithm.kl_coef", "less than 0"),
        ("staleness.max=-1", "staleness.max", "less than 0"),
        ("algorithm.batch_size=100", "algorithm.batch_size", "whole groups of 8"),
        ("algorithm.loss=vanila", "algorithm.loss", "did you mean vanilla?"),
        (
            "trainer.tokens_per_micro_batch=16",
            "trainer.tokens_per_micro_batch",
            "model.max_length=32",
        ),
        ("environment.target=arithmetic", "environment.target", "package.module:Class"),
        ("rollout.memory_utilization=1.5", "rollout.memory_utilization", "more than the whole"),
        (
            "+environment.config.group_size=4",
            "environment.config.group_size",
            "environment.group_size",
        ),
        (
            "+environment.config.total_steps=4",
            "environment.config.total_steps",
            "change trainer.steps",
        ),
        (
            "+environment.config.inference_weight=4",
            "environment.config.inference_weight",
            "change environment.weight",
        ),
        ("environment.weight=0", "environment.weight", "not above 0"),
        (
            "environment.min_batch_allocation=1.5",
            "environment.min_batch_allocation",
            "more than a whole batch",
        ),
        (
            "+more_environments={b: {target: b.py}}",
            "more_environments.b.target",
            "package.module:Class",
        ),
        (
            "+more_environments={environment: {target: b.py:B}}",
            "more_environments.environment",
            "another than environment",
        ),
        (
            "+more_environments={b: {target: b.py:B, group_size: 7}}",
            "algorithm.batch_size",
            "more_environments.b.group_size",
        ),
        ("trainer.grad_clip=0", "trainer.grad_clip", "not above 0"),
        ("+algorithm.loss_options.tau_pos=2", "algorithm.loss_options.tau_pos", "vanilla"),
        ("algorithm.loss=sapo", "algorithm.aggregation", "seq-mean-token-mean"),
        ("algorithm.kl_target=-1", "algorithm.kl_target", "above 0"),
        ("algorithm.correction.weights=token", "algorithm.correction.weights", "needs recompute"),
        ("algorithm.correction.threshold=much", "algorithm.correction.threshold", "range"),
        (
            "algorithm.correction.rejection_threshold=2",
            "algorithm.correction.rejection_threshold",
            "go together",
        ),
        (
            "+trainer.fsdp_config.param_ofload=true",
            "trainer.fsdp_config.param_ofload",
            "did you mean param_offload?",
        ),
        (
            "+trainer.fsdp_config.offload_policy=true",
            "trainer.fsdp_config.offload_policy",
            "change trainer.offload",
        ),
        (
            "+trainer.fsdp_config.fsdp_size=3",
            "trainer.fsdp_config.fsdp_size",
            "does not divide the 1 ranks",
        ),
        (
            "+trainer.fsdp_config.mixed_precision={param_dtype: bf16}",
            "trainer.fsdp_config.mixed_precision.param_dtype",
            "model.dtype",
        ),
        (
            "+trainer.fsdp_config.entropy_checkpointing=true",
            "trainer.fsdp_config.entropy_checkpointing",
            "algorithm.entropy_coef",
        ),
        ("+trainer.optim.lr=1", "trainer.optim.lr", "change trainer.learning_rate"),
        ("+trainer.optim.momentum=0.9", "trainer.optim.momentum", "override_optimizer_config"),
        ("+trainer.deepspeed.bf16.enabled=true", "trainer.deepspeed", "trainer.backend=deepspeed"),
        ("model.attention=flash_attention_2", "model.attention", "model.dtype is float32"),
    ],
)
def test_mistakes_that_the_config_shows(override: str, key: str, says: str) -> None:
    found = [str(problem) for problem in validate.problems(composed(override))]
    assert len(found) == 1 and found[0].startswith(f"{key}: ") and says in found[0], found


@pytest.mark.parametrize(
    "overrides, key, says",
    [
        (
            ["roles.trainer.nodes=2", "+trainer.fsdp_config.ulysses_sequence_parallel_size=2"],
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
    ],
)
def test_what_excludes_one_another_in_the_trainer(
    overrides: list[str], key: str, says: str
) -> None:
    found = [str(problem) for problem in validate.problems(composed(*overrides))]
    assert len(found) == 1 and key in found[0] and says in found[0], found


def test_upstreams_server_and_several_ranks_exclude_one_another() -> None:
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
def test_a_sound_config_has_no_problems(override: str) -> None:
    assert validate.problems(composed(override)) == []


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
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


def sections() -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(Config)
        if hasattr(field.type, "__dataclass_fields__")
    ]


@pytest.mark.parametrize("section", sections())
def test_every_value_is_explained_and_its_default_is_the_classs(section: str) -> None:
    path = (
        CONFIGS / section / f"{FIRST_FILES[section]}.yaml"
        if section in FIRST_FILES
        else CONFIGS / "config.yaml"
    )
    values = yaml.safe_load(path.read_text())
    values = values if section in FIRST_FILES else values[section]
    default = OmegaConf.to_container(OmegaConf.structured(Config))[section]  # type: ignore[index]
    assert OmegaConf.to_container(OmegaConf.create(values)) == default
    unexplained = [
        line
        for line in path.read_text().splitlines()
        if re.match(r"^\w+: ", line) and "#" not in line
    ]
    if section in FIRST_FILES:
        assert unexplained == []


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
