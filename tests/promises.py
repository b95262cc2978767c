"""The design's invariants, checked on a run that ended with success, whatever happened to it.

They are read from its journal, metrics and checkpoints.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from run_files import evaluations, step_metrics
from run_parts import Started

from atropos_hpc.contracts.group import Group, read_group
from atropos_hpc.contracts.wal_record import EVENT, GROUP, scan
from atropos_hpc.environments.addition import PROMPT_TOKENS
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.trajectories import events

BATCH, STALENESS = 64, 1  # of the runs that are checked
TRAIN_PROBLEMS = 100  # a run of 30 steps draws some epochs of them
OUTCOMES = ("accepted", "stale", "no_signal", "refused", "failed", "lost")
# The base policy has 0.38; five standard deviations of 300 answers below, the policy was harmed.
WORST_ACCURACY = 0.28
# Mean |log-prob of the server - of the learner|; with the right weights it stays below 0.05.
WORST_MISMATCH = 0.3


@dataclass
class History:
    """The contents of the journal."""

    groups: dict[int, Group]
    hashes: Counter[int]
    batches: dict[int, list[int]]
    dropped: list[int]
    problems: list[str]
    items: dict[int, str]  # hashes of the prompts that workers drew or skipped, by number


def history(started: Started) -> History:
    """From the first segment on. Events beyond these (registrations) do not matter here."""
    found = History({}, Counter(), {}, [], [], {})
    for path in sorted(started.run.trajectories.glob("*.journal")):
        data = bytearray(path.read_bytes())
        for start, end, header in scan(data):
            if header.kind == GROUP:
                found.groups[header.gid] = read_group(data, start, header)
                found.hashes[header.hash] += 1
            elif header.kind == EVENT:
                match events.read_event(header, memoryview(data)[start:end]):
                    case events.BatchFormed(number, gids, _):
                        if number != len(found.batches):
                            before = len(found.batches) - 1
                            found.problems.append(f"batch {number} was formed after {before}")
                        found.batches[number] = gids
                    case events.GroupsDropped(gids):
                        found.dropped += gids
                    case events.PromptsDrawn(request):
                        found.items |= {seen.number: seen.item for seen in request.seen}
                    case events.Reset():
                        found.problems.append("the journal was reset")
    return found


def violations(started: Started, steps: int) -> list[str]:
    """What of the promises does not hold, after a run that ended with success at `steps`."""
    past, lines = history(started), step_metrics(started.run)
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
    problems += prompt_violations(past, server["prompts"])
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


def prompt_violations(past: History, told: dict[str, dict[str, Any]]) -> list[str]:
    """Each prompt is drawn once per epoch, has one outcome, and one group where it was accepted."""
    problems = []
    by_draw: dict[int, list[Group]] = defaultdict(list)
    for group in past.groups.values():
        draw = (group.generation_params or {}).get("draw")
        if draw is None:
            return ["a group without a draw"]
        by_draw[draw["number"]].append(group)
    (counts,) = told.values()  # of the only environment
    settled = sum(counts[name] for name in OUTCOMES)
    if settled + counts["outstanding"] + counts["returned"] != counts["drawn"]:
        problems.append(f"prompts without an outcome, or with two: {counts}")
    if counts["accepted"] + counts["stale"] != len(by_draw):
        problems.append(f"{len(by_draw)} prompts have groups: {counts}")
    if twice := [number for number, groups in by_draw.items() if len(groups) > 1]:
        problems.append(f"prompts with two groups: {twice}")
    if not counts["ordered"]:
        problems.append("a number named two prompts")
    for epoch in range(counts["drawn"] // TRAIN_PROBLEMS + 1):
        numbers = range(epoch * TRAIN_PROBLEMS, (epoch + 1) * TRAIN_PROBLEMS)
        trained = [
            by_draw[number][0].tokens[:PROMPT_TOKENS].tobytes()
            for number in numbers
            if number in by_draw
        ]
        items = [past.items[number] for number in numbers if number in past.items]
        if len(set(trained)) < len(trained) or len(set(items)) < len(items):
            problems.append(f"a prompt came twice in epoch {epoch}")
    return problems


def final_accuracy(run: RunDir, steps: int) -> float | None:
    """Of the last version, which is evaluated once; None where it was not, or more often."""
    told = [line.accuracy for line in evaluations(run) if line.version == steps]
    return told[0] if len(told) == 1 else None
