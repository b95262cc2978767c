"""A node's verified copy of the newest policy version, in memory, shared by the node's servers.

A version is read from the shared filesystem once per node, or made from the copy held and a delta.
Its hashes are verified. It then lies under `policy.cache` (in /dev/shm: memory) as plain files that
the servers map. The previous copy is kept while the next is made, so the node needs memory for two.
One that a server is loading stays until a copy is made after that.

The directory belongs to one process. One that starts on the node removes those whose owner has
ended, because a killed process cannot do so itself.
"""

import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from atropos_hpc.contracts.policy import FileEntry, Manifest, PolicyVersion
from atropos_hpc.policy import delta
from atropos_hpc.policy.delta import Bytes
from atropos_hpc.policy.leases import Lease
from atropos_hpc.policy.manifest import MANIFEST, BadVersion, write_manifest
from atropos_hpc.policy.routes import Route
from atropos_hpc.policy.shard_buffer import THREADS, read_into, xxh3
from atropos_hpc.runtime.private_tmp import OwnedDirectory

PREFIX = f"atropos-hpc-{os.getuid()}-"


class CacheFull(OSError):
    """There is not enough memory for another version."""


class NodeCache:
    """The copy under `cache` of a version in the store at `store`."""

    def __init__(self, cache: Path, store: Path) -> None:
        self.store = store
        self.newest: Manifest | None = None
        self.loading: list[Path] = []  # directories from which servers load a version now
        cache.mkdir(parents=True, exist_ok=True)
        self._own(cache)

    def _own(self, cache: Path) -> None:
        self._owned = OwnedDirectory(cache, PREFIX)
        self.root = self._owned.path

    def held(self) -> PolicyVersion | None:
        """Return the version of the copy, if that is still there, and make a missing directory.

        systemd-logind (RemoveIPC) clears /dev/shm of a user's files when the user logs out.
        """
        if not self.root.exists():
            self._owned.remove()
            self._own(self.root.parent)
        if self.newest and not (self.root / str(self.newest.version) / MANIFEST).exists():
            self.newest = None
        return self.newest.version if self.newest else None

    def fetch(self, target: Manifest, route: Route, lease: Lease) -> Path:
        """Make a copy of `target` by the given route, and return its directory.

        Older copies are removed, except what a server is loading. Raises BadVersion when a file is
        missing, unreadable or not what the manifest says, and CacheFull when there is not enough
        memory.
        """
        self._remove_all_but(self.newest)
        self._check_space(target)
        directory = self.root / str(target.version)
        partial = self.root / f"{target.version}.partial"
        shutil.rmtree(directory, ignore_errors=True)  # of a version published again
        partial.mkdir()
        try:
            with ThreadPoolExecutor(THREADS) as threads:
                for made in [
                    threads.submit(self._make, partial / entry.file, entry, route, lease)
                    for entry in target.files
                ]:
                    made.result()
            kind = "full" if target.kind == "delta" else target.kind
            copy = msgspec.structs.replace(target, kind=kind, base=None, deltas=())
            write_manifest(partial, copy)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.newest = target
        self._remove_all_but(target)
        return directory

    def _remove_all_but(self, kept: Manifest | None) -> None:
        needed = {str(kept.version) if kept else "", *(path.name for path in self.loading)}
        for path in self.root.iterdir():
            if path.is_dir() and path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        self._owned.remove()

    def _check_space(self, target: Manifest) -> None:
        size = sum(entry.bytes for entry in target.files)
        status = os.statvfs(self.root)
        if (free := status.f_bavail * status.f_frsize) < size:
            raise CacheFull(
                f"version {target.version} needs {size} bytes, but {self.root.parent} has {free}:"
                " see policy.cache"
            )

    def _make(self, path: Path, entry: FileEntry, route: Route, lease: Lease) -> None:
        """Make one file of the full state, and verify its hash."""
        with _mapped(path, entry.bytes) as data:
            if route.start is not None:
                self._read_full(data, entry, route.start, lease)
            else:
                self._copy_held(data, entry)
            for step in route.deltas:
                self._apply(data, entry, step, lease)
            # A file that was read in full was hashed on the way.
            hashed = route.start is not None and not route.deltas
            if not hashed and xxh3(data) != entry.xxh3:
                sources = ", ".join(map(str, route.versions))
                raise BadVersion(
                    f"{entry.file} as made from {sources} is not what the manifest says"
                )

    def _read_full(self, data: Bytes, entry: FileEntry, start: Manifest, lease: Lease) -> None:
        source = next((file for file in start.files if file.file == entry.file), None)
        if source is None or source.bytes != entry.bytes:
            raise BadVersion(f"{start.version}: has no {entry.file} of {entry.bytes} bytes")
        self._read(start.version, source, data, lease)

    def _copy_held(self, data: Bytes, entry: FileEntry) -> None:
        assert self.newest is not None
        held = f"the copy held of {self.newest.version}"
        try:
            source = np.memmap(self.root / str(self.newest.version) / entry.file, np.uint8, "r")
        except OSError as error:
            raise BadVersion(f"{held}: {error}") from error
        if len(source) != len(data):
            raise BadVersion(f"{held}: {entry.file} has {len(source)} bytes, not {len(data)}")
        data[:] = source

    def _apply(self, data: Bytes, entry: FileEntry, step: Manifest, lease: Lease) -> None:
        change = next((each for each in step.deltas if each.target == entry.file), None)
        if change is None:
            raise BadVersion(f"{step.version}: has no delta for {entry.file}")
        encoded = np.empty(change.bytes, np.uint8)
        self._read(step.version, change, encoded, lease)
        try:
            delta.apply(encoded, data)
        except delta.BadDelta as error:
            raise BadVersion(f"{step.version}/{change.file}: {error}") from error

    def _read(self, version: PolicyVersion, entry: FileEntry, into: Bytes, lease: Lease) -> None:
        """Read a file of the store, and verify its hash."""
        name = f"{version}/{entry.file}"
        try:
            digest = read_into(self.store / name, into, lease.renew)
        except (OSError, EOFError) as error:
            raise BadVersion(f"{name}: {error}") from error
        if digest != entry.xxh3:
            raise BadVersion(f"{name}: xxh3 {digest}, the manifest says {entry.xxh3}")


@contextmanager
def _mapped(path: Path, size: int) -> Iterator[Bytes]:
    """Make a file of that size, and map it as an array."""
    with path.open("xb+") as file:
        if not size:
            yield np.empty(0, np.uint8)
            return
        # Without this, a full tmpfs would be a SIGBUS at the first write to the mapping.
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:  # others have filled it since `_check_space`
            raise CacheFull(f"{path.name} needs {size} bytes: {error}: see policy.cache") from error
        yield np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
