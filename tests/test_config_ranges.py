"""Every number of the config has a range; names that belong to others are checked."""

import inspect
from typing import Any

import pytest
from config_parts import composed

from atropos_hpc import schema, validate, validate_options
from atropos_hpc.config import Config

NUMERIC = {
    name: schema.describe(field)
    for name, field in schema.fields(Config)
    if "key" in field.metadata and ("int" in str(field.type) or "float" in str(field.type))
}
NOT_SENSIBLE = {
    "algorithm.clip_low": 1.5,
    "rollout.kv_cache_bytes": -1,
    "trainer.threads": 0,
    "seed": 2**64,
    "roles.trainer.ranks_per_node": 10_000,
    "trainer.learning_rate": 1e300,
    "model.lora.rank": 100_000,
    "launch.minutes": 10**12,
    "policy.poll_s": 1e-9,
    "algorithm.loss_options": {"tau_pos": 1e9},
}


def refused(config: Config) -> dict[str, str]:
    return {problem.key: problem.message for problem in validate.problems(config)}


def with_value(name: str, value: Any) -> Config:
    config = composed()
    section: Any = config
    *path, last = name.split(".")
    for part in path:
        section = getattr(section, part)
    setattr(section, last, value)
    return config


@pytest.mark.parametrize("name", NUMERIC)
def test_every_number_has_a_range(name: str) -> None:
    key = NUMERIC[name]
    assert key.le is not None and (key.ge is not None or key.gt is not None)


@pytest.mark.parametrize("name", NOT_SENSIBLE)
def test_a_value_out_of_the_range_is_refused_by_key(name: str) -> None:
    assert name in refused(with_value(name, NOT_SENSIBLE[name]))


@pytest.mark.parametrize("mem", ["64Gi", "1.5G", "lots", "-1G", "64 G", "G"])
def test_memory_that_slurm_does_not_read_is_refused(mem: str) -> None:
    found = refused(with_value("roles.trainer.mem", mem))
    assert "a whole number with K, M" in found["roles.trainer.mem"]


@pytest.mark.parametrize("mem", ["64G", "500", "2gb", "0", None])
def test_memory_in_slurms_notation_is_accepted(mem: str | None) -> None:
    assert refused(with_value("roles.trainer.mem", mem)) == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "8000"], "--port is set by the run"),
        (["--port=8000"], "--port is set by the run"),
        (["--max_model_len", "9"], "change model.max_length"),
        (["-tp", "4"], "change rollout.tensor_parallel"),
        (["--no-enforce-eager"], "change rollout.enforce_eager"),
        (["--api-key", "x"], "--api-key is set by the run"),
    ],
)
def test_flags_of_vllm_that_the_run_sets_are_refused(arguments: list[str], says: str) -> None:
    assert says in refused(with_value("rollout.arguments", arguments))["rollout.arguments"]


@pytest.mark.parametrize("arguments", [["--quantization", "fp8"], ["-q=awq"]])
def test_only_the_base_of_an_adapter_can_be_quantized(arguments: list[str]) -> None:
    config = with_value("rollout.arguments", arguments)
    assert "cannot load the weights" in refused(config)["rollout.arguments"]
    config.model.lora.rank = 8
    assert refused(config) == {}


def test_the_flags_that_the_server_gets_are_refused_as_arguments() -> None:
    pytest.importorskip("aiohttp")
    from atropos_hpc.config import ModelConf, RolloutConf
    from atropos_hpc.rollout import vllm_server

    model = ModelConf(path="/m", trust_remote_code=True)
    model.lora.rank = 8
    rollout = RolloutConf(enforce_eager=True, kv_cache_bytes=1 << 30)
    line = vllm_server.arguments(rollout, model, "h", 1, 0)
    given = {flag.removeprefix("--") for flag in line if flag.startswith("--")}
    free = {"disable-uvicorn-access-log", "enable-scale-out"}  # harmless to give again
    assert given - free <= set(validate_options.VLLM_FLAGS)


@pytest.mark.parametrize(
    ("optim", "key", "says"),
    [
        ({"optimizer": "AdmaW"}, "optimizer", "did you mean AdamW?"),
        ({"optimizer": "LBFGS"}, "optimizer", "is not one of"),
        ({"betas": [0.9]}, "betas", "two numbers"),
        ({"betas": [0.9, 2.0]}, "betas", "two numbers"),
        ({"min_lr_ratio": 2}, "min_lr_ratio", "from 0 to 1"),
        ({"min_lr_ratio": "low"}, "min_lr_ratio", "from 0 to 1"),
        ({"override_optimizer_config": {"epss": 1}}, "override_optimizer_config.epss", "mean eps?"),
        ({"override_optimizer_config": {"lr": 1}}, "override_optimizer_config.lr", "learning_rate"),
        ({"override_optimizer_config": [1]}, "override_optimizer_config", "must be a map"),
        (
            {"optimizer": "SGD", "override_optimizer_config": {"eps": 1}},
            "override_optimizer_config.eps",
            "not an option of torch.optim.SGD",
        ),
    ],
)
def test_optimizers_and_their_options_are_checked_by_name(
    optim: dict[str, Any], key: str, says: str
) -> None:
    assert says in refused(with_value("trainer.optim", optim))[f"trainer.optim.{key}"]


@pytest.mark.verl
def test_the_optimizers_that_the_checks_know_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for name, options in validate_options.OPTIMIZERS.items():
        found = set(inspect.signature(getattr(torch.optim, name)).parameters)
        assert found - {"params", "lr", "weight_decay", "betas"} == set(options), name
        assert "weight_decay" in found, "verl always gives it"


def test_a_metric_that_our_environments_never_report_is_refused() -> None:
    message = refused(with_value("environment.metric", "eval/acc"))["environment.metric"]
    assert "which reports eval/percent_correct" in message
