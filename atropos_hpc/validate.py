"""Check what a config's types let through: values out of range and keys that contradict each other.

Nothing here looks at a file or starts a process. What depends on this machine, the model, the
environment or the cluster is checked by launch/preflight.py, and reported as the same `Problem`.
"""

import re
import sys
from collections.abc import Iterable, Iterator

from atropos_hpc import schema, validate_options, validate_trainer
from atropos_hpc.config import Config, EnvironmentConf, environment_name, environments
from atropos_hpc.config_rollout import SET_BY_RUN
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.runtime import masking

REFUSED = 2  # exit code

# Variables of vLLM that are not the user's, with the reason.
SET_FOR_SERVERS = {
    "VLLM_API_KEY": "the servers ask for the run's token; with a key of their own they refuse it",
    "VLLM_SERVER_DEV_MODE": "the run sets it: its weight updates need it",
    "VLLM_RPC_BASE_PATH": "the run sets it: a directory that only this user can enter",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "would let whoever reaches a server run code in it",
}
DEMO_MODEL = "atropos_hpc.environments.make_base"
DEMO_ENVIRONMENT = "atropos_hpc.environments.arithmetic:ArithmeticEnv"
MODEL_NEEDED = "give model=hugging_face model.path=DIRECTORY_OR_HUB_NAME model.max_length=TOKENS"


class Refused(Exception):
    """The config cannot be used."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def refuse(
    problems: Iterable[Problem], headline: str = "The config was refused; nothing was started."
) -> int:
    """Print the problems to stderr, one per line, and return the exit code."""
    lines = [masking.mask_assignments(f"  {problem}") for problem in problems]
    print(headline, *lines, sep="\n", file=sys.stderr)
    return REFUSED


def problems(config: Config) -> list[Problem]:
    """Return everything wrong that the config alone shows, by key."""
    single = [
        Problem(name, error)
        for name, key, value in schema.values(config)
        if (error := key.error(value)) is not None
    ]
    return [*single, *_combinations(config)]


def _combinations(config: Config) -> Iterator[Problem]:
    yield from _model(config)
    for key, environment in environments(config).items():
        yield from _environment(key, environment, config)
    minimums = [each.min_batch_allocation for each in environments(config).values()]
    if (minimum := sum(minimums)) > 1 >= max(minimums):
        yield Problem(
            "environment.min_batch_allocation",
            f"adds up with those of more_environments to {minimum:g}, more than a whole batch",
        )
    for key, message in (*validate_trainer.errors(config), *validate_options.errors(config)):
        yield Problem(key, message)
    yield from _devices(config)
    ranks = config.roles.trainer.nodes * config.roles.trainer.ranks_per_node
    if config.trajectories.server == "atropos" and ranks > 1:
        yield Problem(
            "trajectories.server",
            f"atropos serves one trainer rank, but roles.trainer has {ranks}; use durable",
        )


def _devices(config: Config) -> Iterator[Problem]:
    trainer, rollout, servers = config.roles.trainer, config.roles.rollout, config.rollout
    if trainer.gpus_per_node and trainer.ranks_per_node > trainer.gpus_per_node:
        yield Problem(
            "roles.trainer.ranks_per_node",
            f"{trainer.ranks_per_node} ranks need a GPU each, but roles.trainer.gpus_per_node is "
            f"{trainer.gpus_per_node}",
        )
    for name, reason in SET_FOR_SERVERS.items():
        if name in servers.variables:
            yield Problem(f"rollout.variables.{name}", reason)
    needed = servers.servers * servers.tensor_parallel
    if rollout.gpus_per_node and needed > rollout.gpus_per_node:
        yield Problem(
            "rollout.servers",
            f"{servers.servers} servers of rollout.tensor_parallel={servers.tensor_parallel} need "
            f"{needed} GPUs, but roles.rollout.gpus_per_node is {rollout.gpus_per_node}",
        )


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None and model.make is None:
        yield Problem("model.path", f"must be given, there is no default: {MODEL_NEEDED}")
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem(
            "model.attention",
            "flash_attention_2 computes in bfloat16, but model.dtype is float32; use sdpa",
        )
    if model.path is None and model.make == DEMO_MODEL:
        for key, environment in environments(config).items():
            if environment.target != DEMO_ENVIRONMENT:
                yield Problem(
                    "model.path",
                    "the demo's model of 0.1 M parameters can only add two numbers, but "
                    f"{key}.target is {environment.target}: {MODEL_NEEDED}",
                )


def _environment(key: str, environment: EnvironmentConf, config: Config) -> Iterator[Problem]:
    size, batch = environment.group_size, config.algorithm.batch_size
    if size > 0 and batch % size:
        yield Problem(
            "algorithm.batch_size",
            f"{batch} sequences are not a multiple of {key}.group_size={size}",
        )
    if not re.fullmatch(r".+:\w+|[\w-]+", environment.target):
        yield Problem(
            f"{key}.target",
            f"{environment.target!r} is neither of the form package.module:Class nor the name of a "
            "taskset package of verifiers",
        )
    evaluation = config.evaluation
    if environment.python != config.environment.python and (
        evaluation.every or evaluation.before or evaluation.after
    ):
        yield Problem(
            f"{key}.python",
            "one process evaluates all environments, so it must be the same for all of them, or "
            "evaluation.before, after and every must be off",
        )
    if key != "environment" and not re.fullmatch(r"(?!environment$)\w+", environment_name(key)):
        yield Problem(
            key, "is not a valid name for metrics: use letters, digits and _, and not `environment`"
        )
    for name in sorted(environment.config.keys() & SET_BY_RUN.keys()):
        yield Problem(
            f"{key}.config.{name}",
            f"is set by the run; change {SET_BY_RUN[name].format(key)} instead",
        )
