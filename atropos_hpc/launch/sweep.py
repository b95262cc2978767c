"""Submit or run the points of a multirun, and keep a table of them in the sweep's directory.

Nothing is queued before every point has passed the checks. The table is jobs.json.
"""

import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.contracts.status import ENDED
from atropos_hpc.launch import cluster_check, memory_check, preflight, resubmission
from atropos_hpc.launch.slurm import sbatch
from atropos_hpc.launch.slurm.cluster import cluster_answers
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.observe import report
from atropos_hpc.runtime import masking, process, shell, slurm
from atropos_hpc.runtime.deadlines import save_timeout_s
from atropos_hpc.runtime.run_dir import RunDir, write_struct
from atropos_hpc.validate import Refused, refuse

POLL_S = 3.0
SWEEP_REFUSED = "The sweep was refused; nothing was queued."


Outcomes = list[tuple[Point, str | None]]


# --- Slurm


def on_slurm(points: list[Point], sweep_dir: Path, slots: int, resumed: bool = False) -> Outcomes:
    """Submit one job per point, unless the point is complete or live already. Returns at once,
    unless launch.wait is set. `resumed`: each point is that of its run directory.

    Exits with 2 if a point is refused, with 1 if sbatch refuses one, with 130 after Ctrl-C.
    """
    for point in points:
        sbatch.leave_this_machine(point.config)
    launch = points[0].config.launch
    folder = sweep_dir / ".submitit"
    try:
        with resubmission.locked(sweep_dir):
            new = _unfinished(points, sweep_dir, resumed)
            names = [_slot(point, sweep_dir, slots) for point in new]
            if launch.dry_run:
                answers = cluster_answers()
                _refuse(new, answers, roles=False)
                return _dry_run(new, folder, names, answers)
            if new:
                what = "the cluster, both roles' Python and the environments"
                print(f"checking {what}, for {len(new)} points", file=sys.stderr, flush=True)
            _refuse(new, True)
            _submit(new, names, folder)
        if not launch.wait:
            return [(point, None) for point in points]
        return _wait(points, sweep_dir)
    except Refused as error:
        sys.exit(refuse(error.problems, SWEEP_REFUSED))
    except KeyboardInterrupt:
        print("interrupted; what is queued stays queued", file=sys.stderr)
        sys.exit(130)


def _unfinished(points: list[Point], sweep_dir: Path, resumed: bool) -> list[Point]:
    """Return the points that are neither complete nor live, and name those that are. Raises
    Refused for a point whose directory has another one."""
    found = resubmission.sort(points, sweep_dir, resumed)
    if found.problems:
        raise Refused(*found.problems)
    for point, status in found.skipped:
        job = f" (job {status.job})" if status.job and status.state != "complete" else ""
        print(f"point {point.num} is {status.state}{job}, in {point.run_dir}: not started again")
    return found.new


def _slot(point: Point, sweep_dir: Path, slots: int) -> str | None:
    """Return the job name of a point's singleton slot; of one that had a slot, the same again."""
    for row in report.sweep_table(sweep_dir):
        if row.run_dir == str(point.run_dir) and row.slot is not None:
            return row.slot
    return sbatch.slot_name(point.config.launch.job_name, str(sweep_dir), point.num, slots)


def _submit(points: list[Point], names: list[str | None], folder: Path) -> None:
    """Submit the points and write their table. Exits after an error of sbatch, and after Ctrl-C."""
    if not points:
        return
    from atropos_hpc.launch.submitit_api import SlurmhetExecutor

    folder.mkdir(exist_ok=True)
    resubmission.record(folder.parent, points)
    _cancel_dead(points, folder.parent)
    executor, rows, failure = SlurmhetExecutor(folder), list[SweepPoint](), None
    try:
        for point, name in zip(points, names, strict=True):
            with process.deferred_interrupt():  # so that no queued job misses in the table
                script = _script(point, name)
                job = executor.submit_with(script, point.config.launch.minutes, point)
                log = str(job.paths.stdout)
                rows.append(_row(point, job=job.job_id, slot=name, log=log))
    except slurm.SlurmError as error:
        key = cluster_check.key_of(str(error))
        refused = f"sbatch refused point {points[len(rows)].num}" + (f" ({key})" if key else "")
        failure = f"{refused}: {error}"
    finally:
        _write_table(folder.parent, rows)
        if rows:
            _show(rows, folder.parent)
        if len(rows) < len(points):
            left = ", ".join(str(point.num) for point in points[len(rows) :])
            print(
                *([failure] if failure else []),
                f"{len(rows)} of {len(points)} points were queued. Not submitted: point {left}. "
                "The same command submits them.",
                sep="\n",
                file=sys.stderr,
            )
    if failure:
        sys.exit(1)


