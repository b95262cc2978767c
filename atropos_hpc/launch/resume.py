"""Resume a run, or all points of a sweep: `atropos-hpc resume RUN|SWEEP [KEY=VALUE ...]`.

The config is that of run.json, or the submitted one of a point whose run never began. A run of this
machine continues in this process. A run on Slurm becomes a new job, which takes its place in the
table of its sweep. A job of a person's own sbatch script is not made again: its resources are in
the script.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.members import AttemptStart
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.launch import base_model, hydra_api, resubmission, run, sweep
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import report
from atropos_hpc.runtime import masking, process, shell, slurm
from atropos_hpc.runtime.run_dir import RunDir, read_struct
from atropos_hpc.validate import REFUSED, Refused, refuse


def resume(directory: Path, overrides: Sequence[str]) -> int:
    """Resume what `directory` holds. Returns train.py's exit code; 2 also if there is nothing to
    resume. Raises report.NotARunError."""
    process.keep_files_private()
    rows = report.require_points(directory.resolve())
    alone = report.is_point(directory, rows)
    sweep_dir = _sweep_of(directory) if alone else directory
    try:
        configs = _configs(sweep_dir, rows, overrides)
    except Refused as error:
        return refuse(error.problems, "Nothing was started.")
    except hydra_api.ERRORS as error:
        return refuse(hydra_api.problems(error))
    if alone and (code := _needs_nothing(rows[0], configs[0])) is not None:
        return code
    points = [
        Point(row.num, row.overrides, config, Path(row.run_dir))
        for row, config in zip(rows, configs, strict=True)
    ]
    if configs[0].launch.allocation != "local":
        sweep.on_slurm(points, sweep_dir, slots=0, resumed=True)
        return 0
    if alone:
        requeue = lambda: slurm.requeue(os.environ["SLURM_JOB_ID"])  # noqa: E731
        return run.launch(configs[0], points[0].run_dir, requeue)
    if any(masking.MASK in override for row in rows for override in row.overrides):
        reason = (
            "its overrides have secrets, which are not kept: repeat the command that started it"
        )
        return refuse([Problem("run_dir", reason)], "Nothing was started.")
    for point in points:
        point.overrides = [*point.overrides, *overrides]
    outcomes = sweep.here(points, sweep_dir, slots=1, resumed=True)
    return 0 if all(outcome in (None, "complete") for _, outcome in outcomes) else 1


def _sweep_of(directory: Path) -> Path:
    """Return the directory whose table has the run: its sweep's, or the run's own."""
    path = directory.resolve()
    return path.parent if report.row_of(path) is not None else path


def _configs(sweep_dir: Path, rows: Sequence[SweepPoint], overrides: Sequence[str]) -> list[Config]:
    """Return the config of each point, with the overrides. Raises Refused and ERRORS."""
    known = resubmission.known_configs(sweep_dir, [row.run_dir for row in rows])
    configs = []
    for row in rows:
        directory, config = RunDir(Path(row.run_dir)), known.get(row.run_dir)
        begun = directory.info() is not None
        if config is None or (not begun and _has_secrets(config)):
            what = "no run.json" if config is None else "not begun, and its secrets are not kept"
            reason = f"{row.run_dir} has {what}: repeat the command that started it"
            raise Refused(Problem("run_dir", reason))
        config = directory.config() if begun else config
        if (command := _script_of(directory)) is not None:
            reason = (
                f"the job of this run had the resources of a script; submit that again: sbatch"
                f" {command} {shell.printed(shell.override('run_dir', row.run_dir))}"
            )
            raise Refused(Problem("run_dir", reason))
        if config.model.make is not None and base_model.is_made(config.model.path):
            config.model.path = None  # create it again if the cache was emptied since
        configs.append(hydra_api.change(config, overrides))
    return configs


def _has_secrets(config: Config) -> bool:
    return masking.MASK in json.dumps(msgspec.to_builtins(config))


def _script_of(directory: RunDir) -> str | None:
    """Return the sbatch script of the newest job, with its arguments; None for our launcher's."""
    for attempt in reversed(directory.attempts()):
        if (start := read_struct(attempt / "start.json", AttemptStart)) is not None:
            return start.script
    return None


def _needs_nothing(row: SweepPoint, config: Config) -> int | None:
    """Return the exit code if the run is live or complete already."""
    path, steps = row.run_dir, config.trainer.steps
    state = report.run_state(row, slurm.known_states([row.job]), steps, trained=True)
    if state in ("running", "queued") and (row.job or report.is_held(RunDir(Path(path)))):
        where = f"job {row.job}" if row.job else "here or on another machine"
        print(f"{path} is already {state} ({where}); nothing was started", file=sys.stderr)
        return REFUSED
    if state == "complete":
        print(
            f"{path} is complete at {steps} steps;"
            f" `{shell.printed('atropos-hpc', 'resume', path)} trainer.steps=...` adds steps"
        )
        return 0
    return None
