"""One rank's shard of a published model: whole tensors, laid out as a safetensors file.

The buffer is written, hashed and compared with the next version without a copy in between. It is
page-aligned and its header is a whole number of blocks, so a large shard can be written past the
page cache (O_DIRECT) by several threads, while its end is still being filled. Files are read the
same way, into any buffer. All sizes and offsets are in bytes.
"""

import errno
import fcntl
import json
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from atropos_hpc.contracts.policy import FileEntry
from atropos_hpc.policy.delta import Bytes, Region
from atropos_hpc.runtime.run_dir import sync_directory

BLOCK = 4096  # O_DIRECT's unit of address, offset and length
SEGMENT = 8 << 20  # written or read by one thread at a time
THREADS = 4
DIRECT_BYTES = 64 << 20  # smaller files go through the page cache, which is faster for them
WIDTHS = {
    **{name: 8 for name in ("F64", "I64", "U64")},
    **{name: 4 for name in ("F32", "I32", "U32")},
    **{name: 2 for name in ("BF16", "F16", "I16", "U16")},
    **{name: 1 for name in ("I8", "U8", "BOOL")},
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, its dtype as safetensors names it (BF16, F32, ...), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return WIDTHS[self.dtype] * prod(self.shape)


class TensorSpan(NamedTuple):
    """Where a tensor lies in a safetensors file: from byte `start` up to byte `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class ShardBuffer:
    """A zeroed buffer for these tensors, in this order, behind their safetensors header."""

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self.tensors = list(tensors)
        self.header = _header(tensors)
        self.size = len(self.header) + sum(tensor.bytes for tensor in tensors)
        self.buffer = aligned(self.size)
        self.buffer[: len(self.header)] = np.frombuffer(self.header, np.uint8)
        self.regions = [Region(0, len(self.header), 1)]
        self.parts: dict[str, Bytes] = {}
        self._ends: dict[str, int] = {}
        at = len(self.header)
        for tensor in tensors:
            self.regions.append(Region(at, tensor.bytes, WIDTHS[tensor.dtype]))
            self.parts[tensor.name] = self.buffer[at : at + tensor.bytes]
            at += tensor.bytes
            self._ends[tensor.name] = at

    def end(self, name: str) -> int:
        """Return the offset behind that tensor."""
        return self._ends[name]

    @property
    def bytes(self) -> Bytes:
        """The content of the file."""
        return self.buffer[: self.size]


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def aligned(size: int) -> Bytes:
    """Allocate a zeroed, page-aligned buffer of whole blocks that holds `size` bytes."""
    return np.frombuffer(mmap.mmap(-1, max(BLOCK, -(-size // BLOCK) * BLOCK)), np.uint8)


def xxh3(data: Bytes) -> str:
    """Return the xxh3-64 of a buffer, in hex."""
    return xxhash.xxh3_64_hexdigest(data.data)


def write_shard(path: Path, shard: ShardBuffer, filling: Iterable[int] = ()) -> FileEntry:
    """Write a shard under a temporary name, sync it, rename it.

    `filling` fills the buffer meanwhile and yields the number of bytes that are final. It may be
    collective, so it is always run to its end. Raises OSError (full disk, quota) and then leaves
    no file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    digest, hashed = xxhash.xxh3_64(), 0
    pending: list[Future[None]] = []
    failure: OSError | None = None
    fd = -1
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, shard.size)
        except OSError as error:
            failure = error
        with ThreadPoolExecutor(THREADS) as threads:
            for final in chain(filling, [shard.size]):
                while failure is None and (
                    hashed + SEGMENT <= final or hashed < final == shard.size
                ):
                    end = min(hashed + SEGMENT, shard.size)
                    whole_blocks = shard.buffer[hashed : -(-end // BLOCK) * BLOCK]
                    pending.append(threads.submit(_transfer, os.pwritev, fd, whole_blocks, hashed))
                    digest.update(shard.buffer[hashed:end].data)
                    hashed = end
        if failure is not None:
            raise failure
        for each in pending:
            each.result()
        os.ftruncate(fd, shard.size)
        os.fsync(fd)
        closing, fd = fd, -1
        os.close(closing)  # NFS reports a full disk here
        os.rename(temporary, path)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return FileEntry(path.name, shard.size, digest.hexdigest())


def read_into(path: Path, target: Bytes, heartbeat: Callable[[], None] = lambda: None) -> str:
    """Fill `target` from a file of exactly that size, by several threads. Return its xxh3 in hex.

    A large `target` must be page-aligned. `heartbeat` is called between segments and may abort the
    reading by raising. Raises OSError, and EOFError when the file has another size.
    """
    heartbeat()
    digest = xxhash.xxh3_64()
    fd = _open(path, os.O_RDONLY, len(target))
    try:
        if (size := os.fstat(fd).st_size) != len(target):
            raise EOFError(f"{size} bytes, not {len(target)}")
        whole = len(target) // BLOCK * BLOCK
        segments = [slice(at, min(at + SEGMENT, whole)) for at in range(0, whole, SEGMENT)]
        with ThreadPoolExecutor(THREADS) as threads:
            pending = [
                threads.submit(_transfer, os.preadv, fd, target[segment], segment.start)
                for segment in segments
            ]
            try:
                for segment, each in zip(segments, pending, strict=True):
                    each.result()
                    digest.update(target[segment].data)
                    heartbeat()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
        if whole < len(target):
            end = aligned(BLOCK)
            os.preadv(fd, [end.data], whole)
            target[whole:] = end[: len(target) - whole]
            digest.update(target[whole:].data)
    finally:
        os.close(fd)
    return digest.hexdigest()


def tensors_of(data: Any) -> dict[str, TensorSpan]:
    """Parse the header of a safetensors file's bytes. Raises ValueError if it is not one."""
    view = memoryview(data)
    begin = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or begin > len(view):
        raise ValueError("too short for its header")
    spans = {}
    for name, entry in json.loads(bytes(view[8:begin])).items():
        if name == "__metadata__":
            continue
        try:
            tensor = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            start, end = (begin + offset for offset in entry["data_offsets"])
            fits = end - start == tensor.bytes and begin <= start <= end <= len(view)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name}: {error!r}") from error
        if not fits:
            raise ValueError(f"{name}: lies outside of the file")
        spans[name] = TensorSpan(tensor.dtype, tensor.shape, start, end)
    return spans


def _open(path: Path, flags: int, size: int) -> int:
    """Open a file, past the page cache if it is large and the filesystem supports that."""
    if size >= DIRECT_BYTES:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            flags &= ~os.O_EXCL  # some filesystems create the file before they refuse
    return os.open(path, flags, 0o644)


def _transfer(
    call: Callable[[int, Sequence[Any], int], int], fd: int, part: Bytes, offset: int
) -> None:
    """Call preadv or pwritev until the whole part is transferred.

    Some filesystems accept O_DIRECT at open and refuse it here; it is switched off for them.
    """
    while len(part):
        try:
            done = call(fd, [part], offset)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        if not done:
            raise EOFError(f"ends at byte {offset}")
        part, offset = part[done:], offset + done
