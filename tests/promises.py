"""The design's invariants, checked on a run that ended with success, whatever happened to it.

They are read from its journal, metrics and checkpoints.
"""

import math
from collections import Counter

from prompt_coverage import history, prompt_violations
from run_files import evaluations, step_metrics
from run_parts import Started

from atropos_hpc.runtime.run_dir import RunDir, read_json

BATCH, STALENESS = 64, 1  # of the runs that are checked
# The base policy has 0.38; five standard deviations of 300 answers below, the policy was harmed.
WORST_ACCURACY = 0.28
# Mean |log-prob of the server - of the learner|; with the right weights it stays below 0.05.
WORST_MISMATCH = 0.3


def violations(started: Started, steps: int) -> list[str]:
    """What of the promises does not hold, after a run that ended with success at `steps`."""
    past, lines = history(started.run), step_metrics(started.run)
    problems = list(past.problems)

    def check(holds: bool, what: str) -> None:
        if not holds:
            problems.append(what)

    used = Counter(gid for gids in past.batches.values() for gid in gids) + Counter(past.dropped)
    check(
        all(count == 1 for count in used.values()),
        f"groups in two batches: {[gid for gid, n in used.items() if n > 1]}",
    )
    check(
        set(used) <= set(past.groups),
        f"batches name groups that were never journalled: {sorted(set(used) - set(past.groups))}",
    )
    check(all(count == 1 for count in past.hashes.values()), "a group was journalled twice")
    left = len(past.groups) - len(used)
    server = read_json(started.run.members / "trajectories-trainer0-0.json")
    told = server.get("queued_groups")
    check(told == left, f"{left} groups should be left in the queue, the server has {told}")
    problems += prompt_violations(started.run, past)
    check(
        lines[-1].get("prompts/environment/drawn") is not None, "the metrics do not tell of prompts"
    )
    check(
        [line.step for line in lines] == list(range(1, steps + 1)),
        "the steps in metrics.jsonl are not each there once",
    )
    for line in lines:
        number = line.step - 1
        groups = [past.groups[gid] for gid in past.batches.get(number, []) if gid in past.groups]
        sequences = sum(len(group.lengths) for group in groups)
        check(sequences == BATCH, f"batch {number} has {sequences} sequences")
        if not sequences:
            continue
        reward = math.fsum(float(score) for group in groups for score in group.scores) / sequences
        versions = [pair for group in groups for pair in group.policy_versions if pair is not None]
        check(
            abs(line.scalars["reward/mean"] - reward) < 1e-6,
            f"step {line.step}: trained on other rewards than its batch's, {reward}",
        )
        check(
            line.get("tokens") == sum(len(group.tokens) for group in groups),
            f"step {line.step}: trained on other tokens than its batch's",
        )
        check(
            all(oldest >= number - STALENESS for oldest, _ in versions),
            f"batch {number}: too stale",
        )
        check(
            all(newest <= number for _, newest in versions),
            f"batch {number}: sampled by a version that was not there yet",
        )
        mean = math.fsum(number - oldest for oldest, _ in versions) / max(1, len(versions))
        check(
            abs(line.scalars["off_policy/staleness_mean"] - mean) < 1e-6,
            f"step {line.step}: staleness of another batch",
        )
        check(
            line.scalars["off_policy/abs_log_ratio_mean"] < WORST_MISMATCH,
            f"step {line.step}: the servers' log-probs are off",
        )
    check(
        read_json(started.run.checkpoints / "latest.json").get("step") == steps,
        "the last step is not durable",
    )
    check(
        read_json(started.run.done).get("version") == steps, "done.json does not tell the last step"
    )
    accuracy = final_accuracy(started.run, steps)
    check(accuracy is not None and accuracy > WORST_ACCURACY, f"the final accuracy is {accuracy}")
    token = started.run.token().encode()
    telling = [
        path
        for path in started.run.path.rglob("*")
        if path.is_file() and path != started.run.secret and token in path.read_bytes()
    ]
    check(
        not telling and token not in started.output.read_bytes(),
        f"the token stands in {telling or started.output}",
    )
    check(not started.left(), f"processes were left: {started.left()}")
    return problems


def final_accuracy(run: RunDir, steps: int) -> float | None:
    """Of the last version, which is evaluated once; None where it was not, or more often."""
    told = [line.accuracy for line in evaluations(run) if line.version == steps]
    return told[0] if len(told) == 1 else None
