"""The command: compose the config, check it, and hand it to launch/.

    python -m atropos_hpc.train                          the demo, on this machine
    python -m atropos_hpc.train experiment=NAME key=...  another run
    python -m atropos_hpc.train run_dir=DIR              resumes the run in DIR, if there is one

`atropos-hpc train` and `atropos-hpc submit` call it. Exit codes: cli_arguments.EXIT_CODES. This
module imports no torch, ray, verl or vllm: it runs on login nodes.
"""

import os
import signal
import sys
from pathlib import Path

# Hydra then raises its errors instead of printing them, and `main` words them.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from omegaconf import DictConfig

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.launch import hydra_api, new_directory
from atropos_hpc.runtime import process
from atropos_hpc.validate import Refused, refuse

hydra_api.register()


def compose() -> Config | None:
    """Compose the config of a single run from the command line; None after a multirun, which the
    launchers have handled. Raises one of hydra_api.ERRORS.

    The run itself starts after Hydra has returned: Hydra precedes every error of what it calls by
    a message of its own.
    """
    found: list[Config | Exception] = []

    @hydra.main(version_base="1.3", config_path=str(hydra_api.CONFIGS), config_name="config")
    def app(cfg: DictConfig) -> None:
        try:
            found.append(hydra_api.to_config(cfg))
        except hydra_api.ERRORS as error:
            found.append(error)

    app()
    for outcome in found:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    return None


def launch(config: Config) -> int:
    """Start or resume the run and stay until its end. Returns the exit code."""
    from atropos_hpc.launch import run
    from atropos_hpc.runtime import slurm

    if not config.run_dir.strip():
        raise Refused(Problem("run_dir", "is empty, which would be the current directory"))
    return run.launch(
        config, Path(config.run_dir).absolute(), lambda: slurm.requeue(os.environ["SLURM_JOB_ID"])
    )


def main() -> int:
    """Run the app and report a refused config as messages with keys. Returns the exit code."""
    process.keep_files_private()
    # A point of a local multirun stops with its launcher; processes that it starts are not told so.
    process.die_with_parent(signal.SIGTERM)
    os.environ.pop(process.PARENT, None)
    try:
        sys.argv[1:] = hydra_api.with_demo(sys.argv[1:])
        try:
            config = compose()
        except hydra_api.PointFailed:  # of a multirun that was waited for; Hydra raises it
            raise
        except Exception as error:
            if not hydra_api.is_composing_error(error):
                raise
            raise Refused(
                *hydra_api.named_problems(error, sys.argv[1:], hydra_api.compose)
            ) from error
        return 0 if config is None else launch(config)
    except Refused as error:
        return refuse(error.problems)
    except OSError as error:
        if error.filename is None:
            raise
        return refuse([Problem("run_dir", f"cannot use {error.filename}: {error.strerror}")])
    except hydra_api.PointFailed as error:
        print(f"{error}; see the table above and the logs of the points", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was started", file=sys.stderr)
        return 130
    finally:
        new_directory.remove_unused()


if __name__ == "__main__":
    sys.exit(main())
