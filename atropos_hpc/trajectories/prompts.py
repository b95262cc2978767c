"""The prompt ledger: which prompts were drawn, by whom, and what became of them.

A number is new, outstanding (held by one worker), returned (to be handed out again) or settled with
one outcome:

    accepted   a group of it is in the journal; `stale` if that was dropped untrained
    no_signal  its answers have equal scores
    refused    the server refused its group, FAILURES times
    failed     its rollout failed or gave nothing, FAILURES times
    lost       LOSSES processes died while they held it

So a prompt that always fails, or that kills its worker, does not loop for ever. Draws that a stop,
a requeue or a lost node interrupts are returned without being counted as losses.

Returned numbers are handed out before new ones, so a number is handed out again only if its group
never came, and an epoch ends when each of its numbers is settled. The first group of a number
counts; a worker that was believed lost and delivers late is answered as if it repeated a group.

No I/O and no clock. Like the rest of the server's state, the ledger changes only by what is in the
journal: groups and events.
"""

from collections.abc import Iterable
from heapq import nsmallest
from typing import TypeVar

from msgspec import Struct, field

from atropos_hpc.contracts.prompts import Draw, DrawRequest, PromptCounts

FAILURES = 3  # failed rollouts or refused groups of a number, before that is its outcome
LOSSES = 10  # processes that died while they held a number, before it counts as lost
REMEMBERED = 2048  # hashes of items per stream
EPOCHS = 4  # whose outcomes are counted separately

K = TypeVar("K", int, str)


class Holder(Struct):
    """A worker process that asked for draws."""

    member: str
    env_id: int
    attempt: int
    serial: int
    reach: int