def _cancel_dead(points: list[Point], sweep_dir: Path) -> None:
    """Cancel jobs of these points that are in the queue and can never start."""
    places = {str(point.run_dir) for point in points}
    jobs = [row.job for row in report.sweep_table(sweep_dir) if row.run_dir in places]
    for job, state in slurm.known_states(jobs).items():
        if (state or "").endswith(slurm.NEVER):
            slurm.try_command("scancel", job)


def _script(point: Point, name: str | None) -> Any:
    return lambda command, output: sbatch.script(point.config, output, command, name)


def _dry_run(points: list[Point], folder: Path, names: list[str | None], checked: bool) -> Outcomes:
    """Print the sbatch scripts exactly as they would be submitted, and the GPU-hours requested."""
    submit = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]
    command = shlex.join(["env", "SUBMITIT_EXECUTOR=slurm", *submit])
    hours = 0.0
    for point, name in zip(points, names, strict=True):
        hours += sbatch.gpu_hours(point.config)
        print(f"# point {point.num}: {' '.join(_shown(point))}")
        script = sbatch.script(point.config, f"{folder}/%j_0_log.out", command, name)
        print(masking.mask_assignments(script))
    unchecked = (
        " The roles' Python environments were not checked: `atropos-hpc validate` does that."
    )
    if not checked:
        unchecked += " Slurm does not answer here: whether it can start the jobs was not checked."
    total = f"{len(points)} jobs, at most {hours:.1f} GPU-hours"
    print(f"# {total}. Nothing was submitted (launch.dry_run).{unchecked}")
    return [(point, None) for point in points]


def _wait(points: list[Point], sweep_dir: Path) -> Outcomes:
    """Wait until every point has ended, and print a line for each change of a point."""
    known = {row.run_dir: row for row in report.sweep_table(sweep_dir)}
    rows = [known.get(str(p.run_dir)) or _row(p, job=None, slot=None, log=None) for p in points]
    printed: list[str] = []
    ended = 0  # in this many polls in a row: a job being requeued appears ended for a moment
    away = False
    while True:
        time.sleep(POLL_S if printed or away else 0.0)
        was_away, away = away, not slurm.is_reachable()
        if away != was_away:
            print("Slurm", "does not answer; waiting" if away else "answers again", file=sys.stderr)
        if away:
            continue
        jobs = slurm.known_states(row.job for row in rows)
        found = [report.point_status(row, jobs) for row in rows]
        lines = [
            f"{point.num:>3}  {each.state:<10} step {each.step}/{each.steps}"
            for point, each in zip(points, found, strict=True)
        ]
        for line, before in zip(lines, printed or [""] * len(lines), strict=True):
            if line != before:
                print(line, file=sys.stderr)
        printed = lines
        ended = ended + 1 if all(each.state in ENDED for each in found) else 0
        if ended == 2:
            print(report.table(found), file=sys.stderr)
            return [(point, each.state) for point, each in zip(points, found, strict=True)]


# --- this machine


def here(points: list[Point], sweep_dir: Path, slots: int, resumed: bool = False) -> Outcomes:
    """Run one process per point, `slots` at a time, with the command that would resume the point.

    Waits for all. A signal to stop is forwarded: running points save, the others do not start.
    """
    if points[0].config.launch.dry_run:
        for point in points:
            print(shell.printed(*_command(point)))
        print("# Nothing was started (launch.dry_run).")
        return [(point, None) for point in points]
    logs, codes = dict[int, Path](), dict[int, int]()
    try:
        with resubmission.locked(sweep_dir):
            new = _unfinished(points, sweep_dir, resumed)
            _refuse(new, False)
            logs = {point.num: sweep_dir / f"{point.num}.log" for point in new}
            rows = [_row(point, job=None, slot=None, log=str(logs[point.num])) for point in new]
            resubmission.record(sweep_dir, new)
            _write_table(sweep_dir, rows)
    except Refused as error:
        sys.exit(refuse(error.problems, SWEEP_REFUSED))
    if new:
        _show(rows, sweep_dir)
        codes = _run_processes(new, logs, slots)
        print(report.table([report.point_status(row, {}) for row in rows]), file=sys.stderr)
    skipped: Outcomes = [(point, None) for point in points if point not in new]
    return skipped + [(p, _OUTCOMES.get(codes.get(p.num, 75), "failed")) for p in new]


