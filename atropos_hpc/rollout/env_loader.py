"""From an environment's `target` and `config` to its class and its config object; errors name the key to change."""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from atropos_hpc.config import EnvironmentConf, ModelConf, StalenessConf, environments
from atropos_hpc.rollout.vllm_client import VllmServerConfig
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import ENVIRONMENT_OWN, Problem, did_you_mean

FOR_EVER = 2**31 - 1  # steps: an environment does not decide when a run ends


class TargetError(Exception):
    """The environment cannot be used as configured; `problems` say why, by key within the environment's section."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def load(target: str) -> type[BaseEnv]:
    """The class that "package.module:Class" or "path/to/file.py:Class" names. Raises TargetError."""
    where, _, name = target.rpartition(":")
    try:
        if where.endswith(".py"):  # a file beside its helpers, as in Atropos' environments/
            path = Path(where).expanduser().resolve(strict=True)
            sys.path.insert(0, str(path.parent))
            where = path.stem
        module = importlib.import_module(where)
    except Exception as error:  # whatever an environment's module raises while it is imported
        raise TargetError(
            [Problem("target", f"{target}: cannot be imported: {error!r}")]
        ) from error
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


def default_config(environment: type[BaseEnv]) -> Any:
    """What the class's config_init gives; the servers that it gives with it are replaced by the run's. Raises TargetError."""
    try:
        config, _ = environment.config_init()
    except Exception as error:
        raise TargetError(
            [Problem("target", f"{environment.__name__}.config_init() failed: {error!r}")]
        ) from error
    return config


def override(config: Any, changes: dict[str, Any]) -> Any:
    """A config of the same class with these fields changed and validated. Raises TargetError, naming each wrong field."""
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


def check_target(target: str, config: dict[str, Any]) -> list[Problem]:
    """Everything wrong with an environment's target and config, each with its key. Imports the environment; starts nothing.

    Of fields that the run sets (`ENVIRONMENT_OWN`) the checks of the config itself have told.
    """
    try:
        override(
            default_config(load(target)),
            {key: value for key, value in config.items() if key not in ENVIRONMENT_OWN},
        )
    except TargetError as error:
        return error.problems
    return []


def of_run(run: RunDir, key: str, seed: int) -> tuple[type[BaseEnv], Any, list[VllmServerConfig]]:
    """The run's environment at that key: its class, its config, and its servers. Raises TargetError, with whole keys."""
    config = run.config()
    conf, model, nodes = (
        environments(config)[key],
        config.model,
        config.roles.rollout.nodes,
    )
    try:
        environment = load(conf.target)
        made = env_config(environment, conf, model, config.staleness, nodes, seed)
    except TargetError as error:
        raise TargetError(
            [Problem(f"{key}.{problem.key}", problem.message) for problem in error.problems]
        ) from error
    return environment, made, [server_config(run, conf, model)]


def env_config(
    environment: type[BaseEnv],
    conf: EnvironmentConf,
    model: ModelConf,
    staleness: StalenessConf,
    nodes: int,
    seed: int,
) -> Any:
    """The config of one of the environment's workers, of which each of `nodes` has `conf.workers`.

    `seed` goes into its own `seed` field, where it has one. Raises TargetError.
    """
    config = default_config(environment)
    changes: dict[str, Any] = {"seed": seed} if "seed" in type(config).model_fields else {}
    changes |= conf.config
    changes |= {
        "group_size": conf.group_size,
        "inference_weight": conf.weight / (conf.workers * nodes),
        "min_batch_allocation": conf.min_batch_allocation / (conf.workers * nodes) or None,
        "max_num_workers": conf.concurrency,
        "max_token_length": model.max_length,
        "tokenizer_name": model.path,
        "max_batches_offpolicy": staleness.max + 1,
        "steps_per_eval": 0,
        "total_steps": FOR_EVER,
        "use_wandb": False,
        "wandb_name": config.wandb_name or environment.name or environment.__name__,
    }
    return override(config, changes)


def server_config(run: RunDir, conf: EnvironmentConf, model: ModelConf) -> VllmServerConfig:
    """The one server config, behind which are all of the run's servers."""
    return VllmServerConfig(
        run_dir=run.path,
        model_name=model.path,
        tokenizer_name=model.path,
        timeout=round(conf.request_timeout_s),
        server_type="vllm",
    )


def plain_chat_templates() -> None:
    """Have apply_chat_template return token ids, as atroposlib 0.4.0 and its environments expect. That of transformers 5 does not."""
    original = PreTrainedTokenizerBase.apply_chat_template

    @functools.wraps(original)
    def apply_chat_template(self: PreTrainedTokenizerBase, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("return_dict", False)
        return original(self, *args, **kwargs)

    PreTrainedTokenizerBase.apply_chat_template = apply_chat_template  # type: ignore[method-assign]
