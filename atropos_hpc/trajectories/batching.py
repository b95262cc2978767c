"""What the trajectory server knows: who is registered, which groups wait, which batches are formed.

No I/O and no clock of its own. State that must survive changes in three ways only, live and in replay alike: `add` a group,
`apply` an event, `restore` a snapshot. The server journals first and calls these after. A group is a few numbers here; its arrays
stay in the journal.

The life of a group: queued -> in a formed batch (leased, perhaps many times) -> acknowledged, and forgotten. Or: queued ->
dropped, because it is too stale.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from atropos_hpc.trajectories.journal import Place
from atropos_hpc.trajectories.wal_record import UNKNOWN

log = logging.getLogger(__name__)

REMEMBERED = 65_536  # payload hashes by which a group sent again is recognised
SILENT_S = 120.0  # an environment unheard of for so long counts as disconnected
REPORT_S = 30.0  # how long a reported number of groups in flight is believed
SHARE_WAIT_S = 10.0  # how long a batch waits for an environment's minimum share, after that environment's last group
BUSY_WAIT_S = 120.0  # the same where the environment says that it generates
QUIET_S = 10.0  # without a new group, after which a batch that cannot be filled exactly is filled as far as whole groups go
MIN_WEIGHT = 0.01  # Atropos' own: no environment is starved
SUBSET_GROUPS = 4096  # how many of the oldest groups the exact search looks at
NOWHERE = Place(-1, 0, 0)  # compared by identity


class Item(NamedTuple):
    """A group in the queue or in a batch."""

    gid: int
    place: Place
    sequences: int
    tokens: int
    env_id: int
    oldest: int  # policy version, or UNKNOWN


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Number = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Registration(msgspec.Struct):
    """What a trainer says in /register. Everything but the first two has a default here, so that a curl can do it."""

    batch_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]  # sequences
    max_token_len: Count  # longest sequence; 0: no limit
    wandb_group: Text | None = ""
    wandb_project: Text | None = ""
    checkpoint_dir: Text = ""
    save_checkpoint_interval: Number = 0
    starting_step: Count = 0  # the policy version that training starts or resumes from
    num_steps: Number = -1
    vocab_size: Count = 0  # 0: not told


class Environment(msgspec.Struct):
    """A registered environment."""

    env_id: int
    desired_name: str
    real_name: str
    max_token_length: int
    group_size: int
    weight: float
    min_batch_allocation: float | None = None  # its part of each batch, 0 to 1
    member: str | None = None  # who it is, when it registers again


class Presence:
    """What is known of an environment for the moment only. Times are the server's monotonic seconds; None: never."""

    def __init__(self, now: float) -> None:
        self.heard: float | None = now
        self.delivered: float | None = None
        self.given_up = False  # a batch has waited in vain for its minimum share, and it has not delivered since
        self.in_flight = 0
        self.reported: float | None = None


