"""What a submission costs beyond Slurm's own sbatch: a sweep of 50 heterogeneous jobs, on a private cluster.

The time from the first point to the last (pickling, script, sbatch, table), against what of it is spent in sbatch itself, on a cluster
whose nodes are drained, so that no job starts. What comes before stands beside it: composing the points, and checking them.
"""

import getpass
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.result import Result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

POINTS = 50
ROUNDS = 3

# A submission as train.py makes it, with the time from the first point to the last, and whatever heavy has been imported.
SUBMIT = """
import sys, time
from atropos_hpc import train
from atropos_hpc.launch import sweep
from hydra_plugins.atropos_hpc_launcher import launcher
spent = []
def timed(of, launch):
    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        try:
            return launch(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)
    return wrapped
in_sbatch = []
def command(self, *args, **kwargs):
    start = time.perf_counter()
    try:
        return run_command(self, *args, **kwargs)
    finally:
        in_sbatch.append(time.perf_counter() - start)
from submitit.core import utils
run_command, utils.CommandFunction.__call__ = utils.CommandFunction.__call__, command
sweep._refuse = timed("checks", sweep._refuse)
sweep.on_slurm = timed("all", sweep.on_slurm)
sys.argv = ["atropos_hpc.train", *sys.argv[1:]]
start = time.perf_counter()
train.main()
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "verl", "vllm"})
import json
measured = {"total": time.perf_counter() - start, "checks": spent[0], "submission": spent[1] - spent[0], "sbatch": sum(in_sbatch)}
print("MEASURED", json.dumps({**measured, "heavy": heavy}))
"""


def submit(env: dict[str, str], sweep: Path, overrides: list[str]) -> dict[str, Any]:
    """One submission through the launcher; the seconds of its parts."""
    command = [sys.executable, "-c", SUBMIT, "-m", "hydra/launcher=submitit_slurm", f"run_dir={sweep}", f"seed=range({POINTS})", *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=600, cwd=sweep.parent)
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED"))
    measured: dict[str, Any] = json.loads(line.removeprefix("MEASURED"))
    return measured


def main() -> Result:
    from slurm_cluster import Cluster
    from slurm_parts import QUICK, stand_in

    rows: list[dict[str, Any]] = []
    heavy: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch, Cluster(Path(scratch) / "cluster", nodes=2) as cluster:
        cluster.command("scontrol", "update", "nodename=ALL", "state=drain", "reason=bench")
        for number in range(ROUNDS):
            sweep = Path(scratch) / f"sweep-{number}"
            measured = submit(cluster.env, sweep, [*QUICK, *stand_in(Path(scratch))])
            cluster.command("scancel", "-u", getpass.getuser())
            heavy.update(measured["heavy"])
            composing = measured["total"] - measured["checks"] - measured["submission"]
            rows.append({
                "submission, s": measured["submission"], "of it sbatch, s": measured["sbatch"],
                "overhead": measured["submission"] / measured["sbatch"] - 1,
                "composing, s": composing, "checks, s": measured["checks"],
            })  # fmt: skip
    result = Result(rows, details={"points": POINTS, "heavy modules in the submitting process": sorted(heavy)})
    result.at_most("submission beyond sbatch's own time, median", statistics.median(row["overhead"] for row in rows), 0.30)
    result.at_most("torch, ray, verl or vllm in the submitting process", len(heavy), 0)
    return result
