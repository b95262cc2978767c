"""A record: the unit in which groups and events lie in the journal, and travel in a lease.

    header   64 bytes, little-endian
    payload  padded to a multiple of 8 bytes

The header carries two hashes (xxh3): of the payload, and of itself. The first recognises a group that is sent twice, the two
together a record that was torn or damaged. It also says how much of its file was already durable when it was written: that tells
damage from the harmless disorder in which a power cut may leave the records of a commit that nobody was promised.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash

GROUP, EVENT, SNAPSHOT = 1, 2, 3
MAGIC = b"ATJ1"
UNKNOWN = -1  # env_id or oldest policy version that the sender did not tell

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct("<4sHHQ")  # magic, kind, flags, hash of what follows up to the payload
_BODY = struct.Struct("<QQQIIIIii")
HEADER_BYTES = _HEAD.size + _BODY.size


class Header(NamedTuple):
    kind: int  # GROUP, EVENT or SNAPSHOT
    flags: int  # which optional arrays the payload holds
    hash: int  # xxh3 of the payload
    gid: int  # number of the group, rising in order of arrival
    durable: int  # the record's file was durable up to this offset when the record was written
    size: int  # bytes of payload, padding included
    meta_size: int  # bytes of JSON in the payload
    sequences: int
    tokens: int  # over all sequences
    env_id: int
    oldest: int  # oldest policy version that produced a token of the group


@dataclass(slots=True)
class Record:
    """A record that is not yet in a journal. `payload` is padded by `__post_init__`."""

    kind: int
    payload: bytes
    flags: int = 0
    gid: int = 0
    meta_size: int = 0
    sequences: int = 0
    tokens: int = 0
    env_id: int = UNKNOWN
    oldest: int = UNKNOWN
    hash: int = field(init=False)

    def __post_init__(self) -> None:
        self.payload += b"\0" * (-len(self.payload) % 8)
        self.hash = xxhash.xxh3_64_intdigest(self.payload)

    def tell_apart(self, number: int) -> None:
        """Make this the `number`-th of several equal ones, with a hash of its own. What lies behind the payload's parts is never read."""
        self.payload += number.to_bytes(8, "little")
        self.hash = xxhash.xxh3_64_intdigest(self.payload)

    @property
    def size(self) -> int:
        """Bytes in the journal."""
        return HEADER_BYTES + len(self.payload)

    def header(self, durable: int) -> bytes:
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
        return _HEAD.pack(MAGIC, self.kind, self.flags, xxhash.xxh3_64_intdigest(body)) + body


def header_at(buffer: Buffer, start: int) -> Header | None:
    """The header at `start`, or None unless the whole record is there and intact."""
    if start + HEADER_BYTES > len(buffer):
        return None
    magic, kind, flags, seal = _HEAD.unpack_from(buffer, start)
    if (
        magic != MAGIC
        or xxhash.xxh3_64_intdigest(buffer[start + _HEAD.size : start + HEADER_BYTES]) != seal
    ):
        return None
    header = Header(kind, flags, *_BODY.unpack_from(buffer, start + _HEAD.size))
    payload = buffer[start + HEADER_BYTES : start + HEADER_BYTES + header.size]
    return (
        header
        if len(payload) == header.size and xxhash.xxh3_64_intdigest(payload) == header.hash
        else None
    )


def scan(buffer: Buffer, start: int = 0) -> Iterator[tuple[int, int, Header]]:
    """(start, end, header) of each record in order; stops before the first that is not whole and intact."""
    while header := header_at(buffer, start):
        end = start + HEADER_BYTES + header.size
        yield start, end, header
        start = end
