"""The command: compose the config, check it, and hand it to launch/.

    python -m atropos_hpc.train                          a run on this machine
    python -m atropos_hpc.train experiment=NAME key=...  another one
    python -m atropos_hpc.train run_dir=DIR              resumes the run in DIR, if there is one

Exit codes: 0 the run is complete; 1 it failed; 2 the config was refused, and nothing was started; 75 it was asked to stop and can
be resumed. This module imports no torch, ray, verl or vllm: it runs on login nodes.
"""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

os.environ.setdefault(
    "HYDRA_FULL_ERROR", "1"
)  # Hydra then lets errors through to `main`, which words them for people

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from atropos_hpc import config as schema
from atropos_hpc import resources, validate
from atropos_hpc.launch import hydra_api
from atropos_hpc.launch.restart_policy import PointFailed
from atropos_hpc.runtime import process
from hydra_plugins.atropos_hpc_launcher import launcher

CONFIGS = resources.data("configs")
REFUSED = 2

hydra_api.register()
launcher.register()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def app(cfg: DictConfig) -> None:
    """One run: of a single start, or one point of a multirun."""
    from atropos_hpc.launch import run
    from atropos_hpc.launch.slurm import commands

    run_dir = Path(HydraConfig.get().runtime.output_dir).absolute()
    cfg.run_dir = str(run_dir)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema.Config)
    code = run.launch(config, run_dir, lambda: commands.requeue(os.environ["SLURM_JOB_ID"]))
    if code:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra made it; gone again if nothing has come into it
        sys.exit(code)


def main() -> None:
    """Run the app; word what Hydra and OmegaConf refuse as one message with the key."""
    process.die_with_parent(
        signal.SIGTERM
    )  # a point of a local multirun: the launcher's death stops it
    os.environ.pop(process.PARENT, None)  # and is nothing to those that this process starts
    try:
        app()
    except (HydraException, OmegaConfBaseException) as error:
        refuse([explain(error)])
    except OSError as error:
        if error.filename is None:
            raise
        refuse([f"run_dir: cannot use {error.filename}: {error.strerror}"])
    except PointFailed as error:
        print(f"{error}; the table above and the points' logs say why", file=sys.stderr)
        sys.exit(1)


def refuse(messages: list[str]) -> NoReturn:
    """Print why the config cannot be used, one line each, and exit with 2."""
    print("The config was refused; nothing was started.", file=sys.stderr)
    for message in messages:
        print(f"  {message}", file=sys.stderr)
    sys.exit(REFUSED)


def explain(error: Exception) -> str:
    """One line for a person: the key, what is wrong, and the nearest valid key of a misspelt one."""
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    first = str(innermost).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return f"{error.override}: is not of the form key=value (or +key=value; with -m also key=value,value)"
    key = getattr(innermost, "full_key", None)
    if key and re.match(r"Key '.*' (is not in struct|not in)", first):
        if key.rpartition(".")[0] in schema.open_sections():
            return f"{key}: there is no such key yet; +{key}=... adds it"
        return f"{key}: there is no such key{validate.did_you_mean(key, schema.keys_beside(key))}"
    if key and isinstance(innermost, MissingMandatoryValue):
        return f"{key}: has to be given: {key}=..."
    if (
        "is not a subclass of EnvironmentConf" in first
    ):  # OmegaConf takes a new one in a whole map only
        return "more_environments: +more_environments={NAME: {target: ..., weight: ...}} adds an environment"
    if key:
        return f"{key}: {first}"
    return " ".join(str(error).partition("Config search path")[0].split())


if __name__ == "__main__":
    main()
