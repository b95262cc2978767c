"""Crash and damage the policy store at 500 random points of each kind in tests/policy_crashes.py.

No reader may serve wrong weights, and the run must continue after each.
"""

from policy_crashes import KINDS, try_points

from atropos_hpc.policy import follower
from bench.result import Result

POINTS = 500


def main() -> Result:
    follower.log.disabled = True
    result = Result([])
    for kind in KINDS:
        row = try_points(kind, range(POINTS))
        stuck = len(row["did not go on"])
        result.rows.append(row | {"did not go on": stuck})
        wrong = f"{kind}: answers with wrong weights in {POINTS} points"
        result.at_most(wrong, row["wrong answers"], 0)
        result.at_most(f"{kind}: points after which the run did not continue", stuck, 0)
    return result
