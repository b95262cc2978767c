"""The binary record: the one encoding of a group from the environment worker to the learner.

    header   64 bytes, little-endian
    payload  padded to a multiple of 8 bytes

Groups and events lie in the write-ahead journal in this form, and leases carry it unchanged. The
header holds two xxh3 hashes, of the payload and of the header. The payload's hash identifies a
group that was sent twice; both together detect a torn or damaged record. `durable` says how much
of the file was durable when the record was written. Replay needs it to tell damage from the
reordering that a power cut may leave in a commit that was never acknowledged.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

from atropos_hpc.contracts.prompts import Draw

GROUP, EVENT, SNAPSHOT = 1, 2, 3
CONTENT_TYPE = "application/x-atropos-hpc-groups"  # an HTTP body of one or more group records
MAGIC = b"ATJ2"  # the last byte is the version of the format
UNKNOWN = -1  # env_id or oldest policy version that the sender did not give

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct("<4sHHQ")  # magic, kind, flags, seal: the hash of all but itself
_BODY = struct.Struct("<QQQIIIIii")
HEADER_BYTES = _HEAD.size + _BODY.size


class Header(NamedTuple):
    kind: int  # GROUP, EVENT or SNAPSHOT
    flags: int  # bit i: the payload holds the optional array OPTIONAL_ARRAYS[i]; SUPPORT
    hash: int  # xxh3 of the payload
    gid: int  # number of the group, in order of arrival
    durable: int  # the record's file was durable up to this offset when the record was written
    size: int  # bytes of payload, padding included
    meta_size: int  # bytes of JSON in the payload
    sequences: int
    tokens: int  # over all sequences
    env_id: int
    oldest: int  # oldest policy version that produced a token of the group


@dataclass(slots=True)
class Record:
    """A record that is not yet in a journal. `__post_init__` pads and hashes `payload`."""

    kind: int
    payload: bytes
    flags: int = 0
    gid: int = 0
    meta_size: int = 0
    sequences: int = 0
    tokens: int = 0
    env_id: int = UNKNOWN
    oldest: int = UNKNOWN
    draw: Draw | None = None  # as in the payload's JSON
    hash: int = field(init=False)

    def __post_init__(self) -> None:
        if padding := -len(self.payload) % 8:
            self.payload += b"\0" * padding
        self.hash = xxhash.xxh3_64_intdigest(self.payload)

    def disambiguate(self, number: int) -> None:
        """Give the `number`-th of several equal groups a hash of its own.

        The number is appended to the payload, behind everything that readers look at.
        """
        self.payload += number.to_bytes(8, "little")
        self.hash = xxhash.xxh3_64_intdigest(self.payload)

    @property
    def size(self) -> int:
        """Return the record's size in bytes, header included."""
        return HEADER_BYTES + len(self.payload)

    def header(self, durable: int = 0) -> bytes:
        body = _BODY.pack(
            self.hash,
            self.gid,
            durable,
            len(self.payload),
            self.meta_size,
            self.sequences,
            self.tokens,
            self.env_id,
            self.oldest,
        )
        return _HEAD.pack(MAGIC, self.kind, self.flags, _seal(self.kind, self.flags, body)) + body

    def to_bytes(self) -> bytes:
        return self.header() + self.payload


def _seal(kind: int, flags: int, body: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=kind << 16 | flags)


def header_at(buffer: Buffer, start: int) -> Header | None:
    """Return the header at `start`, or None unless the whole record is there and intact."""
    if start + HEADER_BYTES > len(buffer):
        return None
    magic, kind, flags, seal = _HEAD.unpack_from(buffer, start)
    body = buffer[start + _HEAD.size : start + HEADER_BYTES]
    if magic != MAGIC or _seal(kind, flags, body) != seal:
        return None
    header = Header(kind, flags, *_BODY.unpack(body))
    payload = buffer[start + HEADER_BYTES : start + HEADER_BYTES + header.size]
    intact = len(payload) == header.size and xxhash.xxh3_64_intdigest(payload) == header.hash
    return header if intact else None


def scan(buffer: Buffer) -> Iterator[tuple[int, int, Header]]:
    """Yield (start, end, header) of each record in order, up to the first that is not intact."""
    start = 0
    while header := header_at(buffer, start):
        end = start + HEADER_BYTES + header.size
        yield start, end, header
        start = end
