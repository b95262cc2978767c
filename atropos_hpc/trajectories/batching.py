"""Which groups make the next batch, and which rank gets which of them. Pure functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from atropos_hpc.trajectories.state import QueuedGroup

SEARCH_GROUPS = 4096  # how many of the oldest groups the exact search considers


def next_batch(
    queue: Sequence[QueuedGroup],
    batch_size: int,
    minimums: Mapping[int, int],
    awaited: Callable[[int], bool],
    exactly: bool,
) -> list[int] | None:
    """Choose the groups of the next batch, or None if they have not arrived yet.

    They are the oldest groups that sum to exactly `batch_size` sequences. `minimums` reserves
    sequences for environments, by env_id; an environment that falls short of its minimum delays
    the batch while `awaited` says so, after which the others fill its place. Unless `exactly`, a
    batch may fall short by less than one group where group sizes do not add up to `batch_size`.
    """
    reserved: list[QueuedGroup] = []
    for env_id, minimum in minimums.items():
        taken = 0
        for group in queue:
            if taken >= minimum:
                break
            if group.env_id == env_id:
                reserved.append(group)
                taken += group.sequences
        if taken < minimum and awaited(env_id):
            return None
    if reserved:
        gids = {group.gid for group in reserved}
        queue = [*reserved, *(group for group in queue if group.gid not in gids)]
    return select_groups(queue, batch_size, exactly)


def select_groups(
    groups: Iterable[QueuedGroup], sequences: int, exactly: bool = True
) -> list[int] | None:
    """Return the numbers of groups that sum to `sequences`, in rising order; None if none do.

    Greedy in the order given. Where that misses, a subset-sum search finds a subset that uses as
    few of the later groups as possible. Unless `exactly`, the greatest sum below will do.
    """
    groups = list(groups)
    total, chosen = 0, []
    for group in groups:
        if total + group.sequences <= sequences:
            chosen.append(group.gid)
            total += group.sequences
            if total == sequences:
                return sorted(chosen)
    reachable, steps = 1, []  # bit s of reachable: some subset of the groups so far sums to s
    mask = (1 << sequences + 1) - 1
    for group in groups[:SEARCH_GROUPS]:
        new = (reachable << group.sequences) & mask & ~reachable
        steps.append((group, new))
        reachable |= new
        if reachable >> sequences & 1:
            break
    if not reachable >> sequences & 1:
        if exactly:
            return None
        sequences = reachable.bit_length() - 1
    chosen = []
    for group, new in reversed(steps):
        if new >> sequences & 1:
            chosen.append(group.gid)
            sequences -= group.sequences
    return sorted(chosen) or None


def split_by_tokens(groups: Sequence[QueuedGroup], world: int) -> list[list[QueuedGroup]]:
    """Assign whole groups to `world` ranks, balanced by tokens.

    The longest group goes first, each to the rank with the fewest tokens so far.
    """
    parts: list[list[QueuedGroup]] = [[] for _ in range(world)]
    load = [0] * world
    for group in sorted(groups, key=lambda group: (-group.tokens, group.gid)):
        rank = load.index(min(load))
        parts[rank].append(group)
        load[rank] += group.tokens
    return [sorted(part) for part in parts]
