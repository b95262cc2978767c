"""Everything that can be refused before a run starts, beyond what the config alone shows: files, interpreters, the model, the
environment class. All that is wrong is found in one go, each with the key to change.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config, Problem, problems
from atropos_hpc.launch.allocation import PACKAGE_HOME, rollout_python, trainer_python

CHECK_TIMEOUT_S = 300.0
NEEDED = {"trainer": ("torch", "verl"), "rollout": ("vllm", "atroposlib")}
# keys whose change makes it another run; the rest may differ when a run is resumed
IDENTITY = ("seed", "model.", "environment.", "algorithm.", "trainer.backend", "trainer.learning_rate", "trainer.warmup_steps",
            "trainer.schedule", "trainer.weight_decay", "trainer.grad_clip", "trajectories.server")  # fmt: skip


def check(config: Config, run_dir: Path, previous: dict[str, Any]) -> list[Problem]:
    """Every problem there is. `previous`: the config of the run in `run_dir`, {} when it is new. Starts nothing but checks."""
    found = [*problems(config), *_run_directory(run_dir), *_changed(config, previous), *_interpreters(config), *_model(config)]
    if not any(p.key.startswith(("environment.target", "roles.rollout.python")) for p in found):
        found += _environment(config)
    return found


def _run_directory(run_dir: Path) -> Iterator[Problem]:
    home = run_dir
    while not home.exists():
        home = home.parent
    if not home.is_dir():
        yield Problem("run_dir", f"{home} is not a directory")
    elif not os.access(home, os.W_OK | os.X_OK):
        yield Problem("run_dir", f"cannot write to {home}")
    elif run_dir.exists() and not (run_dir / "run.json").exists() and set(os.listdir(run_dir)) - {"lock", "holder.json"}:
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


def _interpreters(config: Config) -> Iterator[Problem]:
    for role, python in (("trainer", trainer_python(config)), ("rollout", rollout_python(config))):
        key = f"roles.{role}.python"
        needed = (*NEEDED[role], "atropos_hpc")
        probe = f"import importlib.util as u, json; print(json.dumps([m for m in {needed!r} if u.find_spec(m) is None]))"
        try:
            out = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=True, cwd="/").stdout
            if missing := json.loads(out):
                yield Problem(key, f"{python} cannot import {', '.join(missing)}; install requirements/{role}-*.txt there (`make setup`)")
        except FileNotFoundError:
            yield Problem(key, f"there is no {python}; `make setup` makes it")
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            yield Problem(key, f"{python} does not work as a Python: {error}")


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


def _environment(config: Config) -> list[Problem]:
    """Load the class in the rollout role's Python, and hold environment.config against the class's own."""
    command = [rollout_python(config), "-m", "atropos_hpc.rollout.worker", "--check",
               "--target", config.environment.target, "--config", json.dumps(config.environment.config)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
        return [Problem(each["key"], each["message"]) for each in json.loads(done.stdout.strip().splitlines()[-1])]
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("environment.target", f"could not be checked: {error}")]
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()
        return [Problem("environment.target", f"could not be checked: {last[-1] if last else 'no answer'}")]
