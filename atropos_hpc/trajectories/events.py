"""The journal's events and snapshot: every change of the server's state but the arrival of a group.

A record of kind EVENT or SNAPSHOT holds one of these as JSON. A snapshot is followed by the payload
hashes by which a group that is sent again is recognized, u64 each.
"""

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from atropos_hpc.contracts.messages import Registration
from atropos_hpc.contracts.prompts import Draw, DrawRequest
from atropos_hpc.contracts.wal_record import EVENT, HEADER_BYTES, SNAPSHOT, Header, Record
from atropos_hpc.trajectories.prompts import Stream


class Environment(Struct):
    """A registered environment worker."""

    env_id: int
    desired_name: str
    real_name: str
    max_token_length: int
    group_size: int
    weight: float
    min_batch_allocation: float | None = None  # its part of each batch, 0 to 1
    member: str | None = None  # by which it is recognized when it registers again


class Event(Struct, tag_field="event"):
    """Base of the events."""


class TrainerRegistered(Event, tag="register"):
    """A trainer registered; training goes on from `data.starting_step`."""

    data: Registration


class EnvironmentAdded(Event, tag="environment"):
    """An environment registered, for the first time or again."""

    data: Environment


class Started(Event, tag="started"):
    """The trainer asked for its first batch."""


class GroupsDropped(Event, tag="drop"):
    """Queued groups were dropped as too stale.

    `sequences` and `draws` are recorded because the groups themselves may be gone when this is
    replayed.
    """

    groups: list[int]
    oldest: int
    sequences: int
    draws: list[Draw] = []


class BatchFormed(Event, tag="batch"):
    """Batch number `batch` consists of these groups, for good."""

    batch: int
    groups: list[int]
    version: int  # the learner's


class BatchesAcknowledged(Event, tag="ack"):
    """All batches up to `batch` are part of a durable checkpoint."""

    batch: int


class PromptsDrawn(Event, tag="draw"):
    """A worker reported what became of its draws, and got these numbers."""

    request: DrawRequest
    numbers: list[int]


class DrawsReturned(Event, tag="return"):
    """Workers are gone; what they held is handed out again. `lost`: because they died."""

    stream: str
    workers: list[str]
    lost: bool


class Reset(Event, tag="reset"):
    """Everything was forgotten, on request."""


AnyEvent = (
    TrainerRegistered
    | EnvironmentAdded
    | Started
    | GroupsDropped
    | BatchFormed
    | BatchesAcknowledged
    | PromptsDrawn
    | DrawsReturned
    | Reset
)

_Stale = Annotated[list[int], Meta(min_length=2, max_length=2)]


class Snapshot(Struct):
    """The whole state, with groups as numbers and without the payload hashes."""

    next_gid: int
    registration: Registration | None
    environments: list[Environment]
    started: bool
    queue: list[int]
    batches: list[tuple[int, list[int]]]
    next_batch: int
    version: int | None
    stale: _Stale  # groups, sequences
    prompts: dict[str, Stream] = {}


def event_record(event: AnyEvent) -> Record:
    text = msgspec.json.encode(event)
    return Record(EVENT, text, meta_size=len(text))


def snapshot_record(snapshot: Snapshot, hashes: list[int]) -> Record:
    """Encode a snapshot, and the payload hashes of known groups, oldest first."""
    text = msgspec.json.encode(snapshot)
    padded = text + b"\0" * (-len(text) % 8)
    return Record(SNAPSHOT, padded + np.array(hashes, "<u8").tobytes(), meta_size=len(text))


def read_event(header: Header, record: memoryview) -> AnyEvent:
    """Decode an event. Raises msgspec.ValidationError for one of a newer version."""
    return _event.decode(record[HEADER_BYTES : HEADER_BYTES + header.meta_size])


def read_snapshot(header: Header, record: memoryview) -> tuple[Snapshot, list[int]]:
    """Decode a snapshot and its payload hashes."""
    end = HEADER_BYTES + header.meta_size
    hashes = np.frombuffer(bytes(record[end + -header.meta_size % 8 :]), "<u8")
    return _snapshot.decode(record[HEADER_BYTES:end]), hashes.tolist()


_event = msgspec.json.Decoder(AnyEvent)
_snapshot = msgspec.json.Decoder(Snapshot)
