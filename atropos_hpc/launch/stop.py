"""Stop a run, or all points of a sweep: `atropos-hpc stop RUN|SWEEP`.

A running one gets a request, which its supervisor and learner obey wherever they run. One that
waits in Slurm's queue is cancelled: there is nothing to save.
"""

import sys
from pathlib import Path

from atropos_hpc.contracts.members import StopRequest, SupervisorState
from atropos_hpc.contracts.metrics import SweepPoint
from atropos_hpc.observe import report
from atropos_hpc.runtime import shell, slurm
from atropos_hpc.runtime.membership import RosterReader, post_request
from atropos_hpc.runtime.run_dir import RunDir


def stop(directory: Path) -> int:
    """Stop what `directory` holds. Returns 1 if nothing runs or waits there, or if that is
    not known of a job. Raises report.NotARunError, and SlurmError if a job cannot be cancelled."""
    points = report.require_points(directory)
    jobs = slurm.known_states(point.job for point in points)
    done = [_stop(point, jobs) for point in points]
    if stopped := [line for line in done if line]:
        resume = shell.printed("atropos-hpc", "resume", directory)
        print(*stopped, f"`{resume}` continues", sep="\n")
    others = [point for point, line in zip(points, done, strict=True) if not line]
    if unknown := [str(point.job) for point in others if _may_wait(point, jobs)]:
        print(
            f"may still start: job {', '.join(unknown)}. Slurm does not answer here; repeat the"
            " command where `squeue` works",
            file=sys.stderr,
        )
    elif not stopped:
        print(f"nothing runs in {directory}", file=sys.stderr)
    return 1 if unknown or not stopped else 0


def _may_wait(point: SweepPoint, jobs: report.JobStates) -> bool:
    """Whether a point's job may be in the queue although Slurm could not be asked."""
    if point.job is None or point.job in jobs:
        return False
    return report.point_status(point, jobs).state in ("queued", "requeued")


def _stop(point: SweepPoint, jobs: report.JobStates) -> str | None:
    run, state = RunDir(Path(point.run_dir)), jobs.get(point.job or "")
    waits = state in slurm.PENDING or (state or "").endswith(slurm.NEVER)
    if waits and point.job is not None:
        slurm.run_command("scancel", point.job)
        return f"cancelled: job {point.job} of {run.path}, which waited in the queue"
    if RosterReader(run.roster).members(SupervisorState):
        post_request(run, StopRequest(by="atropos-hpc stop"))
        return f"requested: the learner saves a checkpoint and the run in {run.path} ends"
    if slurm.holds_nodes(state) and point.job is not None:
        slurm.run_command("scancel", point.job)  # it has started, and its run has not yet
        return f"cancelled: job {point.job} of {run.path}, which was starting"
    return None
