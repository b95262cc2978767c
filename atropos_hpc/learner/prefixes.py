"""Find what the sequences of a group have in common, so that the learner computes it only once.

All sequences of a group begin with the same prompt. A causal model computes the same hidden states
for it in each of them. In a pack, the first sequence of a group (the *root*) therefore stands
whole, and every further one (a *branch*) only from where it leaves the root: its tokens attend to
the root's first tokens and to one another. The idea is Prefix Grouper's (arXiv 2506.05433).

    root     0 1 2 3 4 5 6        positions; branches continue the root's
    branch         3 4 5 6 7      prefix 3: attends to the root's positions 0 to 2
    branch               5 6      prefix 5

`prefix` is, for each sequence, the number of leading tokens that it shares with its root, which is
the last sequence before it with prefix 0. A branch always keeps at least one token of its own.
"""

from collections.abc import Callable, Sequence
from heapq import heappush, heapreplace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# A shorter prefix saves less than the extra attention call of its branch costs.
MIN_PREFIX = 16


def shared_prefixes(tokens: Ints, lengths: Ints, groups: Ints) -> Ints:
    """Return the prefix of each sequence, [S].

    `tokens`, [T], are those of all sequences, which have `lengths`, [S], and are sorted by
    `groups`, [S], the number of the group that each belongs to.
    """
    prefixes = np.zeros(len(lengths), np.int64)
    starts = np.cumsum(lengths) - lengths
    root = 0
    for i in range(1, len(lengths)):
        if groups[i] == groups[root]:
            most = min(lengths[root], lengths[i] - 1)
            own = tokens[starts[i] : starts[i] + most]
            differs = own != tokens[starts[root] : starts[root] + most]
            shared = int(differs.argmax()) if differs.any() else int(most)
            if shared >= MIN_PREFIX:
                prefixes[i] = shared
                continue
        root = i
    return prefixes


def local_prefixes(prefixes: Ints, chosen: Sequence[int]) -> Ints:
    """Return the prefixes of some of the sequences, by ascending index, among themselves.

    Where the root is left out, the first of its branches takes its place: two branches share at
    least the shorter one of their prefixes.
    """
    roots = np.maximum.accumulate(np.where(prefixes == 0, np.arange(len(prefixes)), 0))
    local = np.zeros(len(chosen), np.int64)
    root = -1  # the local root
    for k, i in enumerate(chosen):
        if root >= 0 and roots[i] == roots[root]:
            shared = prefixes[i] if prefixes[root] == 0 else min(prefixes[i], prefixes[root])
            if shared >= MIN_PREFIX:
                local[k] = shared
                continue
        root = i
    return local


def partition(
    lengths: Ints, prefixes: Ints, limit: int, largest_of_ranks: Callable[[int], int]
) -> list[list[int]]:
    """Divide sequences into micro-batches of at most `limit` computed tokens; return their indices.

    All ranks get the same number of micro-batches, none of them empty; they must have equally many
    sequences, none longer than `limit`. Sequences that share a prefix stay together as far as the
    limit and that number allow.
    """

    def cost(chosen: Sequence[int]) -> int:
        return int(lengths[chosen].sum() - local_prefixes(prefixes, chosen).sum())

    units: list[tuple[int, list[int]]] = []  # computed tokens, and indices
    starts = np.flatnonzero(prefixes == 0)
    ends = [*starts[1:].tolist(), len(lengths)]
    costs = np.add.reduceat(lengths - prefixes, starts).tolist()
    for start, end, tokens in zip(starts.tolist(), ends, costs, strict=True):
        family = list(range(start, end))
        if tokens <= limit:
            units.append((tokens, family))
        else:
            units += [(cost(piece), piece) for piece in _within(family, limit, cost)]
    count = largest_of_ranks(-(-sum(tokens for tokens, _ in units) // limit))
    while True:
        while len(units) < count:
            largest = max((unit for unit in units if len(unit[1]) > 1), key=itemgetter(0))
            units.remove(largest)
            middle = len(largest[1]) // 2
            units += [(cost(half), half) for half in (largest[1][:middle], largest[1][middle:])]
        parts = _fill([tokens for tokens, _ in units], count, limit)
        needed = largest_of_ranks(len(parts))
        if needed == count:
            return [sorted(i for unit in part for i in units[unit][1]) for part in parts]
        count = needed


def _within(unit: list[int], limit: int, cost: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """Cut a family into pieces that are within the limit."""
    pieces: list[list[int]] = [[]]
    for i in unit:
        if pieces[-1] and cost([*pieces[-1], i]) > limit:
            pieces.append([])
        pieces[-1].append(i)
    return pieces


def _fill(costs: list[int], count: int, limit: int) -> list[list[int]]:
    """Divide costs into `count` parts of similar sums, or more if the limit demands it.

    The largest comes first, and goes to the part with the smallest sum. Returns indices.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, k) for k in range(count)]  # a heap
    for unit in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        smallest, k = sums[0]
        if smallest + costs[unit] <= limit:
            heapreplace(sums, (smallest + costs[unit], k))
        else:
            k = len(parts)
            parts.append([])
            heappush(sums, (costs[unit], k))
        parts[k].append(unit)
    return parts
