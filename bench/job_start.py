"""Measure a submission of three points, and what follows in their jobs, with the real components.

A private cluster of two nodes runs the points of the demo one after the other, through the launcher
and real sbatch. Of the submission: CPU seconds of the command with all processes that it starts. Of
each job: seconds from its start (Slurm's StartTime, in whole seconds) until every member of the run
is alive, which includes the learner with its model and the environment worker, and until every
member has finished starting: then vLLM serves the first policy version. A job is cancelled there.
"""

import os
import resource
import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.members import AnyMember, Roster
from atropos_hpc.runtime.run_dir import RunDir, read_json, read_struct
from bench.parts import sweeps
from bench.result import Result

KL_COEFS = "0,0.001,0.01"
MEMBERS = {"supervisor", "trajectories", "trainer", "agent", "environment"}
PATIENCE_S = 120.0


def submit(env: dict[str, str], sweep: Path) -> dict[str, float]:
    """Submit the points; return CPU and wall seconds."""
    overrides = [
        f"algorithm.kl_coef={KL_COEFS}",
        "hydra.launcher.slots=1",
        "evaluation.every=0",
        "evaluation.before=false",
        "evaluation.after=false",
        "cluster.shared=[/]",
        "roles.rollout.cpus_per_task=4",
    ]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    sweeps.submit(sweep, env, *overrides)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"submission, CPU s": cpu_s, "submission, s": time.monotonic() - start}


def members(run: RunDir) -> list[AnyMember]:
    """Return the members that are alive, of a run whose every kind has one; [] before."""
    roster = read_struct(run.roster, Roster) or Roster()
    alive = [member for member in roster.members.values() if member.alive]
    return alive if {member.kind for member in alive} >= MEMBERS else []


def follow(cluster: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Wait until a point's job and its members have started, then cancel it; return the seconds."""
    from slurm_cluster import until

    run, job = RunDir(Path(row["run_dir"])), row["job"]

    def wait_for(what: str, look: Any) -> Any:
        return until(what, look, PATIENCE_S, cluster.story)

    wait_for("running job", lambda: cluster.jobs().get(f"{job}+0") == "RUNNING")
    start = datetime.fromisoformat(cluster.job(job)["StartTime"]).timestamp()
    alive = wait_for("members", lambda: members(run))
    last = max(alive, key=lambda member: member.started)
    first = min(alive, key=lambda member: member.started)
    wait_for(
        "members that have finished starting",
        lambda: (found := members(run)) and all(member.reported for member in found),
    )
    ready = time.time()
    cluster.command("scancel", job)
    wait_for("end of the job", lambda: cluster.jobs()[f"{job}+0"] == "CANCELLED")
    return {
        "first member, s": first.started - start,
        "all members alive, s": last.started - start,
        "the last one": last.kind,
        "all have finished starting, s": ready - start,
    }


def main() -> Result:
    from slurm_cluster import Cluster

    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch) / "cluster", nodes=2) as cluster,
    ):
        sweep = Path(scratch) / "sweep"
        spent = submit(cluster.env, sweep)
        rows = [follow(cluster, row) for row in read_json(sweep / "jobs.json")]
    medians = {
        name: statistics.median(row[name] for row in rows)
        for name in rows[0]
        if name.endswith(", s")
    }
    details = {**spent, "medians": medians, "load of the machine before": load}
    result = Result(rows, details=details)
    result.at_most("CPU seconds of a submission of three points", spent["submission, CPU s"], 14)
    result.at_most("seconds to all members, median", medians["all members alive, s"], 14)
    return result
