"""Measure what a submission costs beyond sbatch: a sweep of 50 heterogeneous jobs.

Three things alternate on a private cluster whose nodes are drained, so that no job starts: the
launcher with 50 points, the launcher with one, and a shell loop that passes sbatch the scripts that
the launcher wrote. Overhead is read in two ways. Queueing alone: pickling, script and table, beyond
the time of its sbatch calls. Per further point: what 50 take longer than one, from composing and
checks to the table, beyond a script of the loop. The rest occurs once per command: Hydra's start,
the queries to the cluster."""

import getpass
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.result import Result

POINTS = 50
ROUNDS = 5

# A submission by `python -m atropos_hpc.train -m`, with its seconds and those spent in sbatch.
SUBMIT = """
import json, sys, time
from atropos_hpc import train
from atropos_hpc.launch import submitit_api, sweep  # before the clock starts
from atropos_hpc.runtime import slurm
run_command, in_sbatch = slurm.submit, []
def timed(*args, **kwargs):
    start = time.perf_counter()
    try:
        return run_command(*args, **kwargs)
    finally:
        in_sbatch.append(time.perf_counter() - start)
slurm.submit = timed
submit, queueing = sweep._submit, []
def timed_submit(*args):
    start = time.perf_counter()
    try:
        return submit(*args)
    finally:
        queueing.append(time.perf_counter() - start)
sweep._submit = timed_submit
sys.argv = ["atropos_hpc.train", *sys.argv[1:]]
start = time.perf_counter()
train.main()
spent = time.perf_counter() - start
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "verl", "vllm"})
measured = {"all": spent, "queueing": queueing[0], "sbatch": sum(in_sbatch), "heavy": heavy}
print("MEASURED", json.dumps(measured))
"""
LOOP = 'for script in "$@"; do sbatch "$script" >/dev/null; done'


def launcher(env: dict[str, str], sweep: Path, points: int, overrides: list[str]) -> dict[str, Any]:
    """Submit once through the launcher; return its seconds."""
    command = [
        sys.executable,
        "-c",
        SUBMIT,
        "-m",
        "hydra/launcher=submitit_slurm",
        f"run_dir={sweep}",
        f"seed=range({points})",
        *overrides,
    ]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=True, timeout=600, cwd=sweep.parent
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    measured: dict[str, Any] = json.loads(line.removeprefix("MEASURED"))
    return measured


def plain(env: dict[str, str], scripts: list[Path]) -> float:
    """Submit the same scripts in a shell loop; return its seconds."""
    start = time.perf_counter()
    subprocess.run(
        ["bash", "-ec", LOOP, "loop", *map(str, scripts)],
        env=env,
        check=True,
        timeout=600,
        capture_output=True,
    )
    return time.perf_counter() - start


def main() -> Result:
    from slurm_cluster import Cluster
    from slurm_parts import QUICK, stand_in

    rows: list[dict[str, Any]] = []
    heavy: set[str] = set()
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch) / "cluster", nodes=2) as cluster,
    ):
        cluster.command("scontrol", "update", "nodename=ALL", "state=drain", "reason=bench")
        overrides = [*QUICK, *stand_in(Path(scratch))]
        for number in range(ROUNDS):
            one = launcher(cluster.env, Path(scratch) / f"one-{number}", 1, overrides)
            sweep = Path(scratch) / f"sweep-{number}"
            many = launcher(cluster.env, sweep, POINTS, overrides)
            by_hand = plain(cluster.env, sorted((sweep / ".submitit").glob("*_submission.sh")))
            cluster.command("scancel", "-u", getpass.getuser())
            heavy.update(many["heavy"])
            further = (many["all"] - one["all"]) / (POINTS - 1)
            rows.append(
                {
                    f"launcher, {POINTS} points, s": many["all"],
                    "launcher, 1 point, s": one["all"],
                    "plain loop, s": by_hand,
                    "a further point, ms": 1000 * further,
                    "a script of the loop, ms": 1000 * by_hand / POINTS,
                    "queueing, s": many["queueing"],
                    "of it in sbatch, s": many["sbatch"],
                    "queueing beyond sbatch": many["queueing"] / many["sbatch"] - 1,
                }
            )

    def median(column: str) -> float:
        return statistics.median(row[column] for row in rows)

    further, loop = median("a further point, ms"), median("a script of the loop, ms")
    details = {
        "points": POINTS,
        "a further point, beyond a script of the plain loop": further / loop - 1,
        "the whole command, by the plain loop": median(f"launcher, {POINTS} points, s")
        / median("plain loop, s"),
        "once per command, s": median("launcher, 1 point, s") - loop / 1000,
        "heavy modules in the submitting process": sorted(heavy),
        "load of the machine before": load,
    }
    result = Result(rows, details=details)
    result.at_most(
        "queueing beyond its sbatch calls, median", median("queueing beyond sbatch"), 0.30
    )
    result.at_most("torch, ray, verl or vllm in the submitting process", len(heavy), 0)
    return result
