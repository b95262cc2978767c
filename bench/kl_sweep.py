"""Sweep the KL coefficient on a private Slurm cluster with the real components.

KL coefficients 0, 0.001, 0.01 and 0.1, two seeds each, on the arithmetic task with a tolerance: an
answer that is at most 3 off the sum counts as right, and groups of equal scores are trained on. The
result is the mean KL to the reference over the last tenth of the steps. The sweep's report is drawn
as well.

Why with a tolerance: the best policy at coefficient b gives an answer of advantage A a probability
in proportion to its reference's times exp(A / b) (arXiv 2205.11275), and right and wrong answers
differ by about 2 in their advantage. So up to 0.1 the best policy is always right, whatever the
coefficient, and if one answer is right, that determines the policy and its distance to the
reference. With several, the reward does not say how often to give which: without a penalty the
policy drifts to some of them, with one it keeps the reference's choice. In groups of equal scores
only the penalty has a gradient. Without them, which is Atropos' default, advantages of 2 outweigh a
penalty of some hundredths in every group of a batch."""

import statistics
import tempfile
import time
from pathlib import Path

from atropos_hpc.observe import history, html_report, report
from atropos_hpc.runtime.run_dir import read_json
from bench.parts import sweeps
from bench.result import Result

COEFFICIENTS = (0.0, 0.001, 0.01, 0.1)
SEEDS = (0, 1)
STEPS = 160
PATIENCE_S = 3600.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def main() -> Result:
    from slurm_cluster import Cluster

    points = [
        f"algorithm.kl_coef={','.join(map(str, COEFFICIENTS))}",
        f"seed={','.join(map(str, SEEDS))}",
    ]
    quick = [
        "evaluation.every=80",
        "trainer.checkpoint_every=40",
        f"trainer.steps={STEPS}",
        "environment.config.tolerance=3",
        "environment.config.ensure_scores_are_not_same=false",
        "model.make_options.seed=0",
        "cluster.shared=[/]",
        "roles.rollout.cpus_per_task=4",
        "hydra.launcher.slots=2",
    ]
    kept = tempfile.mkdtemp(prefix="kl_sweep-")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Cluster(Path(scratch) / "cluster", nodes=2) as cluster,
    ):
        sweep = Path(kept) / "sweep"
        sweeps.submit(sweep, cluster.env, *points, *quick)
        deadline = time.monotonic() + PATIENCE_S
        jobs = {row["job"] for row in read_json(sweep / "jobs.json")}
        while any(
            state not in ENDED for job, state in cluster.jobs().items() if job.split("+")[0] in jobs
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(jobs)} jobs did not end within {PATIENCE_S:.0f} s; see {sweep}"
                )
            time.sleep(2.0)
        found = [report.point_status(point, {}) for point in report.require_points(sweep)]
        print(report.table(found))
        print(html_report.write(sweep, found, sweep / "report"))
    if unfinished := [row.run_dir for row in found if row.state != "complete"]:
        raise RuntimeError(
            f"{len(unfinished)} of {len(found)} points are not complete: {', '.join(unfinished)}"
        )
    runs = [history.read(Path(row.run_dir)) for row in found]
    rows = [
        {
            "kl_coef": coefficient,
            "KL to the reference": statistics.mean(run.final("kl_reference") for run in of),
            "its spread over seeds": max(run.final("kl_reference") for run in of)
            - min(run.final("kl_reference") for run in of),
            "accuracy, held out": statistics.mean(run.accuracy for run in of),
            "reward": statistics.mean(run.final("reward") for run in of),
        }
        for (coefficient,), of in history.grouped(runs, ["algorithm.kl_coef"]).items()
    ]
    result = Result(rows, details={"steps": STEPS, "seeds": len(SEEDS), "points": len(found)})
    result.at_least("points that are complete", len(found), len(COEFFICIENTS) * len(SEEDS))
    by = {row["kl_coef"]: row["KL to the reference"] for row in rows}
    result.details["KL at a coefficient of 0.001, of that at 0"] = by[0.001] / by[0.0]
    for low, high, share in ((0.0, 0.01, 1.0), (0.01, 0.1, 0.8)):
        result.at_most(
            f"KL at a coefficient of {high:g}, of that at {low:g}", by[high] / by[low], share
        )
    return result