class Ledger:
    def __init__(self) -> None:
        self.next_gid = 0
        self.known: dict[int, None] = {}  # payload hashes, oldest first
        self.presence: dict[int, Presence] = {}
        self.repeated = 0
        self.arrived = float("-inf")  # when the last group came, in the server's monotonic seconds
        self._found: dict[
            int, Item
        ] = {}  # during replay: every group seen, for the snapshots that name them
        self._clear()

    def _clear(self) -> None:
        self.registration: Registration | None = None
        self.environments: list[Environment] = []
        self.started = False  # a trainer has asked for a batch
        self.queue: dict[int, Item] = {}  # gid -> group, oldest first
        self.batches: dict[int, list[Item]] = {}  # formed and not acknowledged
        self.formed = 0  # number of the next batch to be formed
        self.asked: tuple[int, float] | None = (
            None  # the last batch that was asked for, and when for the first time
        )
        self.version: int | None = None  # the learner's, as last told
        self.stale_groups = self.stale_sequences = 0
        self.latest: Item | None = None
        self.queued_sequences = 0
        self._queued_of: Counter[int] = Counter()  # sequences in the queue by env_id
        self._sizes: Counter[int] = Counter()  # groups in the queue by number of sequences
        self._versions: Counter[int] = Counter()  # groups in the queue by oldest policy version
        self.live: Counter[int] = Counter()  # groups in the queue or a batch, by journal segment

    # --- changes

    def add(self, item: Item, payload_hash: int, replay: bool = False) -> None:
        """A group has arrived."""
        if replay:
            self._found[item.gid] = item
        self.next_gid = max(self.next_gid, item.gid + 1)
        self.known[payload_hash] = None
        while len(self.known) > REMEMBERED:
            del self.known[next(iter(self.known))]
        self._enqueue(item)
        self.live[item.place.segment] += 1
        self.latest = item
        if 0 <= item.env_id < len(self.environments):
            environment = self.environments[item.env_id]
            environment.group_size = max(environment.group_size, item.sequences)

    def apply(self, event: dict[str, Any]) -> None:
        """One journalled event."""
        kind = event["event"]
        if kind == "register":
            self.registration = msgspec.convert(event["data"], Registration)
            # A learner that resumes there may still find its checkpoint damaged, and go back to the one before: nothing is forgotten yet.
            self.formed = max(self.formed, self.registration.starting_step)
        elif kind == "environment":
            environment = msgspec.convert(event["data"], Environment)
            self.environments[environment.env_id : environment.env_id + 1] = [environment]
        elif kind == "started":
            self.started = True
        elif kind == "drop":
            self.stale_groups += len(event["groups"])
            self.stale_sequences += event[
                "sequences"
            ]  # told, as the groups may be gone when this is replayed
            for gid in event["groups"]:
                self._forget(self._dequeue(gid))
        elif kind == "batch":
            self.batches[event["batch"]] = [self._dequeue(gid) for gid in event["groups"]]
            self.formed = event["batch"] + 1
            self.version = event["version"]
        elif kind == "ack":
            for batch in [batch for batch in self.batches if batch <= event["batch"]]:
                for item in self.batches.pop(batch):
                    self._forget(item)
        elif kind == "reset":
            self._clear()
            self.presence.clear()
            self.known.clear()
        else:
            raise ValueError(
                f"unknown event {kind!r}: was this journal written by a newer version?"
            )

    def _enqueue(self, item: Item) -> None:
        self.queue[item.gid] = item
        if item.place is NOWHERE:
            return
        self.queued_sequences += item.sequences
        self._queued_of[item.env_id] += item.sequences
        self._sizes[item.sequences] += 1
        self._versions[item.oldest] += 1

    def _dequeue(self, gid: int) -> Item:
        item = self.queue.pop(gid, None) or _gap(gid)
        if item.place is not NOWHERE:
            self.queued_sequences -= item.sequences
            _decrease(self._queued_of, item.env_id, item.sequences)
            _decrease(self._sizes, item.sequences)
            _decrease(self._versions, item.oldest)
        return item

    def _forget(self, item: Item) -> None:
        if item.place is not NOWHERE:
            _decrease(self.live, item.place.segment)

    # --- snapshots

    def snapshot(self) -> dict[str, Any]:
        """All that must survive, groups by number, without `known`."""
        return {
            "next_gid": self.next_gid,
            "registration": msgspec.to_builtins(self.registration),
            "environments": msgspec.to_builtins(self.environments),
            "started": self.started,
            "queue": list(self.queue),
            "batches": [[k, [item.gid for item in items]] for k, items in self.batches.items()],
            "formed": self.formed,
            "version": self.version,
            "stale": [self.stale_groups, self.stale_sequences],
        }

    def restore(self, snapshot: dict[str, Any], known: Iterable[int]) -> None:
        """Take the state of a snapshot, in replay.

        A group whose segment is gone stays a gap here: later events, in the same replay, take it away again.
        """
        self._clear()
        self.next_gid = max(self.next_gid, snapshot["next_gid"])
        self.known = dict.fromkeys(known)
        self.registration = msgspec.convert(snapshot["registration"], Registration | None)
        self.environments = msgspec.convert(snapshot["environments"], list[Environment])
        self.started, self.formed, self.version = (
            snapshot["started"],
            snapshot["formed"],
            snapshot["version"],
        )
        self.stale_groups, self.stale_sequences = snapshot["stale"]
        for gid in snapshot["queue"]:
            self._enqueue(self._known_or_gap(gid))
        for k, gids in snapshot["batches"]:
            self.batches[k] = [self._known_or_gap(gid) for gid in gids]

    def _known_or_gap(self, gid: int) -> Item:
        item = self._found.get(gid)
        if item is None:
            return _gap(gid)
        self.live[item.place.segment] += 1
        return item

    def replayed(self, now: float) -> list[int]:
        """The end of a replay. Returns the numbers of groups that are needed and were not found: the journal is damaged then."""
        self._found.clear()
        self.arrived = now
        self.presence = {environment.env_id: Presence(now) for environment in self.environments}
        return [item.gid for item in self._all_items() if item.place is NOWHERE]

    def _all_items(self) -> Iterable[Item]:
        return itertools.chain(self.queue.values(), *self.batches.values())

    # --- batches

    def stale(self, oldest: int) -> list[int]:
        """The queued groups that a policy version before `oldest` has produced. Unknown versions pass."""
        if not any(UNKNOWN < version < oldest for version in self._versions):
            return []
        return [gid for gid, item in self.queue.items() if UNKNOWN < item.oldest < oldest]

    def choose(self, now: float) -> list[int] | None:
        """The groups of the next batch: those that came first and sum to exactly the batch size. None: not there yet.

        Environments with a minimum share come first with it. A batch waits for such a share as long as `awaited` says; what is missing
        then, others fill. Where the sizes of groups don't add up to a batch (groups of 3 and a batch of 16), and none has come for
        QUIET_S, it is as many whole groups as go in: less than one group short.
        """
        assert self.registration is not None
        if self.asked is None or self.asked[0] != self.formed:
            self.asked = (self.formed, now)
        want = self.registration.batch_size
        if self.queued_sequences < want:
            return None
        shares = self._shares(now)
        first: list[Item] = []
        for env_id, share in shares.items():
            taken = 0
            for item in self.queue.values():
                if taken >= share:
                    break
                if item.env_id == env_id:
                    first.append(item)
                    taken += item.sequences
            if taken < share and self.awaited(env_id, now):
                return None
        favoured = {item.gid for item in first}
        order = (
            (*first, *(item for item in self.queue.values() if item.gid not in favoured))
            if first
            else self.queue.values()
        )
        return choose(order, want, exactly=now - self.arrived < QUIET_S)

    def awaited(self, env_id: int, now: float) -> bool:
        """Are its minimum shares waited for, and left to it by the others?

        From its first group on, until a batch has been asked for and it has delivered nothing for SHARE_WAIT_S since; BUSY_WAIT_S where it
        says that it generates. Then not before it delivers again, so that one that hangs holds up one batch and not each.
        """
        presence = self.presence[env_id]
        if presence.delivered is None or presence.given_up:
            return False
        if self.asked is not None and self.asked[0] == self.formed:
            patience = BUSY_WAIT_S if self.in_flight(env_id, now) else SHARE_WAIT_S
            if now - max(presence.delivered, self.asked[1]) >= patience:
                presence.given_up = True
                name = self.environments[env_id].real_name
                log.warning(
                    "batch %d: %s has sent nothing for %.0f s; others fill its share until it does",
                    self.formed,
                    name,
                    patience,
                )
        return not presence.given_up

    def _shares(self, now: float) -> dict[int, int]:
        """Minimum number of sequences in a batch, by env_id; scaled down when together they are more than a batch."""
        assert self.registration is not None
        size = self.registration.batch_size
        shares = {e.env_id: int(size * (e.min_batch_allocation or 0)) for e in self.connected(now)}
        scale = min(1.0, size / max(1, sum(shares.values())))
        return {env_id: int(share * scale) for env_id, share in shares.items() if share > 0}

    # --- what environments ask

    def connected(self, now: float) -> list[Environment]:
        def here(environment: Environment) -> bool:
            heard = self.presence[environment.env_id].heard
            return heard is not None and now - heard < SILENT_S

        return [environment for environment in self.environments if here(environment)]

    def hear(self, env_id: int, now: float, in_flight: int | None = None) -> None:
        """A sign of life that an environment gave on purpose."""
        presence = self.presence[env_id]
        presence.heard = now
        if in_flight is not None:
            presence.in_flight, presence.reported = in_flight, now

    def deliver(self, env_id: int, now: float) -> None:
        """A group came. It may be a late one of an environment that said goodbye, which stays gone."""
        self.arrived = now
        presence = self.presence.get(env_id)
        if presence is not None:
            presence.delivered, presence.given_up = now, False
            presence.heard = None if presence.heard is None else now

    def in_flight(self, env_id: int, now: float) -> int:
        """Sequences that it generates, as it last said; 0 where that was long ago."""
        presence = self.presence[env_id]
        return (
            presence.in_flight
            if presence.reported is not None and now - presence.reported < REPORT_S
            else 0
        )

    def status_of(self, env_id: int, now: float) -> dict[str, Any]:
        """Atropos' answer to /status-env, and what members of a run read besides.

        Atropos counts only what waits to be put into a batch. Here what waits to be trained on counts: so an environment that
        bounds its lead by queue_size really does.
        """
        environment, connected = self.environments[env_id], self.connected(now)
        waiting = Counter(self._queued_of)
        sizes = set(self._sizes)
        version = self.formed - 1 if self.version is None else self.version
        for batch, items in self.batches.items():
            if batch >= version:
                for item in items:
                    waiting[item.env_id] += item.sequences
                    sizes.add(item.sequences)
        largest = max(sizes, default=1)
        batch_size = self.registration.batch_size if self.registration else 0
        in_flight = {
            e.env_id: self.in_flight(e.env_id, now) for e in connected if e.env_id != env_id
        }
        shares = self._shares(now) if self.registration else {}
        others = sum(
            max(0, -(-n // largest) * largest - shares.get(j, 0))
            for j, n in waiting.items()
            if j != env_id
        )
        weights = {e.env_id: e.max_token_length * max(0.0, e.weight) for e in connected}
        total = sum(weights.values())
        size = max(1, environment.group_size)
        return {
            "current_step": self.formed,
            "queue_size": (waiting[env_id] + others) // size,
            "unallocated_fraction": 1.0
            - min(1.0, sum(e.min_batch_allocation or 0.0 for e in connected)),
            "self_queue_size": waiting[env_id] // size,
            "max_group_size": largest,
            "env_weight": max(MIN_WEIGHT, weights.get(env_id, 0.0) / total if total else 0.0),
            "formed": self.formed,
            "queued_sequences": self.queued_sequences,
            "batch_size": batch_size,
            "own_queued": self._queued_of[env_id],
            "others_in_flight": sum(in_flight.values()),
            "share": shares.get(env_id, 0),
            "shares_of_others": [
                [share, self._queued_of[j] + in_flight[j]]
                for j, share in shares.items()
                if j != env_id and self.awaited(j, now)
            ],
        }


def choose(items: Iterable[Item], want: int, exactly: bool = True) -> list[int] | None:
    """Numbers of groups that sum to `want` sequences, in rising order; None where there are none.

    Greedy in the order given; where that misses, a subset that uses as few of the later groups as it can. Unless `exactly`, the
    greatest sum below `want` will do where `want` cannot be had.
    """
    items = list(items)
    total, chosen = 0, []
    for item in items:
        if total + item.sequences <= want:
            chosen.append(item.gid)
            total += item.sequences
            if total == want:
                return sorted(chosen)
    reachable, news = 1, []  # bit s: some subset of the groups so far sums to s
    below = (1 << want + 1) - 1
    for item in items[:SUBSET_GROUPS]:
        new = (reachable << item.sequences) & below & ~reachable
        news.append((item, new))
        reachable |= new
        if reachable >> want & 1:
            break
    if not reachable >> want & 1:
        if exactly:
            return None
        want = reachable.bit_length() - 1
    chosen = []
    for item, new in reversed(news):
        if new >> want & 1:
            chosen.append(item.gid)
            want -= item.sequences
    return sorted(chosen) or None


def share_out(items: Sequence[Item], world: int) -> list[list[Item]]:
    """Whole groups for each of `world` ranks, balanced by tokens: the longest first, each to the rank with the least."""
    shares: list[list[Item]] = [[] for _ in range(world)]
    load = [0] * world
    for item in sorted(items, key=lambda item: (-item.tokens, item.gid)):
        rank = load.index(min(load))
        shares[rank].append(item)
        load[rank] += item.tokens
    return [sorted(share) for share in shares]


def _gap(gid: int) -> Item:
    """A group that replay reads of, and whose segment is gone."""
    return Item(gid, NOWHERE, 0, 0, UNKNOWN, UNKNOWN)


def _decrease(counter: Counter[int], key: int, by: int = 1) -> None:
    counter[key] -= by
    if not counter[key]:
        del counter[key]
