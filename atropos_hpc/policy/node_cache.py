"""A node's own copy of the newest policy version, verified, in memory, for all of the node's servers.

A version is read from the shared filesystem once per node, or made out of the copy at hand and a delta, and its hashes are compared; then
it lies under `policy.cache` (in /dev/shm: memory) as plain files, and the servers map them. While a version is made the one before stays,
so the node needs memory for two.

The directory belongs to this process: it holds a lock in it, and whoever starts on this node removes the directories whose holder has
ended (a killed process cannot do so itself).
"""

import fcntl
import logging
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from atropos_hpc.policy import delta
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.shard_buffer import THREADS, read_into, xxh3
from atropos_hpc.policy.store import (
    BadVersion,
    File,
    Lease,
    Manifest,
    NoRoom,
    Published,
    Route,
    write_manifest,
)

log = logging.getLogger(__name__)

PREFIX = f"atropos-hpc-{os.getuid()}-"
LOCK = "holder"


class Mirror:
    """The copy under `cache`, of versions in the store at `store`."""

    def __init__(self, cache: Path, store: Path) -> None:
        self.store = store
        self.newest: Manifest | None = None
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        self.root = cache / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self.root.mkdir(mode=0o700)
        self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def bring(self, target: Manifest, route: Route, lease: Lease) -> Published:
        """Make `target` by that route and let the copy before it go (who has its files mapped keeps them).

        Raises BadVersion when a file is missing, cannot be read, or is not what the manifest says; NoRoom when memory does not do.
        """
        size = sum(file.bytes for file in target.files)
        status = os.statvfs(self.root)
        if (free := status.f_bavail * status.f_frsize) < size:
            raise NoRoom(
                f"version {target.version} needs {size} bytes in {self.root.parent}, which has {free}: see policy.cache"
            )
        directory = self.root / target.name
        shutil.rmtree(
            directory, ignore_errors=True
        )  # of a try before, or a damaged version that is published again
        making = self.root / f"{target.name}.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                list(
                    threads.map(
                        lambda file: self._make(making / file.file, file, target, route, lease),
                        target.files,
                    )
                )
            kind = "full" if target.kind == "delta" else target.kind
            write_manifest(making, replace(target, kind=kind, base=None, deltas=(), local=True))
            making.rename(directory)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        if self.newest is not None and self.newest.name != target.name:
            shutil.rmtree(self.root / self.newest.name, ignore_errors=True)
        self.newest = target
        return Published(target.attempt, target.version, directory)

    def close(self) -> None:
        """Free the memory."""
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    def _make(self, path: Path, file: File, target: Manifest, route: Route, lease: Lease) -> None:
        """One file of the full state, in place."""
        with _mapped(path, file.bytes) as data:
            begin = self._read_whole if route.start is not None else self._copy
            digest = begin(data, file, route, lease)
            for step in route.deltas:
                change = next((each for each in step.deltas if each.makes == file.file), None)
                if change is None:
                    raise BadVersion(f"{step.name}: nothing in it makes {file.file}")
                coded = np.empty(change.bytes, np.uint8)
                self._read(step.name, change, coded, lease)
                try:
                    delta.apply(coded, data)
                except delta.BadDelta as error:
                    raise BadVersion(f"{step.name}/{change.file}: {error}") from error
                digest = ""
            if (digest or xxh3(data)) != file.xxh3:
                raise BadVersion(
                    f"{target.name}: {file.file} as made from {', '.join(route.directories)} is not what the manifest says"
                )

    def _read_whole(self, data: Bytes, file: File, route: Route, lease: Lease) -> str:
        """The full version's file of that name. Its own hash was compared, and is returned."""
        assert route.start is not None
        found = [
            each
            for each in route.start.files
            if each.file == file.file and each.bytes == file.bytes
        ]
        if not found:
            raise BadVersion(f"{route.start.name}: has no {file.file} of {file.bytes} bytes")
        self._read(route.start.name, found[0], data, lease)
        return found[0].xxh3

    def _copy(self, data: Bytes, file: File, route: Route, lease: Lease) -> str:
        """The copy at hand. Its hash was compared when it was made, and will be again."""
        assert self.newest is not None
        try:
            mine = np.memmap(self.root / self.newest.name / file.file, np.uint8, "r")
        except OSError as error:
            raise BadVersion(f"the copy of {self.newest.name}: {error}") from error
        if len(mine) != len(data):
            raise BadVersion(
                f"the copy of {self.newest.name}: {file.file} has {len(mine)} bytes, not {len(data)}"
            )
        data[:] = mine
        return ""

    def _read(self, version: str, file: File, target: Bytes, lease: Lease) -> None:
        """A file of the store, checked."""
        path = f"{version}/{file.file}"
        try:
            digest = read_into(self.store / version / file.file, target, lease.renew)
        except (OSError, EOFError) as error:
            raise BadVersion(f"{path}: {error}") from error
        if digest != file.xxh3:
            raise BadVersion(f"{path}: xxh3 {digest}, the manifest says {file.xxh3}")


def sweep(cache: Path) -> None:
    """Remove what processes of this user left behind that are no more."""
    for directory in cache.glob(f"{PREFIX}*"):
        try:
            fd = os.open(directory / LOCK, os.O_RDWR)
        except OSError:
            continue  # being made, or being removed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
            log.info("removed %s, whose owner has ended", directory)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


@contextmanager
def _mapped(path: Path, size: int) -> Iterator[Bytes]:
    """A new file of that size, as an array."""
    with path.open("xb+") as file:
        if not size:
            yield np.empty(0, np.uint8)
            return
        os.posix_fallocate(
            file.fileno(), 0, size
        )  # a full tmpfs is an error here, and not a signal at the first touch
        yield np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
