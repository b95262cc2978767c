"""The policy store: published policy versions, as directories of plain files.

Order of writes of a publish. No reader ever sees part of a version:

1. Rank 0 makes policy/<version>-<attempt>/. Every trainer rank writes its files there (temporary
   name, fsync, rename).
2. manifest.json is written the same way: size and xxh3 of every file, and how to make the files
   from the previous version.
3. latest.json is replaced.
4. Old versions are retired in two steps. One publish removes their manifests, so that no further
   reader finds them. The next one removes their files, unless a reader holds a lease on them.

A crash between two steps leaves the version in latest.json complete. A later `retire` removes
directories without a manifest.

Every start of the learner claims an attempt number of its own. A resumed learner publishes
version 12 again, into another directory, and readers take it as newer because its attempt is.
A publisher whose attempt is no longer the newest is refused.

A version is "full" (all files are stored), a "delta" (only the changes to its base version are
stored) or an "adapter" (see `policy.lora`). A full version carries a delta as well if there was a
version before it: readers that hold that version need not read the full one. The manifest has
size and hash of every file of the full state in any case, so readers verify what they made.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from atropos_hpc.contracts.policy import LatestPolicy, Manifest, PolicyVersion
from atropos_hpc.policy.leases import LeaseTable
from atropos_hpc.policy.manifest import (
    MANIFEST,
    BadVersion,
    UnreadableManifest,
    read_manifest,
    write_manifest,
)
from atropos_hpc.runtime.run_dir import numbered, read_struct, write_struct

RESERVE_BYTES = 64 << 20  # a publish leaves this much of the filesystem free
_PUBLISHER = "publisher-"  # a directory of this name claims an attempt number


class StoreFull(OSError):
    """There is not enough space for a version: policy.max_bytes or the filesystem is used up."""


class Superseded(Exception):
    """Another start of the learner publishes to this store now."""


class PolicyStore:
    """The store under `root`. Rank 0 of the learner writes; any process reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._leases = LeaseTable(root)

    def directory(self, version: PolicyVersion) -> Path:
        """Return the directory of a version, whether it exists or not."""
        return self.root / str(version)

    # --- publishing

    def claim_attempt(self) -> int:
        """Claim an attempt number that is greater than every other, for this process alone."""
        attempt = max([self._newest_attempt(), *(v.attempt for v in self._versions())]) + 1
        while True:
            try:
                (self.root / f"{_PUBLISHER}{attempt}").mkdir()
                break
            except FileExistsError:
                attempt += 1
        for older in self._attempts():
            if older < attempt:
                (self.root / f"{_PUBLISHER}{older}").rmdir()
        return attempt

    def begin(self, version: PolicyVersion) -> Path:
        """Make the version's directory and return it."""
        directory = self.directory(version)
        directory.mkdir(exist_ok=True)
        return directory

    def check_quota(self, needed: int, limit: int | None) -> None:
        """Raise StoreFull if `needed` more bytes exceed `limit` or the filesystem's free space."""
        used = sum(_size(self.directory(version)) for version in self._versions())
        if limit is not None and used + needed > limit:
            raise StoreFull(
                f"the store has {used} bytes and a version needs {needed},"
                f" but policy.max_bytes is {limit}"
            )
        status = os.statvfs(self.root)
        free = status.f_bavail * status.f_frsize
        if free < needed + RESERVE_BYTES:
            raise StoreFull(f"a version needs {needed} bytes, but {self.root} has {free} left")

    def commit(self, manifest: Manifest) -> None:
        """Publish a version, all of whose files are durable: write its manifest and latest.json.

        Raises Superseded if another start of the learner has claimed the store.
        """
        version = manifest.version
        if (newest := self._newest_attempt()) > version.attempt:
            raise Superseded(
                f"{self.root}: attempt {newest} publishes here now; this is attempt"
                f" {version.attempt}, so {version} was not published"
            )
        write_manifest(self.directory(version), manifest)
        latest = LatestPolicy(version.version, version.attempt, str(version))
        write_struct(self.root / "latest.json", latest)

    def retire(self, keep: int, attempt: int) -> None:
        """Remove what is older than the newest `keep` versions.

        Kept as well are the version in latest.json, leased versions, and all that these are made
        from. Call it between publishes of `attempt`: a directory that is being written counts as
        incomplete. Removal takes two calls, see the order of writes above.

        Raises UnreadableManifest, and removes nothing, while it is not known what a version needs.
        """
        try:
            latest = self.latest()
        except BadVersion:
            return
        if latest is None or self._newest_attempt() > attempt:
            return
        leased = self._leases.leased()
        complete: dict[PolicyVersion, Manifest] = {}
        incomplete: list[PolicyVersion] = []
        for version in self._versions():
            try:
                complete[version] = self.manifest(version)
            except UnreadableManifest:
                raise
            except BadVersion:
                incomplete.append(version)
        newest = sorted(complete, reverse=True)[:keep]
        needed = _with_bases([latest, *leased, *newest], complete)
        for version in complete.keys() - needed:
            (self.directory(version) / MANIFEST).unlink(missing_ok=True)
        for version in incomplete:
            if version not in leased and version != latest:
                # A file that an NFS client holds open stays; the next call removes it.
                shutil.rmtree(self.directory(version), ignore_errors=True)

    # --- reading

    def latest(self) -> PolicyVersion | None:
        """Return the newest version, or None before the first publish.

        Raises BadVersion if latest.json is damaged.
        """
        try:
            latest = read_struct(self.root / "latest.json", LatestPolicy)
        except ValueError as error:
            raise BadVersion(f"{self.root}/latest.json is damaged: {error}") from error
        if latest is None:
            return None
        version = PolicyVersion(version=latest.version, attempt=latest.attempt)
        if latest.directory != str(version):
            raise BadVersion(f"{self.root}/latest.json is damaged: {latest}")
        return version

    def manifest(self, version: PolicyVersion) -> Manifest:
        """Return a version's manifest. Raises BadVersion if it is missing or of another version."""
        manifest = read_manifest(self.directory(version))
        if manifest.version != version:
            raise BadVersion(f"{version}: its manifest is that of {manifest.version}")
        return manifest

    # --- the directory

    def _versions(self) -> list[PolicyVersion]:
        versions = []
        for name in os.listdir(self.root):
            try:
                versions.append(PolicyVersion.parse(name))
            except ValueError:
                continue
        return versions

    def _attempts(self) -> list[int]:
        return list(numbered(self.root, _PUBLISHER))

    def _newest_attempt(self) -> int:
        return max(self._attempts(), default=0)


def _with_bases(
    versions: Iterable[PolicyVersion], manifests: Mapping[PolicyVersion, Manifest]
) -> set[PolicyVersion]:
    """Return those versions that have manifests and, of deltas, what they are made from."""
    needed: set[PolicyVersion] = set()
    for start in versions:
        version: PolicyVersion | None = start
        while version is not None and version in manifests and version not in needed:
            needed.add(version)
            manifest = manifests[version]
            version = manifest.base if manifest.kind == "delta" else None
    return needed


def _size(directory: Path) -> int:
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except FileNotFoundError:
        return 0
