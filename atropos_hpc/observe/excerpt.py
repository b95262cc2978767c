"""An excerpt of a run's rollouts, small enough for a page, and the same prompts over versions."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atropos_hpc.contracts.metrics import Rollout
from atropos_hpc.observe import rollouts
from atropos_hpc.runtime.run_dir import RunDir

READ_BYTES = 64 << 20  # of the compressed files, at most
STEPS = 16  # from each of which a group is taken
TIMES = 4  # that the same prompt is shown
SEQUENCES = 8  # of a group
PROMPTS = 4  # side by side

Group = list[Rollout]


@dataclass(frozen=True)
class Excerpt:
    """Groups in order of their step."""

    groups: list[Group]
    steps: int  # that the files which were read have
    files_left_out: int

    @property
    def rollouts(self) -> list[Rollout]:
        return [each for group in self.groups for each in group]

    def side_by_side(self) -> list[list[Group]]:
        """Return the groups of each prompt that was trained several times, in order.

        Without any, groups of a few steps over the run.
        """
        by_prompt: defaultdict[tuple[int, ...], list[Group]] = defaultdict(list)
        for group in self.groups:
            by_prompt[_prompt(group[0])].append(group)
        again = [groups for groups in by_prompt.values() if len(groups) > 1]
        if again or not self.groups:
            return again[:PROMPTS]
        chosen = _evenly(range(len(self.groups)), TIMES)
        return [[self.groups[index] for index in sorted(chosen)]]


def read(run: RunDir, last: int) -> Excerpt:
    """Read the rollouts of a run up to step `last`, leaving out some files of a very large run.

    The first pass chooses a group of some steps, of each environment in turn, and some prompts that
    were trained several times; the second reads those groups.
    """
    found = files = rollouts.files(run.rollouts)
    while sum(path.stat().st_size for *_, path in files) > READ_BYTES and len(files) > 1:
        files = files[::-2][::-1]  # keeps the newest
    due = _evenly(range(files[0][0] if files else 0, last + 1), STEPS)
    shown: Counter[str] = Counter()  # groups by environment
    by_prompt: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # step, group
    steps, chosen = set(), set()
    for each in _sequences(files):
        if each.index == 0:
            steps.add(each.step)
            by_prompt[hash(_prompt(each))].append((each.step, each.group))
            shown.setdefault(each.environment, 0)
            if each.step in due and shown[each.environment] == min(shown.values()):
                shown[each.environment] += 1
                due.remove(each.step)
                chosen.add(each.group)
    furthest = sorted(map(sorted, by_prompt.values()), key=lambda seen: seen[0][0] - seen[-1][0])
    for seen in furthest[:PROMPTS]:
        if len(seen) > 1:
            chosen |= {seen[index][1] for index in _evenly(range(len(seen)), TIMES)}
    groups: defaultdict[int, Group] = defaultdict(list)
    for each in _sequences(files):
        if each.group in chosen and len(groups[each.group]) < SEQUENCES:
            groups[each.group].append(each)
    ordered = sorted(groups.values(), key=lambda group: group[0].step)
    return Excerpt(ordered, len(steps), len(found) - len(files))


def _sequences(files: Sequence[tuple[int, int, Path]]) -> Iterator[Rollout]:
    return (each for *_, path in files for each in rollouts.read_file(path))


def _evenly(values: Sequence[int], count: int) -> set[int]:
    if not values:
        return set()
    return set(np.linspace(values[0], values[-1], count).astype(int).tolist())


def _prompt(each: Rollout) -> tuple[int, ...]:
    return tuple(each.tokens[: each.trained[0][0]] if each.trained else each.tokens)
