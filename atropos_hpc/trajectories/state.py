"""The state that survives a crash of the trajectory server: registrations, queue, batches.

It changes in three ways only, both live and in replay: `add` a group, `apply` an event, `restore`
a snapshot. The server journals first and calls these afterwards. No I/O and no clock. A group is a
few numbers here; its arrays stay in the journal.

A group is queued, then part of a formed batch that may be leased many times, then acknowledged and
forgotten. A group that becomes too stale while it is queued is dropped.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from atropos_hpc.contracts.group import UNLIMITED
from atropos_hpc.contracts.messages import Registration
from atropos_hpc.contracts.prompts import Draw
from atropos_hpc.contracts.wal_record import UNKNOWN, Header, Record
from atropos_hpc.trajectories import events
from atropos_hpc.trajectories.events import AnyEvent, Environment, Snapshot
from atropos_hpc.trajectories.journal import Place
from atropos_hpc.trajectories.prompts import PromptLedger

KNOWN_HASHES = 65_536  # payload hashes by which a group that is sent again is recognized
NOWHERE = Place(-1, 0, 0)  # compared by identity


class QueuedGroup(NamedTuple):
    gid: int
    place: Place
    sequences: int
    tokens: int
    env_id: int
    oldest: int  # policy version, or UNKNOWN
    draw: Draw | None = None  # of its prompt

    @classmethod
    def of(cls, group: Header | Record, place: Place, draw: Draw | None) -> "QueuedGroup":
        """Return the numbers of a group that is in the journal."""
        known = (group.sequences, group.tokens, group.env_id, group.oldest)
        return cls(group.gid, place, *known, draw)


class TrajectoryState:
    """Everything the server must still know after a restart."""

    def __init__(self) -> None:
        self.next_gid = 0
        self.known: dict[int, None] = {}  # payload hashes, oldest first
        self.repeated = 0
        self._seen: dict[int, QueuedGroup] = {}  # during replay, for the snapshots that name them
        self._clear()

    def _clear(self) -> None:
        self.registration: Registration | None = None
        self.environments: list[Environment] = []
        self.started = False  # a trainer has asked for a batch
        self.queue: dict[int, QueuedGroup] = {}  # by gid, oldest first
        self.batches: dict[int, list[QueuedGroup]] = {}  # formed and not acknowledged
        self.next_batch = 0
        self.version: int | None = None  # the learner's, as of its last request
        self.stale_groups = self.stale_sequences = 0
        self.latest: QueuedGroup | None = None
        self.prompts = PromptLedger()
        self.queued_sequences = 0
        self.queued_by_env: Counter[int] = Counter()  # sequences in the queue
        self.queued_sizes: Counter[int] = Counter()  # groups in the queue by number of sequences
        self._versions: Counter[int] = Counter()  # groups in the queue by oldest policy version
        self.live: Counter[int] = Counter()  # groups in the queue or a batch, by journal segment

    # --- changes

    def add(self, group: QueuedGroup, payload_hash: int, replay: bool = False) -> None:
        if replay:
            self._seen[group.gid] = group
        self.next_gid = max(self.next_gid, group.gid + 1)
        self.known[payload_hash] = None
        while len(self.known) > KNOWN_HASHES:
            del self.known[next(iter(self.known))]
        self._enqueue(group)
        self.live[group.place.segment] += 1
        self.latest = group
        if group.draw is not None:
            self.prompts.accept(group.draw)
        if 0 <= group.env_id < len(self.environments):
            environment = self.environments[group.env_id]
            environment.group_size = max(environment.group_size, group.sequences)

    def apply(self, event: AnyEvent) -> None:
        """Apply an event that is in the journal."""
        match event:
            case events.TrainerRegistered(registration):
                self.registration = registration
                # Keep all batches: a learner that resumes here may yet find its checkpoint
                # damaged and go back to an earlier one.
                self.next_batch = max(self.next_batch, registration.starting_step)
            case events.EnvironmentAdded(environment):
                self.environments[environment.env_id : environment.env_id + 1] = [environment]
            case events.Started():
                self.started = True
            case events.PromptsDrawn(request, numbers):
                self.prompts.stream(request.stream).request(request, numbers)
            case events.DrawsReturned(stream, workers, lost):
                self.prompts.stream(stream).give_back(workers, lost)
            case events.GroupsDropped(gids, _, sequences, draws):
                self.prompts.drop(draws)
                self.stale_groups += len(gids)
                self.stale_sequences += sequences
                for gid in gids:
                    self._forget(self._dequeue(gid))
            case events.BatchFormed(number, gids, version):
                self.batches[number] = [self._dequeue(gid) for gid in gids]
                self.next_batch, self.version = number + 1, version
            case events.BatchesAcknowledged(last):
                for number in [number for number in self.batches if number <= last]:
                    for group in self.batches.pop(number):
                        self._forget(group)
            case events.Reset():
                self._clear()
                self.known.clear()

    def _enqueue(self, group: QueuedGroup) -> None:
        self.queue[group.gid] = group
        if group.place is NOWHERE:
            return
        self.queued_sequences += group.sequences
        self.queued_by_env[group.env_id] += group.sequences
        self.queued_sizes[group.sequences] += 1
        self._versions[group.oldest] += 1

    def _dequeue(self, gid: int) -> QueuedGroup:
        group = self.queue.pop(gid, None) or _missing(gid)
        if group.place is not NOWHERE:
            self.queued_sequences -= group.sequences
            _decrease(self.queued_by_env, group.env_id, group.sequences)
            _decrease(self.queued_sizes, group.sequences)
            _decrease(self._versions, group.oldest)
        return group

    def _forget(self, group: QueuedGroup) -> None:
        if group.place is not NOWHERE:
            _decrease(self.live, group.place.segment)

    # --- snapshots

    def snapshot(self) -> Snapshot:
        """Return the state without `known`."""
        return Snapshot(
            next_gid=self.next_gid,
            registration=self.registration,
            environments=list(self.environments),
            started=self.started,
            queue=list(self.queue),
            batches=[(k, [group.gid for group in groups]) for k, groups in self.batches.items()],
            next_batch=self.next_batch,
            version=self.version,
            stale=[self.stale_groups, self.stale_sequences],
            prompts=self.prompts.streams,
        )

    def restore(self, snapshot: Snapshot, known: Iterable[int]) -> None:
        """Take over the state of a snapshot, in replay.

        A group whose segment is gone becomes a placeholder. Events later in the same replay remove
        it, unless the journal is damaged.
        """
        self._clear()
        self.next_gid = max(self.next_gid, snapshot.next_gid)
        self.known = dict.fromkeys(known)
        self.registration, self.environments = snapshot.registration, snapshot.environments
        self.started, self.next_batch = snapshot.started, snapshot.next_batch
        self.version = snapshot.version
        self.stale_groups, self.stale_sequences = snapshot.stale
        self.prompts.streams = snapshot.prompts
        for gid in snapshot.queue:
            self._enqueue(self._seen_or_missing(gid))
        for number, gids in snapshot.batches:
            self.batches[number] = [self._seen_or_missing(gid) for gid in gids]

    def _seen_or_missing(self, gid: int) -> QueuedGroup:
        group = self._seen.get(gid)
        if group is None:
            return _missing(gid)
        self.live[group.place.segment] += 1
        return group

    def end_replay(self) -> list[int]:
        """Return the numbers of groups that are needed and missing: the journal is damaged then."""
        self._seen.clear()
        groups = itertools.chain(self.queue.values(), *self.batches.values())
        return [group.gid for group in groups if group.place is NOWHERE]

    # --- queries

    def stale(self, oldest: int) -> list[int]:
        """Return the queued groups that a policy version before `oldest` produced.

        Groups of unknown version are never stale. Those that no batch can hold, since a trainer has
        registered with a smaller one, count as stale: they would fill the queue for ever.
        """
        largest = self.registration.batch_size if self.registration else UNLIMITED
        if not (
            any(UNKNOWN < version < oldest for version in self._versions)
            or any(size > largest for size in self.queued_sizes)
        ):
            return []
        return [
            gid
            for gid, group in self.queue.items()
            if UNKNOWN < group.oldest < oldest or group.sequences > largest
        ]


def _missing(gid: int) -> QueuedGroup:
    """Return the placeholder of a group whose segment is gone."""
    return QueuedGroup(gid, NOWHERE, 0, 0, UNKNOWN, UNKNOWN)


def _decrease(counter: Counter[int], key: int, by: int = 1) -> None:
    counter[key] -= by
    if not counter[key]:
        del counter[key]
