"""Whether a run of the arithmetic task drew each prompt once per epoch, by its journal.

An epoch of an undisturbed run has each training problem once, so an epoch of a disturbed run that
does, too, has the same multiset of prompts.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from atropos_hpc.contracts.group import Group, read_group
from atropos_hpc.contracts.wal_record import EVENT, GROUP, scan
from atropos_hpc.environments.addition import PROMPT_TOKENS, Problem, encode, problems
from atropos_hpc.rollout.prompt_stream import item_hash
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.trajectories import events

TRAIN_PROBLEMS = 100  # a short run comes to some epochs of them
FEW_PROBLEMS = f"environment.config.train_problems={TRAIN_PROBLEMS}"
OUTCOMES = ("accepted", "stale", "no_signal", "refused", "failed", "lost")


@dataclass
class History:
    """The contents of the journal."""

    groups: dict[int, Group] = field(default_factory=dict)
    hashes: Counter[int] = field(default_factory=Counter)
    batches: dict[int, list[int]] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    items: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))  # by number
    no_signal: set[int] = field(default_factory=set)  # numbers that a worker reported as such


def history(run: RunDir) -> History:
    """From the first segment on. Events beyond these (registrations) do not matter here."""
    found = History()
    for path in sorted(run.trajectories.glob("*.journal")):
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
                        for seen in request.seen:
                            found.items[seen.number].add(seen.item)
                        found.no_signal |= {
                            each.number for each in request.reports if each.outcome == "no_signal"
                        }
                    case events.Reset():
                        found.problems.append("the journal was reset")
    return found


def assert_prompts_are_covered(run: RunDir, epochs: int) -> None:
    """Assert it of a run that has ended with success, after at least so many whole epochs."""
    assert prompt_violations(run, history(run), epochs) == []


def prompt_violations(run: RunDir, past: History, epochs: int = 0) -> list[str]:
    """Each prompt is drawn once per epoch, has one outcome, and one group where it was accepted."""
    by_draw: dict[int, list[Group]] = defaultdict(list)
    training = {item_hash(problem): problem for problem in training_problems(run)}
    found = []
    for group in past.groups.values():
        draw = (group.generation_params or {}).get("draw")
        if draw is None:
            return ["a group without a draw"]
        by_draw[draw["number"]].append(group)
        past.items[draw["number"]].add(draw["item"])
        if group.tokens[:PROMPT_TOKENS].tolist() != encode(training[draw["item"]].prompt):
            found.append(f"the group of prompt {draw['number']} is of another one")
    server = read_json(run.members / "trajectories-trainer0-0.json")
    (counts,) = server["prompts"].values()  # of the only environment
    if (
        sum(counts[name] for name in OUTCOMES) + counts["outstanding"] + counts["returned"]
        != (counts["drawn"])
    ):
        found.append(f"prompts without an outcome, or with two: {counts}")
    if counts["accepted"] + counts["stale"] != len(by_draw):
        found.append(f"{len(by_draw)} prompts have groups: {counts}")
    if counts["no_signal"] != len(silent := past.no_signal - by_draw.keys()):
        found.append(f"{len(silent)} prompts had equal scores: {counts}")
    if twice := [number for number, groups in by_draw.items() if len(groups) > 1]:
        found.append(f"prompts with two groups: {twice}")
    if not counts["ordered"] or any(len(items) > 1 for items in past.items.values()):
        found.append("a number named two prompts")
    whole = 0
    for epoch in range(counts["drawn"] // len(training) + 1):
        numbers = range(epoch * len(training), (epoch + 1) * len(training))
        items = Counter(min(past.items[n]) for n in numbers if n in past.items)
        if items - Counter(training.keys()):
            found.append(f"a prompt came twice in epoch {epoch}")
        if all(number in by_draw or number in silent for number in numbers):
            whole += 1
            if items != Counter(training.keys()):
                found.append(f"epoch {epoch} lacks prompts")
    if whole < epochs:
        found.append(f"{whole} whole epochs: {counts}")
    return found


def training_problems(run: RunDir) -> list[Problem]:
    """The problems that the run's environment takes."""
    everything = problems(held_out=False)
    count = run.config().environment.config.get("train_problems")
    assert count is None or isinstance(count, int)
    return everything if count is None else random.Random(0).sample(everything, count)
