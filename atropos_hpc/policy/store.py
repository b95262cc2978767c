"""The policy store: published policy versions as directories of plain files.

Order of a publish, so that a reader never takes half a version:
  1. policy/<version>-<attempt>/ is made; every trainer rank writes its shards there (temporary name, fsync, rename).
  2. manifest.json is written the same way: every file's size and xxh3, base and kind.
  3. latest.json is replaced, and names the directory.
  4. Old versions are retired: manifest first, so that what remains is recognisably incomplete, then the files.
A crash between two of these leaves the last version in latest.json whole; directories without a manifest are swept by the next
`retire`. The attempt is a number that grows with each start of the learner: after a resume, version 12 is published anew, in
another directory, and readers take what latest.json names as newer because its attempt is.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from atropos_hpc.run_dir import read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_CHUNK = 1 << 24


@dataclass(frozen=True, order=True)
class Published:
    """One published version; later ones compare greater, also over a resume that went back to an earlier step."""

    attempt: int
    version: int
    directory: Path


class BadVersion(Exception):
    """A published version that fails its checks: a file missing, too short, or with other content than the manifest says."""


class PolicyStore:
    """The store under `root`. `begin` is for all ranks of the learner, the other writing methods for rank 0."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def next_attempt(self) -> int:
        """A number greater than every attempt that has left a directory here, or that latest.json names."""
        named = read_json(self.root / "latest.json").get("attempt", 0)
        return max([named, *(attempt for _, attempt, _ in self._versions())]) + 1

    def begin(self, version: int, attempt: int) -> Path:
        """Make the directory for a version's shards, if another rank has not done so already."""
        directory = self.root / f"{version}-{attempt}"
        directory.mkdir(exist_ok=True)
        return directory

    def commit(self, version: int, attempt: int, files: Sequence[dict[str, Any]], kind: str = "full") -> Published:
        """Declare a version complete. `files`: {"file", "bytes", "xxh3"} of each, all of them durable already.

        `kind`: full (weights of the whole model) or adapter (see `policy.adapter`).
        """
        directory = self.root / f"{version}-{attempt}"
        entries = [{key: file[key] for key in ("file", "bytes", "xxh3")} for file in files]
        write_json(directory / MANIFEST, {"version": version, "attempt": attempt, "kind": kind, "files": entries})
        write_json(self.root / "latest.json", {"version": version, "attempt": attempt, "directory": directory.name})
        return Published(attempt, version, directory)

    def latest(self) -> Published | None:
        """What latest.json names, or None before the first publish."""
        latest = read_json(self.root / "latest.json")
        return Published(latest["attempt"], latest["version"], self.root / latest["directory"]) if latest else None

    def retire(self, keep: int) -> None:
        """Remove all but the newest `keep` versions and whatever is incomplete; never what latest.json names.

        For between publishes: a directory that is being written counts as incomplete.
        """
        latest = self.latest()
        if latest is None:
            return
        complete = sorted(((a, v, d) for v, a, d in self._versions() if (d / MANIFEST).exists()), reverse=True)
        kept = {latest.directory, *(directory for _, _, directory in complete[:keep])}
        for _, _, directory in self._versions():
            if directory not in kept:
                with contextlib.suppress(FileNotFoundError):
                    (directory / MANIFEST).unlink()
                shutil.rmtree(directory, ignore_errors=True)  # on NFS a reader's open file leaves a name behind: the next sweep takes it

    def _versions(self) -> list[tuple[int, int, Path]]:
        found = []
        for name in os.listdir(self.root):
            version, dash, attempt = name.partition("-")
            if dash and version.isdigit() and attempt.isdigit():
                found.append((int(version), int(attempt), self.root / name))
        return found


def verify(published: Published) -> None:
    """Check every file against the manifest. Raises BadVersion, saying which file and what is wrong with it."""
    manifest = read_json(published.directory / MANIFEST)
    if not manifest:
        raise BadVersion(f"{published.directory}: no {MANIFEST}")
    for entry in manifest["files"]:
        path = published.directory / entry["file"]
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise BadVersion(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
            if (digest := file_digest(path)) != entry["xxh3"]:
                raise BadVersion(f"{path}: xxh3 {digest}, the manifest says {entry['xxh3']}")
        except FileNotFoundError:
            raise BadVersion(f"{path}: missing") from None


def file_digest(path: Path) -> str:
    """xxh3-64 of a file, in hex."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
