"""The command: compose the config, check it, and hand it to launch/.

    python -m atropos_hpc.train                          the demo, on this machine
    python -m atropos_hpc.train experiment=NAME key=...  another run
    python -m atropos_hpc.train run_dir=DIR              resumes the run in DIR, if there is one

Exit codes: 0 the run is complete; 1 it failed; 2 the config was refused and nothing was started;
75 it was stopped and can be resumed. This module imports no torch, ray, verl or vllm: it runs on
login nodes.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

# Hydra then raises its errors instead of printing them, and `main` words them.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from atropos_hpc.launch import hydra_api, new_directory
from atropos_hpc.launch.restart_policy import PointFailed
from atropos_hpc.runtime import process
from atropos_hpc.validate import Problem, refuse

hydra_api.register()


@hydra.main(version_base="1.3", config_path=str(hydra_api.CONFIGS), config_name="config")
def app(cfg: DictConfig) -> None:
    """Run one run. Hydra calls this for a single run, the launchers handle multiruns."""
    from atropos_hpc.launch import run
    from atropos_hpc.launch.slurm import commands

    run_dir = Path(HydraConfig.get().runtime.output_dir).absolute()
    cfg.run_dir = str(run_dir)
    try:
        config = hydra_api.to_config(cfg)
    except hydra_api.ERRORS as error:  # Hydra would precede it by a message of its own
        sys.exit(refuse(hydra_api.problems(error)))
    code = run.launch(config, run_dir, lambda: commands.requeue(os.environ["SLURM_JOB_ID"]))
    if code:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra created it; remove it unless it has contents
        sys.exit(code)


def main() -> int:
    """Run the app and report a refused config as messages with keys. Returns the exit code."""
    process.keep_files_private()
    # A point of a local multirun stops with its launcher; processes that it starts are not told so.
    process.die_with_parent(signal.SIGTERM)
    os.environ.pop(process.PARENT, None)
    try:
        sys.argv[1:] = hydra_api.with_demo(sys.argv[1:])
        app()
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error))
    except OSError as error:
        if error.filename is None:
            raise
        return refuse([Problem("run_dir", f"cannot use {error.filename}: {error.strerror}")])
    except PointFailed as error:
        print(f"{error}; see the table above and the logs of the points", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was started", file=sys.stderr)
        return 130
    finally:
        new_directory.remove_unused()
    return 0


if __name__ == "__main__":
    sys.exit(main())
