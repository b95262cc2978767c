"""A rank's share of a published model: whole tensors in one buffer that is laid out as their safetensors file will be.

The buffer is what is written, hashed, and compared with the next version, without a copy in between. It begins at a page and its header
is a whole number of blocks, so a large share can be written past the page cache (O_DIRECT) by a few threads, while the next part of it is
still being filled. Reading goes the same way, into any buffer. Numbers here are bytes; what they mean is the header's business.
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
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from atropos_hpc.policy.delta import Bytes, Run
from atropos_hpc.runtime.run_dir import sync_directory

BLOCK = 4096  # O_DIRECT's unit: of address, offset and length
SEGMENT = 8 << 20  # that one thread writes or reads at a time
THREADS = 4
DIRECT_BYTES = 64 << 20  # below that, the page cache is quicker and does no harm
WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a share: its name, its dtype in safetensors' words (BF16, F32, ...) and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = WIDTHS[self.dtype]
        for length in self.shape:
            size *= length
        return size


class Share:
    """The buffer of these tensors, in this order, with its header; the tensors' bytes are as the kernel gives them: zeros."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.bytes],
            }
            at += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % BLOCK)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + at
        self.buffer = aligned(self.size)
        self.buffer[: len(self.header)] = np.frombuffer(self.header, np.uint8)
        self.runs = [Run(0, len(self.header), 1)]
        self.parts: dict[str, Bytes] = {}
        self._ends: dict[str, int] = {}
        at = len(self.header)
        for tensor in tensors:
            self.runs.append(Run(at, tensor.bytes, WIDTHS[tensor.dtype]))
            self.parts[tensor.name] = self.buffer[at : at + tensor.bytes]
            at += tensor.bytes
            self._ends[tensor.name] = at

    def end(self, name: str) -> int:
        """The byte of the file behind that tensor."""
        return self._ends[name]

    @property
    def bytes(self) -> Bytes:
        """What the file holds."""
        return self.buffer[: self.size]


def aligned(size: int) -> Bytes:
    """Zeros, at a page's start, with room for whole blocks."""
    return np.frombuffer(mmap.mmap(-1, max(BLOCK, -(-size // BLOCK) * BLOCK)), np.uint8)


def xxh3(data: Bytes) -> str:
    """xxh3-64, in hex."""
    return xxhash.xxh3_64_hexdigest(data.data)


def write_share(path: Path, share: Share, filling: Iterable[int] = ()) -> dict[str, Any]:
    """Write a share under a temporary name, sync, rename. Returns {"file", "bytes", "xxh3"} of what was written.

    `filling` fills the share meanwhile, and yields how many of its bytes stand; it is always run to its end, as it may be collective.

    Raises OSError (full disk, quota), and then leaves no file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    digest, hashed = xxhash.xxh3_64(), 0
    pending: list[Future[None]] = []
    failure: OSError | None = None
    fd = -1
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, share.size)
        except OSError as error:
            failure = error
        with ThreadPoolExecutor(THREADS) as threads:
            for stands in chain(filling, [share.size]):
                while failure is None and (
                    hashed + SEGMENT <= stands or hashed < stands == share.size
                ):
                    end = min(hashed + SEGMENT, share.size)
                    whole_blocks = share.buffer[hashed : -(-end // BLOCK) * BLOCK]
                    pending.append(threads.submit(_all_of, os.pwritev, fd, whole_blocks, hashed))
                    digest.update(share.buffer[hashed:end].data)
                    hashed = end
        if failure is not None:
            raise failure
        for each in pending:
            each.result()
        os.ftruncate(fd, share.size)
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
    return {"file": path.name, "bytes": share.size, "xxh3": digest.hexdigest()}


def read_into(path: Path, target: Bytes, alive: Callable[[], None] = lambda: None) -> str:
    """Fill `target` from a file of exactly that many bytes, by several threads. Returns their xxh3 as it was read, in hex.

    `target`: at a page's start, with room for whole blocks behind it if it is large. `alive` is called now and then, and may end
    the reading by raising.

    Raises OSError, and EOFError when the file is shorter or longer.
    """
    alive()
    digest = xxhash.xxh3_64()
    fd = _open(path, os.O_RDONLY, len(target))
    try:
        if (size := os.fstat(fd).st_size) != len(target):
            raise EOFError(f"{size} bytes, not {len(target)}")
        whole = len(target) // BLOCK * BLOCK
        with ThreadPoolExecutor(THREADS) as threads:
            segments = [
                slice(start, min(start + SEGMENT, whole)) for start in range(0, whole, SEGMENT)
            ]
            pending = [
                threads.submit(_all_of, os.preadv, fd, target[segment], segment.start)
                for segment in segments
            ]
            try:
                for segment, each in zip(segments, pending, strict=True):
                    each.result()
                    digest.update(target[segment].data)
                    alive()
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


def tensors_of(data: Any) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """name -> (dtype, shape, first byte, byte behind the last) of a safetensors file's bytes. Raises ValueError if they are none."""
    view = memoryview(data)
    begin = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or begin > len(view):
        raise ValueError("too short for its header")
    found = {}
    for name, about in json.loads(bytes(view[8:begin])).items():
        if name == "__metadata__":
            continue
        try:
            tensor = Tensor(name, about["dtype"], tuple(about["shape"]))
            first, last = (begin + offset for offset in about["data_offsets"])
            fits = last - first == tensor.bytes and begin <= first <= last <= len(view)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name}: {error!r}") from error
        if not fits:
            raise ValueError(f"{name}: does not lie in the file")
        found[name] = tensor.dtype, tensor.shape, first, last
    return found


def _open(path: Path, flags: int, size: int) -> int:
    """Past the page cache, if this is large and the filesystem can."""
    if size >= DIRECT_BYTES:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            flags &= ~os.O_EXCL  # some filesystems create the file, and refuse then
    return os.open(path, flags, 0o644)


def _all_of(call: Callable[[int, Sequence[Any], int], int], fd: int, part: Bytes, at: int) -> None:
    """pread or pwrite the whole part. A filesystem that is stricter about O_DIRECT than its open is used without."""
    while len(part):
        try:
            done = call(fd, [part], at)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        if not done:
            raise EOFError(f"ends at byte {at}")
        part, at = part[done:], at + done
