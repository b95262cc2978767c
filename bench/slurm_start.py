"""Measure the submission of a sweep of three points, and a job from its start to its members.

Real roles on a private cluster: the submission checks both Python environments, the model and the
environment, as a user's does. Its CPU time includes that of the checks, its wall time is what the
user waits for. Nodes are drained while the points are submitted. Then one job starts: the time from
Slurm's start of the job until the trainer's rank and the node agent are in the roster, that is from
paying for nodes until both roles' processes run. The demo's model is in the cache by then.
"""

import getpass
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.result import Result

POINTS = "algorithm.kl_coef=0,0.001,0.01"
ROUNDS = 2
MAX_CPU_S, MAX_START_S = 30.0, 15.0


def children_s() -> float:
    """Return the CPU time of this process's children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(cluster: Any, sweep: Path) -> dict[str, float]:
    """Submit a sweep, start one of its jobs, and cancel all."""
    from slurm_cluster import until
    from slurm_parts import Submitted, submit

    cluster.command("scontrol", "update", "nodename=ALL", "state=drain", "reason=bench")
    cpu_s, start = children_s(), time.perf_counter()
    submit(cluster, sweep, POINTS)
    row = {"submission, CPU s": children_s() - cpu_s, "submission, s": time.perf_counter() - start}
    first = json.loads((sweep / "jobs.json").read_text())[0]
    run = Submitted(cluster, Path(first["run_dir"]), first["job"])
    cluster.command("scontrol", "update", "nodename=ALL", "state=resume")
    until("the job's start", lambda: run.state() == "RUNNING", 60, run.story)
    start = time.perf_counter()
    for kind in ("agent", "trainer"):
        until(f"the {kind}", lambda kind=kind: run.member(kind), 120, run.story)
        row[f"job's start to the {kind}, s"] = time.perf_counter() - start
    cluster.command("scancel", "-u", getpass.getuser())
    cluster.clear()
    return row


def main() -> Result:
    from slurm_cluster import Cluster

    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch) / "cluster", nodes=2) as cluster,
    ):
        rows = [measure(cluster, Path(scratch) / f"sweep-{number}") for number in range(ROUNDS)]
    result = Result(list(rows), details={"points": 3, "load of the machine before": load})
    least = {name: min(row[name] for row in rows) for name in rows[0]}
    result.at_most("CPU seconds of the submission", least["submission, CPU s"], MAX_CPU_S)
    result.at_most(
        "seconds from the job's start to its members, least",
        max(value for name, value in least.items() if name.startswith("job")),
        MAX_START_S,
    )
    return result
