"""Check everything that would stop a run, before it starts or is queued.

Beyond what the config alone shows (`atropos_hpc.validate`): files, the run directory, the roles'
Python environments, the model, the environment classes, and what the cluster offers. All problems
are found in one pass, each with the key to change.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atropos_hpc import resources, schema
from atropos_hpc.config import Config, environments
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import (
    cluster_check,
    memory_check,
    role_environment,
    service_check,
    storage_check,
)
from atropos_hpc.launch.slurm import sbatch_checks
from atropos_hpc.runtime import masking, position_limit
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.validate import problems

# Keys that identify a run: a resumed run must not change them.
IDENTITY = (
    "seed",
    "model.",
    "environment.",
    "more_environments.",
    "algorithm.",
    "trainer.backend",
    "trainer.learning_rate",
    "trainer.warmup_steps",
    "trainer.schedule",
    "trainer.weight_decay",
    "trainer.grad_clip",
    "trajectories.server",
)
# and those among them that may change
NO_IDENTITY = (".trial_timeout_s", ".request_timeout_s")
UNUSABLE_IN_LOGS = {"%": "%", "\\": "a backslash", "\n": "a line break"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check(
    config: Config,
    run_dir: Path,
    previous: RunInfo | None,
    on_slurm: bool = False,
    imports: bool = False,
    roles: bool = True,
) -> list[Problem]:
    """Return every problem. Starts nothing but short checks.

    `previous`: the run in `run_dir`, None for a new run. `roles`: check the roles' Python
    environments and what is loaded in them. `imports`: import every package there and try the
    environments out, which takes seconds; useful for queued jobs, which would only fail hours
    later. `on_slurm`: compare the requested resources with the cluster.
    """
    found = [
        *problems(config),
        *sbatch_checks.problems(config),
        *_storage(config, run_dir),
        *_log_names(config, run_dir),
        *_changes(config, previous),
        *_model_files(config),
        *memory_check.check(config, on_slurm),
        *service_check.check(config),
    ]
    wrong = frozenset(problem.key for problem in found)
    sides = (_trainer_role, _rollout_role) if roles else ()
    with ThreadPoolExecutor(2) as pool:  # each check waits for a process
        running = [pool.submit(side, config, wrong, imports) for side in sides]
        cluster = cluster_check.check(config, run_dir) if on_slurm else []
        return [*found, *(problem for side in running for problem in side.result()), *cluster]


def _trainer_role(config: Config, wrong: frozenset[str], imports: bool) -> list[Problem]:
    """Check the trainer's interpreter, and load the model there unless its key is `wrong`."""
    role, model = config.roles.trainer, config.model
    if role.container:  # its contents are not visible here
        return []
    if found := role_environment.check_interpreter(config, "trainer", imports):
        return found
    found = role_environment.check_trackers(config)
    if model.path is None or wrong & {"model.path", "model.max_length"}:
        return found
    return [*found, *role_environment.check_model(config)]


def _rollout_role(config: Config, wrong: frozenset[str], imports: bool) -> list[Problem]:
    """Check the rollout role's interpreter, and load the environment classes there.

    With `imports`, they are tried out, too.
    """
    role = config.roles.rollout
    if role.container:
        return []
    wanted = {k: env for k, env in environments(config).items() if f"{k}.target" not in wrong}
    # The first environment's check imports the role's packages, in one process.
    together = next(iter(wanted), None) if config.environment.python is None else None
    alone = imports and together is None
    if found := role_environment.check_interpreter(config, "rollout", imports=alone):
        return found
    trial = imports and not wrong & {"model.path", "model.max_length"}
    return [
        problem
        if problem.key.startswith("roles.")
        else Problem(f"{key}.{problem.key}", problem.message)
        for key, environment in wanted.items()
        for problem in role_environment.check_environment(
            config, key, environment, trial, imports=imports and key == together
        )
    ]


def _storage(config: Config, run_dir: Path) -> list[Problem]:
    """Check the run directory, and then the space for what is written there."""
    return [*_run_directory(run_dir)] or [*storage_check.check(config, run_dir)]


def _run_directory(run_dir: Path) -> Iterator[Problem]:
    home = storage_check.existing(run_dir)
    if not home.is_dir():
        yield Problem("run_dir", f"{home} is not a directory")
        return
    if (problem := storage_check.unwritable("run_dir", home)) is not None:
        yield problem
        return
    run = RunDir(run_dir)
    if not run_dir.exists() or (run.run_json.exists() and run.run_json.stat().st_size):
        return
    if any(run.checkpoints.glob("step-*")):
        reason = f"{run.run_json} is missing or empty, but the run has checkpoints: restore it"
        yield Problem("run_dir", f"{reason}, or choose another directory")
    elif not run.secret.exists() and set(os.listdir(run_dir)) - {"lock", "holder.json"}:
        reason = f"{run_dir} holds other files but no run; choose another directory"
        yield Problem("run_dir", reason)


def _log_names(config: Config, run_dir: Path) -> Iterator[Problem]:
    """Slurm's names of log files are patterns, without an escape that all its commands know."""
    wrong = [name for each, name in UNUSABLE_IN_LOGS.items() if each in str(run_dir)]
    if wrong and config.launch.allocation != "local":
        reason = f"Slurm takes {' and '.join(wrong)} in the names of log files for something else"
        yield Problem("run_dir", f"{run_dir}: {reason}; choose another directory")


def _changes(config: Config, previous: RunInfo | None) -> Iterator[Problem]:
    """Report keys that a resumed run must not change."""
    if previous is None:
        return
    before, now = flat(previous.config), flat(masking.mask_config(config)[0])
    for key in sorted(before.keys() | now.keys()):
        if key.endswith(NO_IDENTITY) or key == "model.path":
            continue
        if key.startswith(IDENTITY) and before.get(key) != now.get(key):
            yield Problem(
                key,
                f"is {now.get(key)!r}, but the run in this run_dir was started with "
                f"{before.get(key)!r}",
            )


def flat(config: Config) -> dict[str, object]:
    """Map dotted keys to values, the entries of maps one by one."""
    flat: dict[str, object] = {}
    for key, _, value in schema.values(config):
        if key == "more_environments":
            continue  # their keys follow
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": entry for name, entry in value.items()}
        else:
            flat[key] = value
    return flat


def _model_files(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None:
        source = resources.HOME.joinpath(*(model.make or "").split(".")).with_suffix(".py")
        if (model.make or "").startswith("atropos_hpc.") and not source.exists():
            yield Problem("model.make", f"there is no module {model.make}")
        return
    path = Path(model.path).expanduser()
    on_hub = position_limit.is_hub_name(model.path)
    if not path.exists() and not on_hub:
        yield Problem("model.path", f"there is no {path}")
        return
    if (file := position_limit.config_file(model.path)) is None:
        return
    try:
        read = position_limit.read(file)
        limit = position_limit.limit_of(read)
    except (OSError, ValueError) as error:
        yield Problem("model.path", f"{path} has no readable config.json: {error}")
        return
    if (excess := position_limit.excess(model.max_length, limit)) is not None:
        yield Problem(position_limit.KEY, excess)
    if quantized := read.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        reason = f"{path} is quantized ({method}), and cannot be trained: use the original model"
        yield Problem("model.path", reason)
    if not on_hub and not any((path / name).exists() for name in TOKENIZER_FILES):
        yield Problem("model.path", f"{path} has no tokenizer")
