"""A lossless sparse code for the step from one policy version to the next.

One optimizer step leaves most bf16 weights as they were (over 97 % at a learning rate of 1e-6), and moves most of the others to a
neighbouring number. So a delta says which elements changed, and by how many steps of their bit patterns, as unsigned whole numbers of
their width: exact for every dtype and every bit pattern, NaN payloads and -0.0 included. Bytes of the same meaning lie together and are
compressed by zstd, whose entropy coder does the rest.

A chunk, of up to CHUNK elements of one width, is two zstd frames:

    gaps     one byte b per change: b < 255 is the number of unchanged elements before it, 255 means 255 of them and no change yet
    values   new - old modulo 2**bits, zigzag-coded (0, -1, 1, -2, ... are 0, 1, 2, 3, ...), its lowest byte of all changes first, then
             the next byte of all, ...

and a delta is the length of its head (8 bytes, little-endian), the head (JSON) and the chunks that have changes, in order. Decoding
adds to what is there, so it must happen once, on the right base: readers compare the hash of the result.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

CODEC = "gaps-zigzag-zstd"
CHUNK = 1 << 19  # elements: small enough for a core's cache
ESCAPE = 255
SPARSE = 0.08  # of elements changed
SAMPLE, SAMPLED = 1 << 12, 64  # `changed_share` looks at one block of SAMPLE elements in SAMPLED


class BadDelta(ValueError):
    """These bytes are not a delta, or one of something else."""


@dataclass(frozen=True)
class Run:
    """A stretch of bytes that holds numbers of one width: where it starts, how long it is, and the width (1, 2, 4 or 8), in bytes."""

    start: int
    bytes: int
    width: int


def encode(old: Bytes, new: Bytes, runs: Sequence[Run]) -> bytes:
    """The delta from `old` to `new`, arrays of as many bytes. `runs` cover them, in order; a run is a multiple of its width long."""
    chunks: list[list[int]] = []
    frames: list[bytes] = []
    compressor = zstandard.ZstdCompressor(level=1)
    for start, count, width in _chunks(runs):
        before, after = (_numbers(array, start, count, width) for array in (old, new))
        where = _where(before != after)
        if len(where):
            gaps, values = _gaps(where), _planes(after[where] - before[where])
            own = [compressor.compress(coded.data) for coded in (gaps, values)]
            chunks.append([start, count, width, len(gaps), len(where), *map(len, own)])
            frames += own
    head = json.dumps(
        {"codec": CODEC, "bytes": len(new), "chunks": chunks}, separators=(",", ":")
    ).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *frames])


def apply(delta: Any, target: Bytes) -> None:
    """Turn `target`, the bytes that `delta` was made from, into those that it was made for, in place. `delta`: any buffer.

    Raises BadDelta if this is no delta of that many bytes; `target` is then as before, or partly changed.
    """
    view, decompressor = memoryview(delta), zstandard.ZstdDecompressor()
    chunks, at = _head(view, len(target))
    try:
        for start, count, width, coded, changes, *sizes in chunks:
            gaps, values = (
                np.frombuffer(_plain(decompressor, view[begin : begin + size], length), np.uint8)
                for begin, size, length in (
                    (at, sizes[0], coded),
                    (at + sizes[0], sizes[1], changes * width),
                )
            )
            at += sum(sizes)
            where = _positions(gaps)
            if len(where) != changes or len(values) != changes * width or where[-1] >= count:
                raise BadDelta(
                    f"chunk at {start}: {len(where)} positions and {len(values)} bytes for {changes} changes"
                )
            numbers = _numbers(target, start, count, width)
            numbers[where] += _differences(values, width)
    except zstandard.ZstdError as error:
        raise BadDelta(f"damaged at byte {at}: {error}") from error
    if at != len(view):
        raise BadDelta(f"{len(view)} bytes, where {at} were to be expected")


def changed_share(old: Bytes, new: Bytes, runs: Sequence[Run]) -> float:
    """About which share of the elements differs, between 0 and 1, from a look at some."""
    seen = changed = 0
    for start, count, width in _chunks(runs):
        before, after = (_numbers(array, start, count, width) for array in (old, new))
        for first in range(0, count, SAMPLE * SAMPLED):
            block = slice(first, first + SAMPLE)
            seen += len(before[block])
            changed += int(np.count_nonzero(before[block] != after[block]))
    return changed / seen if seen else 0.0


def _plain(decompressor: zstandard.ZstdDecompressor, frame: memoryview, length: int) -> bytes:
    """What a frame of `length` bytes holds. A damaged frame may claim any length, and zstd would make room for it first."""
    if (claimed := zstandard.frame_content_size(frame)) != length:
        raise BadDelta(f"a frame of {claimed} bytes, where {length} were to be expected")
    return decompressor.decompress(frame)


def _head(view: memoryview, length: int) -> tuple[list[list[int]], int]:
    """The chunks that the head lists, and where the first begins."""
    at = 8 + int.from_bytes(view[:8], "little")
    try:
        head = json.loads(bytes(view[8:at]))
        chunks: list[list[int]] = head["chunks"]
        codec, expected = head["codec"], head["bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadDelta(f"no head that can be read: {error!r}") from error
    if codec != CODEC or expected != length:
        raise BadDelta(
            f"a delta in {codec} for {expected} bytes, where one in {CODEC} for {length} is needed"
        )
    for chunk in chunks:
        if len(chunk) != 7 or not all(isinstance(number, int) and number >= 0 for number in chunk):
            raise BadDelta(f"a chunk is described as {chunk}")
        start, count, width, _, changes, *_ = chunk
        if (
            width not in (1, 2, 4, 8)
            or start + count * width > length
            or not 0 < changes <= count <= CHUNK
        ):
            raise BadDelta(f"a chunk is described as {chunk}, of {length} bytes")
    return chunks, at


def _chunks(runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """(start in bytes, elements, width) of each chunk. Neighbouring runs of one width are as one."""
    merged: list[Run] = []
    for run in runs:
        if run.bytes % run.width:
            raise ValueError(f"{run} is not a whole number of elements")
        if (
            merged
            and merged[-1].width == run.width
            and merged[-1].start + merged[-1].bytes == run.start
        ):
            merged[-1] = Run(merged[-1].start, merged[-1].bytes + run.bytes, run.width)
        else:
            merged.append(run)
    for run in merged:
        for start in range(run.start, run.start + run.bytes, CHUNK * run.width):
            yield start, min(CHUNK, (run.start + run.bytes - start) // run.width), run.width


def _numbers(array: Bytes, start: int, count: int, width: int) -> NDArray[Any]:
    """A view of `count` unsigned numbers, aligned or not."""
    return array[start : start + count * width].view(f"u{width}")


def _where(changed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """np.flatnonzero, in half the time where few are true: first the groups of eight that have any."""
    if len(changed) % 8 or np.count_nonzero(changed) > SPARSE * len(changed):
        return np.flatnonzero(changed)
    eights = changed.view(np.uint64)
    groups = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights[groups].view(np.bool_))
    where: NDArray[np.intp] = (groups[within >> 3] << 3) | (within & 7)
    return where


def _gaps(where: NDArray[np.intp]) -> Bytes:
    """Increasing positions as gap bytes."""
    gaps = where.astype(np.int32)
    gaps[1:] -= gaps[:-1].copy() + 1
    if gaps.max() < ESCAPE:
        return gaps.astype(np.uint8)
    escapes, rest = np.divmod(gaps, ESCAPE)
    ends = np.cumsum(escapes + 1) - 1  # where the rest of each gap stands, behind its escapes
    coded = np.full(int(ends[-1]) + 1, ESCAPE, np.uint8)
    coded[ends] = rest
    return coded


def _positions(gaps: Bytes) -> NDArray[np.intp]:
    """`_gaps`, undone."""
    change = gaps != ESCAPE
    where = (gaps + change).astype(
        np.intp
    )  # steps: an escape's and the longest gap's are both of 255
    np.cumsum(where, out=where)
    where -= 1
    return where if change.all() else where[change]


def _planes(differences: NDArray[Any]) -> Bytes:
    """Unsigned differences, zigzag-coded and cut into planes of bytes, the lowest first."""
    signed = differences.view(f"i{differences.itemsize}")
    coded = ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(differences.dtype)
    return np.concatenate([(coded >> 8 * byte).astype(np.uint8) for byte in range(signed.itemsize)])


def _differences(planes: Bytes, width: int) -> NDArray[Any]:
    """`_planes`, undone: unsigned differences."""
    coded = np.empty((len(planes) // width, width), np.uint8)
    for byte, plane in enumerate(planes.reshape(width, -1)):
        coded[:, byte] = plane
    numbers = coded.reshape(-1).view(f"<u{width}")
    return (numbers >> 1) ^ (-(numbers & 1).view(f"<i{width}")).view(f"<u{width}")
