"""A multirun: submit every point, keep a table of them beside the sweep, and wait for them if asked to.

Nothing is queued before every point has passed the checks. The table is jobs.json in the sweep's directory.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atropos_hpc.config import Config
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.contracts.status import ENDED
from atropos_hpc.launch import preflight, run
from atropos_hpc.launch.slurm import commands, sbatch
from atropos_hpc.observe import report
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, write_struct
from atropos_hpc.validate import Problem, refuse

LOOK_S = 3.0
SWEEP_REFUSED = "The sweep was refused; nothing was queued."


@dataclass
class Point:
    """One point of a sweep. Pickled by submitit, and called in the job's batch step."""

    num: int
    overrides: list[str]
    config: Config
    run_dir: Path

    def __call__(self) -> str:
        """Run it, or resume it. What goes wrong is raised, so that the job fails; submitit keeps the error."""
        code = run.launch(self.config, self.run_dir, self.requeue)
        if code in (1, 2):
            raise RuntimeError(
                f"the run in {self.run_dir} {'failed' if code == 1 else 'was refused'}; its logs say why"
            )
        if code:
            sys.exit(code)  # stopped: submitit writes no result, as Slurm may start the job again
        return str(self.run_dir)

    def requeue(self) -> None:
        """Go through submitit's own protocol: its handler of this signal asks for `checkpoint`, requeues the job, and exits.

        Nothing happens when Slurm has requeued it already.
        """
        if commands.was_restarted(commands.show_job(os.environ["SLURM_JOB_ID"])[0]):
            return
        try:
            signal.raise_signal(signal.SIGUSR2)
        except (OSError, subprocess.SubprocessError) as error:
            raise commands.SlurmError(str(error)) from None

    def checkpoint(self) -> Any:
        """What submitit is to call after the requeue: the same again, which resumes in the same directory."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


Outcomes = list[tuple[Point, str | None]]


# --- Slurm


def on_slurm(points: list[Point], sweep_dir: Path, slots: int) -> Outcomes:
    """One job per point. Returns at once, unless launch.wait. Exits with 2 when anything is refused."""
    for point in points:
        if point.config.launch.allocation == "local":
            point.config.launch.allocation = "het"  # a job's nodes are not this machine
    launch = points[0].config.launch
    names = sbatch.slot_names(launch.job_name, str(sweep_dir), len(points), slots)
    folder = sweep_dir / ".submitit"
    if launch.dry_run:
        answers = commands.is_reachable()
        _refuse(points, answers, roles=False)
        return _dry_run(points, folder, names, answers)
    _refuse(points, True)
    rows = _submit(points, names, folder)
    if len(rows) < len(points):
        print(
            f"sbatch refused point {len(rows)}, and those after it were not submitted; the {len(rows)} before it are queued",
            file=sys.stderr,
        )
        sys.exit(1)
    try:
        return _wait(points, rows) if launch.wait else [(point, None) for point in points]
    except KeyboardInterrupt:
        print("no longer waiting; the jobs go on", file=sys.stderr)
        sys.exit(130)


def _submit(points: list[Point], names: list[str | None], folder: Path) -> list[SweepPoint]:
    """The rows of the points that were submitted; fewer than all if sbatch has refused one, and said why."""
    from submitit.core.utils import FailedJobError

    from atropos_hpc.launch.submitit_api import SlurmhetExecutor

    sweep_dir, rows = folder.parent, []  # type: tuple[Path, list[SweepPoint]]
    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmhetExecutor(folder)
    try:
        for point, name in zip(points, names, strict=True):
            job = executor.submit_with(_script(point, name), point.config.launch.minutes, point)
            rows.append(_row(point, job=job.job_id, slot=name, log=str(job.paths.stdout)))
    except FailedJobError as error:
        print(error, file=sys.stderr)
    finally:
        _note(sweep_dir, rows)  # also of a submission that was cut short
    _show(rows, sweep_dir)
    return rows


def _script(point: Point, name: str | None) -> Any:
    return lambda command, output: sbatch.script(point.config, output, command, name)


def _dry_run(points: list[Point], folder: Path, names: list[str | None], checked: bool) -> Outcomes:
    """Print the batch scripts, exactly as they would be handed to sbatch, and what they ask for."""
    command = f"env SUBMITIT_EXECUTOR=slurm {sys.executable} -u -m submitit.core._submit {folder}"
    hours = 0.0
    for point, name in zip(points, names, strict=True):
        hours += sbatch.gpu_hours(point.config)
        print(
            f"# point {point.num}: {' '.join(point.overrides)}\n{sbatch.script(point.config, f'{folder}/%j_0_log.out', command, name)}"
        )
    unchecked = (
        " The roles' Python environments were not checked: `atropos-hpc validate` does that."
    )
    if not checked:
        unchecked += " Slurm does not answer here: whether it can start the jobs was not checked."
    print(
        f"# {len(points)} jobs, at most {hours:.1f} GPU-hours. Nothing was submitted (launch.dry_run).{unchecked}"
    )
    return [(point, None) for point in points]


def _wait(points: list[Point], rows: list[SweepPoint]) -> Outcomes:
    """Until every point has ended, with a line whenever something has changed."""
    said: list[str] = []
    ended = 0  # looks in a row: for a moment, a job that is requeued looks as if it had ended
    while True:
        time.sleep(LOOK_S if said else 0.0)
        if not commands.is_reachable():
            continue
        jobs = commands.known_states(row.job for row in rows)
        found = [report.point_status(row, jobs) for row in rows]
        lines = [
            f"{point.num:>3}  {each.state:<10} step {each.step}/{each.steps}"
            for point, each in zip(points, found, strict=True)
        ]
        for line, before in zip(lines, said or [""] * len(lines), strict=True):
            if line != before:
                print(line, file=sys.stderr)
        said = lines
        ended = ended + 1 if all(each.state in ENDED for each in found) else 0
        if ended == 2:
            print(report.table(found), file=sys.stderr)
            return [(point, each.state) for point, each in zip(points, found, strict=True)]


# --- this machine


def here(points: list[Point], sweep_dir: Path, slots: int) -> Outcomes:
    """One process per point, `slots` at once; each is the command that a person would use to resume the point. Waits for all.

    A signal to stop is handed on: running points save, and the rest is not started.
    """
    if points[0].config.launch.dry_run:
        for point in points:
            print(" ".join(_command(point)))
        print("# Nothing was started (launch.dry_run).")
        return [(point, None) for point in points]
    _refuse(points, False)
    rows = [
        _row(point, job=None, slot=None, log=str(sweep_dir / f"{point.num}.log"))
        for point in points
    ]
    sweep_dir.mkdir(parents=True, exist_ok=True)
    _note(sweep_dir, rows)
    _show(rows, sweep_dir)
    waiting, running, codes = list(points), {}, {}  # type: tuple[list[Point], dict[int, process.Child], dict[int, int]]
    stopping: list[int] = []
    previous = {
        number: signal.signal(number, lambda *_: stopping.append(1))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    asked = 0
    try:
        while running or (waiting and not stopping):
            while waiting and len(running) < slots and not stopping:
                point = waiting.pop(0)
                running[point.num] = process.start(
                    f"point-{point.num}", _command(point), sweep_dir / f"{point.num}.log"
                )
                print(f"point {point.num} started: {' '.join(point.overrides)}", file=sys.stderr)
            for child in running.values() if len(stopping) > asked else ():
                os.kill(child.pid, signal.SIGTERM)
            asked = len(stopping)
            for num in [num for num, child in running.items() if child.poll() is not None]:
                codes[num] = running.pop(num).process.returncode
                print(f"point {num} {_OUTCOMES.get(codes[num], 'failed')}", file=sys.stderr)
            time.sleep(0.2)
    finally:
        process.end(running.values(), points[0].config.launch.save_timeout_s)
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(report.table([report.point_status(row, {}) for row in rows]), file=sys.stderr)
    return [(point, _OUTCOMES.get(codes.get(point.num, 75), "failed")) for point in points]


_OUTCOMES = {0: "complete", 75: "stopped"}


def _command(point: Point) -> list[str]:
    overrides = [override for override in point.overrides if not override.startswith("run_dir=")]
    return [sys.executable, "-m", "atropos_hpc.train", *overrides, f"run_dir={point.run_dir}"]


# --- both


def _refuse(points: Iterable[Point], on_slurm: bool, roles: bool = True) -> None:
    """Exit with 2 and every problem of every point, before anything is queued; what all points share is said once."""
    found: dict[Problem, list[int]] = {}
    for point in points:
        previous = RunDir(point.run_dir).info()
        for problem in preflight.check(
            point.config, point.run_dir, previous, on_slurm, imports=on_slurm, roles=roles
        ):
            found.setdefault(problem, []).append(point.num)
    if found:
        sys.exit(refuse(itertools.starmap(_at_points, found.items()), SWEEP_REFUSED))


def _at_points(problem: Problem, nums: list[int]) -> Problem:
    listed = ", ".join(map(str, nums[:5])) + (", ..." if len(nums) > 5 else "")
    return Problem(problem.key, f"{problem.message} (point {listed})")


def _row(point: Point, job: str | None, slot: str | None, log: str) -> SweepPoint:
    return SweepPoint(
        num=point.num,
        overrides=point.overrides,
        run_dir=str(point.run_dir),
        steps=point.config.trainer.steps,
        job=job,
        slot=slot,
        log=log,
        submitted=time.time(),
    )


def _note(sweep_dir: Path, rows: list[SweepPoint]) -> None:
    """Write the table; rows of the same run directory, of an earlier submission, are replaced."""
    ours = {row.run_dir for row in rows}
    kept = [row for row in report.find_points(sweep_dir) if row.run_dir not in ours]
    table = sorted([*kept, *rows], key=lambda row: row.num)
    write_struct(sweep_dir / "jobs.json", table)


def _show(rows: list[SweepPoint], sweep_dir: Path) -> None:
    lines = [["point", "job", "overrides", "run directory", "log"]]
    for row, overrides in zip(rows, report.varying([row.overrides for row in rows]), strict=True):
        lines.append(
            [str(row.num), row.job or "-", " ".join(overrides), row.run_dir, row.log or "-"]
        )
    print(
        f"{report.aligned(lines)}\nThis table: {sweep_dir / 'jobs.json'}. How it goes: atropos-hpc status {sweep_dir}"
    )
