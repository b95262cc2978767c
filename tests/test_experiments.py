"""The experiments for clusters compose, pass the checks, and state their memory correctly.

The models are not here, only their config.json as published.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from config_parts import composed

from atropos_hpc import validate
from atropos_hpc.config import environments
from atropos_hpc.launch.hydra_api import CONFIGS
from atropos_hpc.launch.slurm import sbatch, sbatch_checks
from atropos_hpc.runtime import model_sizes, sizing
from bench.parts.published import CONFIGS as MODELS

EXPERIMENTS = {
    path.stem: path
    for path in sorted((CONFIGS / "experiment").glob("*.yaml"))
    if not path.stem.endswith(("_cpu", "_one_gpu")) and path.stem != "none"  # not for a cluster
}
ON_A_CPU = sorted(path.stem for path in (CONFIGS / "experiment").glob("*_cpu.yaml"))
NEEDED = {
    "math_qwen3_4b": ["environment.target=math_server.py:MathEnv"],
    "math_qwen2_5_32b": ["environment.target=math_server.py:MathEnv"],
    "multi_env": [
        "more_environments.letters.target=letter_counting_environment.py:LetterCountingEnv"
    ],
}  # what their user has to name
GIB = 2**30
SMALLEST_GPU = 80e9 / GIB  # what these experiments are made for


def experiment(name: str) -> Any:
    return composed(f"experiment={name}", *NEEDED.get(name, []))


def _sequences(found: sizing.Estimate, config: Any) -> int:
    """How many sequences of full length a server holds at once."""
    held = SMALLEST_GPU * GIB * config.rollout.memory_utilization - found.weights
    return int(held / found.cache_of_one)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_composes_and_nothing_is_wrong_with_it(name: str) -> None:
    config = experiment(name)
    assert validate.problems(config) == [] and list(sbatch_checks.problems(config)) == []
    assert config.model.max_length <= MODELS[config.model.path]["max_position_embeddings"]
    rollout = config.roles.rollout
    assert config.rollout.servers * config.rollout.tensor_parallel == rollout.gpus_per_node
    assert config.roles.trainer.ranks_per_node == config.roles.trainer.gpus_per_node


@pytest.mark.parametrize("name", ON_A_CPU)
def test_an_experiment_for_a_cpu_needs_no_further_key(name: str) -> None:
    config = composed(f"experiment={name}")
    assert validate.problems(config) == []
    assert not config.roles.trainer.gpus_per_node and not config.roles.rollout.gpus_per_node
    assert config.model.make is not None  # no hub is needed


def test_one_gpu_is_shared_by_both_roles() -> None:
    config = composed("experiment=gsm8k_one_gpu")
    assert validate.problems(config) == []
    roles, rollout = config.roles, config.rollout
    assert (roles.trainer.gpus_per_node, roles.rollout.gpus_per_node) == (1, 1)
    assert (rollout.servers, rollout.tensor_parallel) == (1, 1)
    assert rollout.memory_utilization < 0.5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_becomes_a_heterogeneous_job(name: str) -> None:
    config = experiment(name)
    script = sbatch.script(config, "/shared/log.out", "true", None)
    assert "#SBATCH hetjob" in script and script.count("gpus-per-node=") >= 2, script


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_it_says_of_memory_is_what_the_model_s_config_comes_to(name: str) -> None:
    config = experiment(name)
    found = sizing.estimate(config, model_sizes.sizes(MODELS[config.model.path]))
    text = EXPERIMENTS[name].read_text()
    said = re.search(
        r"trainer ([\d.]+) GiB per GPU; a server's weights ([\d.]+) GiB, ([\d.]+) GiB of KV cache",
        text,
    )
    assert said is not None
    computed = (found.trainer / GIB, found.weights / GIB, found.cache_of_one / GIB)
    assert [float(each) for each in said.groups()] == pytest.approx(computed, rel=0.1), computed
    assert found.trainer / GIB < 0.9 * SMALLEST_GPU
    assert found.policy_cache == (
        0
        if config.model.lora.rank
        else pytest.approx(2 * found.weights * config.rollout.tensor_parallel)
    )
    held = _sequences(found, config)
    assert held >= config.environment.group_size


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_concurrency_fills_the_servers_as_far_as_a_step_lets_it(name: str) -> None:
    config = experiment(name)
    found = sizing.estimate(config, model_sizes.sizes(MODELS[config.model.path]))
    held = _sequences(found, config)
    fits = config.rollout.servers * min(held, config.rollout.max_sequences)
    workers = environments(config).values()
    asked = sum(each.workers * each.concurrency * each.group_size for each in workers)
    in_flight = config.algorithm.batch_size * (1 + config.staleness.max)
    nodes = config.roles.rollout.nodes
    assert asked >= min(fits, in_flight // nodes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_asks_for_the_host_memory_that_its_nodes_need(name: str) -> None:
    config = experiment(name)
    found = sizing.estimate(config, model_sizes.sizes(MODELS[config.model.path]))
    for role, needed in (("trainer", found.trainer_node), ("rollout", found.rollout_node)):
        mem = getattr(config.roles, role).mem
        assert re.fullmatch(r"\d+G", mem) and int(mem[:-1]) * GIB >= needed, (role, needed / GIB)


def test_an_adapter_learns_at_ten_times_the_rate_of_all_weights() -> None:
    assert experiment("gsm8k_qwen2_5_3b_lora").trainer.learning_rate == 3e-5


def test_32b_runs_on_four_and_four_nodes_with_a_server_over_a_node_s_gpus() -> None:
    config = experiment("math_qwen2_5_32b")
    assert (config.roles.trainer.nodes, config.roles.rollout.nodes) == (4, 4)
    assert (config.rollout.servers, config.rollout.tensor_parallel) == (1, 8)


@pytest.mark.verl
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {key: value for key, value in MODELS[name].items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(MODELS[name]["model_type"], **kind)
        )
    parameters = sum(parameter.numel() for parameter in dict(model.named_parameters()).values())
    assert model_sizes.sizes(MODELS[name]).total == parameters


def test_every_experiment_says_how_it_is_started_and_what_it_takes() -> None:
    for name, path in EXPERIMENTS.items():
        text = path.read_text()
        assert f"experiment={name}" in text and "# Time: " in text, name
    assert Path(CONFIGS / "experiment" / "arithmetic_cpu.yaml").exists()