def _run_processes(points: list[Point], logs: dict[int, Path], slots: int) -> dict[int, int]:
    """Return the exit code of each point that was started."""
    waiting, signals = list(points), list[int]()
    running, codes = dict[int, process.Child](), dict[int, int]()
    handled = (signal.SIGINT, signal.SIGTERM)
    previous = {each: signal.signal(each, lambda *_: signals.append(1)) for each in handled}
    forwarded = 0
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < slots and not signals:
                point = waiting.pop(0)
                name, command = f"point-{point.num}", _command(point)
                running[point.num] = process.start(name, command, logs[point.num])
                print(f"point {point.num} started: {' '.join(_shown(point))}", file=sys.stderr)
            for child in running.values() if len(signals) > forwarded else ():
                os.kill(child.pid, signal.SIGTERM)
            forwarded = len(signals)
            for num in [num for num, child in running.items() if child.poll() is not None]:
                codes[num] = running.pop(num).process.returncode
                print(f"point {num} {_OUTCOMES.get(codes[num], 'failed')}", file=sys.stderr)
            time.sleep(0.2)
    finally:
        process.end(running.values(), save_timeout_s(points[0].config))
        for number, handler in previous.items():
            signal.signal(number, handler)
    return codes


_OUTCOMES = {0: "complete", 75: "stopped"}


def _command(point: Point) -> list[str]:
    overrides = [override for override in point.overrides if not override.startswith("run_dir=")]
    own = shell.override("run_dir", point.run_dir)
    return [sys.executable, "-m", "atropos_hpc.train", *overrides, own]


# --- both of them


def _shown(point: Point) -> list[str]:
    """Return a point's overrides without secrets."""
    return [masking.mask_assignments(override) for override in point.overrides]


def _refuse(points: Sequence[Point], on_slurm: bool, roles: bool = True) -> None:
    """Raise Refused with the problems of all points, each listed once, if there are any.

    Otherwise print what may end their jobs, but is no reason to refuse them.
    """
    found: dict[Problem, list[int]] = {}
    for point in points:
        previous = RunDir(point.run_dir).info()
        for problem in preflight.check(
            point.config, point.run_dir, previous, on_slurm, imports=on_slurm, roles=roles
        ):
            found.setdefault(problem, []).append(point.num)
    if found:
        raise Refused(*itertools.starmap(_at_points, found.items()))
    warned = (w for point in points for w in memory_check.warnings(point.config))
    for warning in dict.fromkeys(warned):
        print(f"warning: {warning}", file=sys.stderr)


def _at_points(problem: Problem, nums: list[int]) -> Problem:
    listed = ", ".join(map(str, nums[:5])) + (", ..." if len(nums) > 5 else "")
    return Problem(problem.key, f"{problem.message} (point {listed})")


def _row(point: Point, job: str | None, slot: str | None, log: str | None) -> SweepPoint:
    return SweepPoint(
        num=point.num,
        overrides=_shown(point),
        run_dir=str(point.run_dir),
        steps=point.config.trainer.steps,
        job=job,
        slot=slot,
        log=log,
        submitted=time.time(),
    )


def _write_table(sweep_dir: Path, rows: list[SweepPoint]) -> None:
    """Write the table. Rows of earlier submissions to the same run directories are replaced."""
    if not rows:
        return
    new = {row.run_dir for row in rows}
    old = [row for row in report.find_points(sweep_dir) if row.run_dir not in new]
    table = sorted([*old, *rows], key=lambda row: row.num)
    write_struct(sweep_dir / "jobs.json", table)


def _show(rows: list[SweepPoint], sweep_dir: Path) -> None:
    lines = [["point", "job", "overrides", "run directory", "log"]]
    for row, overrides in zip(rows, report.varying([row.overrides for row in rows]), strict=True):
        lines.append(
            [str(row.num), row.job or "-", " ".join(overrides), row.run_dir, row.log or "-"]
        )
    print(report.aligned(lines))
    progress = shell.printed("atropos-hpc", "status", sweep_dir)
    print(f"This table is in {sweep_dir / 'jobs.json'}. Progress: {progress}")
