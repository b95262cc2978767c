"""Load an environment's class and config from its `target` and `config` keys.

Errors name the key to change.
"""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from atropos_hpc.config import Config, EnvironmentConf, environments
from atropos_hpc.config_rollout import SET_BY_RUN
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.group import UNLIMITED
from atropos_hpc.contracts.scored_group import JsonObject
from atropos_hpc.rollout import managed_chat
from atropos_hpc.rollout.environment_process import TargetError
from atropos_hpc.rollout.vllm_client import VllmServerConfig
from atropos_hpc.runtime.deadlines import request_timeout_s
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.schema import did_you_mean


def load(target: str) -> type[BaseEnv]:
    """Import the class that "package.module:Class" or "path/to/file.py:Class" names.

    A target without a colon is a taskset package of the verifiers library. Raises TargetError.
    """
    where, _, name = target.rpartition(":")
    if not where:
        return _load_verifiers(name)
    try:
        if where.endswith(".py"):  # a file next to its helpers, as in Atropos
            path = Path(where).expanduser().resolve(strict=True)
            sys.path.insert(0, str(path.parent))
            where = path.stem
        module = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever the module raises
        reason = f"{target}: cannot be imported: {describe_error(error)}"
        raise TargetError([Problem("target", reason)]) from error
    environment = getattr(module, name, None)
    if not (isinstance(environment, type) and issubclass(environment, BaseEnv)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, BaseEnv) and value is not BaseEnv
        ]
        message = (
            f"{target}: {where} has no Atropos environment {name!r}{did_you_mean(name, classes)}"
        )
        raise TargetError([Problem("target", message)])
    return environment


def _load_verifiers(package: str) -> type[BaseEnv]:
    try:
        from atropos_hpc.rollout.verifiers_env import of_package
    except ImportError as error:
        message = (
            f"{package}: the verifiers library cannot be imported in {sys.executable}: {error!r}. "
            "Give environment.python an interpreter with atropos-hpc[verifiers]; a class of "
            "Atropos is package.module:Class"
        )
        raise TargetError([Problem("target", message)]) from error
    try:
        return of_package(package)
    except Exception as error:  # whatever the package raises
        message = f"{package}: verifiers cannot load this taskset: {error!r}"
        raise TargetError([Problem("target", message)]) from error


def default_config(environment: type[BaseEnv]) -> Any:
    """Return the config of the class's config_init, without its servers. Raises TargetError."""
    try:
        config, _ = environment.config_init()
    except (Exception, SystemExit) as error:
        reason = f"{environment.__name__}.config_init() failed: {describe_error(error)}"
        raise TargetError([Problem("target", reason)]) from error
    return config


def override(config: Any, changes: JsonObject) -> Any:
    """Return a config of the same class with changed fields, validated.

    Raises TargetError, which names each wrong field.
    """
    kind = type(config)
    unknown = [key for key in changes if key not in kind.model_fields]
    if unknown:
        message = "{} has no such field{}"
        raise TargetError(
            [
                Problem(
                    f"config.{key}",
                    message.format(kind.__name__, did_you_mean(key, kind.model_fields)),
                )
                for key in unknown
            ]
        )
    try:
        return kind(**{**config.model_dump(), **changes})
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
        raise TargetError([Problem(f"config.{key}", message) for key, message in wrong]) from error


def check_target(target: str, config: JsonObject) -> list[Problem]:
    """Return everything that is wrong with an environment's target and config, by key.

    It imports the environment and starts nothing. Fields that the run sets (`SET_BY_RUN`) are
    left to the checks of the config itself.
    """
    try:
        override(
            default_config(load(target)),
            {key: value for key, value in config.items() if key not in SET_BY_RUN},
        )
    except TargetError as error:
        return error.problems
    return []


def of_run(run: RunDir, key: str, seed: int) -> tuple[type[BaseEnv], Any, list[VllmServerConfig]]:
    """Return the run's environment at that key: its class, its config, and its servers.

    Raises TargetError, with whole keys.
    """
    config = run.config()
    conf, model = environments(config)[key], config.model
    try:
        environment = load(conf.target)
        worker_config = env_config(environment, conf, config, seed)
    except TargetError as error:
        problems = [Problem(f"{key}.{each.key}", each.message) for each in error.problems]
        raise TargetError(problems) from error
    # One server config stands for all of the run's servers.
    servers = VllmServerConfig(
        run_dir=run.path,
        model_name=model.path,
        tokenizer_name=model.path,
        timeout=round(request_timeout_s(conf, model.max_length)),
        server_type="vllm",
    )
    return environment, worker_config, [servers]


def env_config(environment: type[BaseEnv], conf: EnvironmentConf, config: Config, seed: int) -> Any:
    """Return the config of one worker of the environment.

    Each rollout node has `conf.workers` of them. `seed` goes into the config's own `seed` field, if
    it has one. Raises TargetError.
    """
    env_config = default_config(environment)
    workers = conf.workers * config.roles.rollout.nodes
    durable = config.trajectories.server == "durable"  # its quota bounds what workers start
    rollout_s = request_timeout_s(conf, config.model.max_length)
    own = {"seed": seed, "eval_samples": config.evaluation.samples}
    changes: JsonObject = {k: v for k, v in own.items() if k in type(env_config).model_fields}
    changes |= conf.config
    if (own_s := env_config.worker_timeout) > 0:  # Atropos' default would end long answers
        changes.setdefault("worker_timeout", max(own_s, rollout_s))
    changes |= {
        "group_size": conf.group_size,
        "inference_weight": conf.weight / workers,
        "min_batch_allocation": conf.min_batch_allocation / workers or None,
        "max_num_workers": conf.concurrency,
        "max_token_length": config.model.max_length,
        "tokenizer_name": config.model.path,
        # BaseEnv's own limit on queued batches, beyond which it cancels rollouts; 0: none
        "max_batches_offpolicy": 0 if durable else config.staleness.max + 1,
        "steps_per_eval": 0,
        "total_steps": UNLIMITED,  # an environment does not decide when a run ends
        "use_wandb": False,
        "wandb_name": env_config.wandb_name or environment.name or environment.__name__,
    }
    return override(env_config, changes)


def patch_atropos() -> None:
    """Adapt atroposlib 0.4.0 to transformers 5, and its managed servers to this run's client."""
    patch_chat_templates()
    managed_chat.use_in_atropos()


def patch_chat_templates() -> None:
    """Have apply_chat_template return token ids, as atroposlib 0.4.0 and its environments expect.

    In transformers 5 it returns a dict.
    """
    original = PreTrainedTokenizerBase.apply_chat_template

    @functools.wraps(original)
    def apply_chat_template(self: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("return_dict", False)
        return original(self, *args, **kwargs)

    PreTrainedTokenizerBase.apply_chat_template = apply_chat_template  # type: ignore[method-assign]
