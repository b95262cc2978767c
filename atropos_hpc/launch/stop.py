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
    """Stop what `directory` holds. Returns 1 if nothing runs or waits there. Raises
    report.NotARunError, and SlurmError if a job cannot be cancelled."""
    points = report.require_points(directory)
    jobs = slurm.known_states(point.job for point in points)
    done = [line for point in points if (line := _stop(point, jobs))]
    if not done:
        print(f"nothing runs in {directory}", file=sys.stderr)
        return 1
    resume = shell.printed("atropos-hpc", "resume", directory)
    print(*done, f"`{resume}` continues", sep="\n")
    return 0


def _stop(point: SweepPoint, jobs: report.JobStates) -> str | None:
    run, state = RunDir(Path(point.run_dir)), jobs.get(point.job or "")
    waits = state in report.PENDING or (state or "").endswith(slurm.NEVER)
    if waits and point.job is not None:
        slurm.run_command("scancel", point.job)
        return f"cancelled: job {point.job} of {run.path}, which waited in the queue"
    if RosterReader(run.roster).members(SupervisorState):
        post_request(run, StopRequest(by="atropos-hpc stop"))
        return f"requested: the learner saves a checkpoint and the run in {run.path} ends"
    if state in report.RUNNING and point.job is not None:
        slurm.run_command("scancel", point.job)  # it has started, and its run has not yet
        return f"cancelled: job {point.job} of {run.path}, which was starting"
    return None
