"""`atropos-hpc`: what one does to a run besides starting it.

atropos-hpc validate [OVERRIDE ...]   everything that would be refused, without starting anything
atropos-hpc export RUN OUT            the newest checkpoint's weights as a Hugging Face directory
atropos-hpc stop RUN                  save a checkpoint, then end the run; the same command resumes it
atropos-hpc report SWEEP [--json]     one row per point of a sweep (or for one run): state, step, figures, and which is best
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from atropos_hpc import rendezvous
from atropos_hpc.run_dir import RunDir, read_json


def validate(overrides: Sequence[str]) -> int:
    """Compose and check as `atropos_hpc.train` would with these overrides. 0: nothing wrong; 2: said what."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from atropos_hpc.config import Config
    from atropos_hpc.launch import preflight
    from atropos_hpc.train import CONFIGS, explain

    given = any(override.startswith("run_dir=") for override in overrides)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = OmegaConf.to_object(compose("config", [*overrides, *([] if given else ["run_dir=runs/new"])]))
    except (HydraException, OmegaConfBaseException) as error:
        print(explain(error), file=sys.stderr)
        return 2
    assert isinstance(config, Config)
    run_dir = Path(config.run_dir).absolute()
    previous = read_json(RunDir(run_dir).run_json).get("config", {})
    found = preflight.check(config, run_dir, previous, on_slurm=config.launch.allocation != "local")
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(found)} to change" if found else "nothing wrong was found")
    return 2 if found else 0


def stop(path: Path) -> int:
    """Leave the request to stop. The supervisor and the learner do the rest, wherever they run."""
    run = RunDir(path)
    if not read_json(run.run_json):
        print(f"{path} is not a run directory: it has no run.json", file=sys.stderr)
        return 2
    if not rendezvous.Roster(run.roster).members("supervisor"):
        print(f"nothing runs in {path}", file=sys.stderr)
        return 1
    rendezvous.ask(run, "stop", by="atropos-hpc stop")
    print(f"asked: the learner saves a checkpoint, and the run in {path} ends")
    return 0


def report(directory: Path, as_json: bool) -> int:
    """Print the points of a sweep. 1 when there is none."""
    from atropos_hpc.observe import report

    points = report.points(directory)
    if not points:
        print(f"{directory} holds no jobs.json and no run directory", file=sys.stderr)
        return 1
    rows = [report.row(point) for point in report.with_job_states(points)]
    best = report.best(rows)
    if as_json:
        print(json.dumps([{**row, "best": row is best} for row in rows], indent=1))
    else:
        print(report.table(rows))
    return 0


def export(path: Path, out: Path, step: int | None) -> int:
    """See learner/export.py. 0: written; 2: said what is in the way."""
    run = RunDir(path)
    if not read_json(run.run_json):
        print(f"{path} is not a run directory: it has no run.json", file=sys.stderr)
        return 2
    try:
        from atropos_hpc.learner.checkpoint import BadCheckpoint  # needs torch, which a login node may not have
        from atropos_hpc.learner.export import export as write
    except ImportError as error:
        print(f"{error}: export needs the trainer's environment (roles.trainer.python)", file=sys.stderr)
        return 2
    try:
        done = write(run, out, step)
    except (OSError, ValueError, BadCheckpoint) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: the weights after step {done}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="atropos-hpc", description="GRPO training on rewards from Atropos environments.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("validate", help="everything that would be refused, without starting anything")
    check.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m atropos_hpc.train")
    end = commands.add_parser("stop", help="save a checkpoint, then end the run")
    end.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    rows = commands.add_parser("report", help="one row per point of a sweep, or for one run")
    rows.add_argument("directory", type=Path, metavar="SWEEP", help="the sweep's directory, or a run directory")
    rows.add_argument("--json", action="store_true", help="as JSON")
    written = commands.add_parser("export", help="a checkpoint's weights as a Hugging Face directory")
    written.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    written.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    written.add_argument("--step", type=int, help="of which step; else the newest")
    options = parser.parse_args(arguments)
    if options.command == "validate":
        return validate(options.overrides)
    if options.command == "export":
        return export(options.run, options.out, options.step)
    return stop(options.run) if options.command == "stop" else report(options.directory, options.json)


if __name__ == "__main__":
    sys.exit(main())