class Stream(Struct, dict=True):
    """The draws of one environment. Its fields are part of the server's snapshot as they stand."""

    next_number: int = 0
    length: int | None = None  # items of an epoch
    workers: dict[str, Holder] = field(default_factory=dict)
    outstanding: dict[int, str] = field(default_factory=dict)  # number -> worker
    returned: set[int] = field(default_factory=set)
    failures: dict[int, int] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    items: dict[int, str] = field(default_factory=dict)  # number -> hash of the item, the latest
    outcomes: dict[str, int] = field(default_factory=dict)
    epochs: dict[int, dict[str, int]] = field(default_factory=dict)  # outcomes of the latest
    unordered: int | None = None  # the first number that named different items

    def __post_init__(self) -> None:
        # Derived, and not in the snapshot. A request must not cost more for other workers' draws.
        self._held: dict[str, set[int]] = {}
        for number, worker in self.outstanding.items():
            self._held.setdefault(worker, set()).add(number)
        self._lowest = min([self.next_number, *self.returned, *self.outstanding])

    # --- queries

    @property
    def lowest(self) -> int:
        """Return the lowest number that is not settled."""
        while self.is_settled(self._lowest):
            self._lowest += 1
        return self._lowest

    def is_settled(self, number: int) -> bool:
        """Return whether the number has its outcome."""
        known = number in self.outstanding or number in self.returned
        return number < self.next_number and not known

    def held_by(self, worker: str) -> set[int]:
        return self._held.get(worker, set())

    def choose(self, request: DrawRequest, reserved: set[int]) -> list[int]:
        """Return the numbers to hand out now; `reserved` ones are being handed out to others."""
        reported = [report.number for report in request.reports]
        unseen = self.held_by(request.worker).difference(request.held, reported)
        want = max(0, request.want - len(unseen))
        free = self.returned.difference(reserved, request.held) if want else ()
        chosen = nsmallest(want, (number for number in free if number >= request.reach))
        new = max([self.next_number, *(number + 1 for number in reserved)])
        return [*chosen, *range(new, new + want - len(chosen))]

    def counts(self) -> PromptCounts:
        length = self.length
        return PromptCounts(
            epoch=None if length is None else self.next_number // length,
            drawn=self.next_number,
            outstanding=len(self.outstanding),
            returned=len(self.returned),
            ordered=self.unordered is None,
            **self.outcomes,
        )

    # --- changes

    def request(self, request: DrawRequest, numbers: Iterable[int]) -> None:
        """Take a worker's reports, and hand out the numbers to it."""
        worker = request.worker
        known = self.workers.get(worker)
        if known is None or request.serial > known.serial:
            for report in request.reports:
                if self._is_open(report.number, worker):
                    self._close(report.number)
                    final = report.outcome == "no_signal"
                    if final or _count(self.failures, report.number) >= FAILURES:
                        self._settle(report.number, report.outcome)
                    else:
                        self.returned.add(report.number)
            for seen in request.seen:
                self._see(seen.number, seen.item)
        self.workers[worker] = Holder(
            request.member, request.env_id, request.attempt, request.serial, request.reach
        )
        self.length = request.length or self.length
        finished = {report.number for report in request.reports}
        drawn, first_new = set(numbers), self.next_number
        self.next_number = max([first_new, *(number + 1 for number in drawn)])
        self.returned.update(range(first_new, self.next_number))
        # What a worker holds was returned if it was believed lost and is not.
        kept = set(request.held).difference(finished)
        for number in (drawn | kept) & self.returned:
            self.returned.remove(number)
            self.outstanding[number] = worker
            self._held.setdefault(worker, set()).add(number)

    def give_back(self, workers: Iterable[str], as_lost: bool) -> None:
        for worker in workers:
            self.workers.pop(worker, None)
            for number in self._held.pop(worker, ()):
                del self.outstanding[number]
                if as_lost and _count(self.losses, number) >= LOSSES:
                    self._settle(number, "lost")
                else:
                    self.returned.add(number)

    def accept(self, number: int) -> None:
        """Note that a group of this number is in the journal."""
        if number < self.next_number and not self.is_settled(number):
            self._close(number)
            self._settle(number, "accepted")

    def drop(self, number: int) -> None:
        """Note that the group of this number was dropped as stale."""
        for counts in (self.outcomes, self._epoch(number)):
            if counts.get("accepted"):
                counts["accepted"] -= 1
                counts["stale"] = counts.get("stale", 0) + 1

    def _is_open(self, number: int, worker: str) -> bool:
        return self.outstanding.get(number) == worker or number in self.returned

    def _close(self, number: int) -> None:
        if (worker := self.outstanding.pop(number, None)) is None:
            self.returned.remove(number)
        else:
            self._held[worker].remove(number)

    def _settle(self, number: int, outcome: str) -> None:
        self.failures.pop(number, None)
        self.losses.pop(number, None)
        _count(self.outcomes, outcome)
        _count(self._epoch(number), outcome)

    def _epoch(self, number: int) -> dict[str, int]:
        """Return the counts of the number's epoch; throwaway ones if they are no longer kept."""
        if self.length is None:
            return {}
        epoch, newest = number // self.length, self.next_number // self.length
        for old in [old for old in self.epochs if old <= newest - EPOCHS]:
            del self.epochs[old]
        return self.epochs.setdefault(epoch, {}) if epoch > newest - EPOCHS else {}

    def _see(self, number: int, item: str) -> None:
        if self.items.get(number, item) != item and self.unordered is None:
            self.unordered = number
        self.items[number] = item
        while len(self.items) > REMEMBERED:
            del self.items[next(iter(self.items))]


def _count(counts: dict[K, int], key: K) -> int:
    counts[key] = counts.get(key, 0) + 1
    return counts[key]


class PromptLedger:
    """The streams of all environments, by name."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}

    def stream(self, name: str) -> Stream:
        return self.streams.setdefault(name, Stream())

    def gone(self, request: DrawRequest) -> tuple[list[str], list[str]]:
        """Return the workers that a request shows to be gone: (died, of earlier attempts)."""
        workers = self.stream(request.stream).workers.items()
        older = [
            name
            for name, each in workers
            if each.attempt < request.attempt and name != request.worker
        ]
        died = [
            name
            for name, each in workers
            if each.member == request.member and name != request.worker and name not in older
        ]
        return died, older

    def is_outdated(self, request: DrawRequest) -> bool:
        """Return whether a worker of an earlier attempt of the run asks."""
        workers = self.stream(request.stream).workers.values()
        return any(each.attempt > request.attempt for each in workers)

    def is_settled(self, draw: Draw) -> bool:
        """Return whether the draw has its outcome."""
        return draw.stream in self.streams and self.streams[draw.stream].is_settled(draw.number)

    def accept(self, draw: Draw) -> None:
        """Note that a group of this draw is in the journal."""
        if draw.stream in self.streams:
            self.streams[draw.stream].accept(draw.number)

    def drop(self, draws: Iterable[Draw]) -> None:
        """Note that the groups of these draws were dropped as stale."""
        for draw in draws:
            if draw.stream in self.streams:
                self.streams[draw.stream].drop(draw.number)
