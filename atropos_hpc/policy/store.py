"""The policy store: published policy versions as directories of plain files.

Order of a publish, so that a reader never takes half a version:
  1. policy/<version>-<attempt>/ is made; every trainer rank writes its share there (temporary name, fsync, rename).
  2. manifest.json is written the same way: every file's size and xxh3, and how to get there from the version before.
  3. latest.json is replaced, and names the directory.
  4. Old versions are retired in two steps: at one publish their manifests go, at the next one their files, unless a reader that had
     the manifest still reads them.
A crash between two of these leaves the last version in latest.json whole; directories without a manifest are swept by a later `retire`.
The attempt is a number that each start of the learner claims for itself: after a resume, version 12 is published anew, in another
directory, and readers take what latest.json names as newer because its attempt is. A publisher whose attempt is not the newest any
more is refused.

A version is `full` (the files are there), a `delta` (only what turns the base version's files into this one's is there), or an `adapter`.
A full version has a delta too, where there was a version before it: who has that one needs not read the whole. Whatever the kind, the
manifest has size and hash of every file of the full state; a reader that has made them out of deltas compares.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from atropos_hpc.runtime.run_dir import read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LEASE_S = 60.0  # a reader that has not renewed its lease for so long has ended
RESERVE_BYTES = 64 << 20  # that a publish leaves free on the filesystem
_CHUNK = 1 << 24

Key = tuple[int, int]  # (attempt, version): later ones compare greater


class BadVersion(Exception):
    """A published version that fails its checks: a file missing, too short, or with other content than the manifest says."""


class NoRoom(OSError):
    """The store may not take another version: policy.max_bytes, or the filesystem's free space, is used up."""


class Superseded(Exception):
    """Another start of the learner has taken this store over."""


@dataclass(frozen=True, order=True)
class Published:
    """One published version; later ones compare greater, also over a resume that went back to an earlier step."""

    attempt: int
    version: int
    directory: Path = field(compare=False)

    @property
    def key(self) -> Key:
        return self.attempt, self.version


@dataclass(frozen=True)
class File:
    """A file of a version. `makes`: of a delta, the name of the file of the full state that it makes."""

    file: str
    bytes: int
    xxh3: str
    makes: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a version consists of.

    `files`: of the full state; in a delta they are what a reader must end up with. `base`: the version that `deltas` start from.
    `local`: the files are a node's own verified copy, in memory.
    """

    version: int
    attempt: int
    kind: str
    files: tuple[File, ...]
    base: Key | None = None
    deltas: tuple[File, ...] = ()
    local: bool = False

    @property
    def key(self) -> Key:
        return self.attempt, self.version

    @property
    def name(self) -> str:
        return f"{self.version}-{self.attempt}"

    @property
    def there(self) -> tuple[File, ...]:
        """The files that lie in the version's directory."""
        return (() if self.kind == "delta" else self.files) + self.deltas


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """With a seal: its own hash, since a flipped bit in it may still leave good JSON."""
    body = asdict(manifest)
    write_json(directory / MANIFEST, {**body, "seal": _seal(body)})


def read_manifest(directory: Path) -> Manifest:
    """Raises BadVersion if there is none, or one that has changed since it was written."""
    try:
        body = json.loads((directory / MANIFEST).read_bytes())
        seal = body.pop("seal")
        if seal != _seal(body):
            raise BadVersion(f"{directory.name}: {MANIFEST} is damaged")
        for key in ("files", "deltas"):
            body[key] = tuple(File(**file) for file in body[key])
        body["base"] = body["base"] and tuple(body["base"])
        return Manifest(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadVersion(f"{directory.name}: no readable {MANIFEST}: {error}") from error


def _seal(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


class PolicyStore:
    """The store under `root`. `begin` is for all ranks of the learner, the other writing methods for rank 0."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._leases: dict[
            str, tuple[bytes, float]
        ] = {}  # name -> (content, when it was new, monotonic)

    # --- publishing

    def claim(self) -> int:
        """An attempt number for this start, greater than every other, and nobody else's."""
        attempt = max([self._owner(), *(attempt for _, attempt, _ in self._versions())]) + 1
        while True:
            try:
                (self.root / f"publisher-{attempt}").mkdir()
                break
            except FileExistsError:
                attempt += 1
        for older in self._publishers():
            if older < attempt:
                (self.root / f"publisher-{older}").rmdir()
        return attempt

    def begin(self, version: int, attempt: int) -> Path:
        """Make the directory for a version's shares, if another rank has not done so already."""
        directory = self.root / f"{version}-{attempt}"
        directory.mkdir(exist_ok=True)
        return directory

    def check_room(self, needed: int, limit: int | None) -> None:
        """Raises NoRoom if `needed` more bytes would make the store larger than `limit`, or do not fit on its filesystem."""
        used = sum(
            entry.stat().st_size
            for _, _, directory in self._versions()
            for entry in _files(directory)
        )
        if limit is not None and used + needed > limit:
            raise NoRoom(
                f"the store has {used} bytes, a version needs {needed}, and policy.max_bytes is {limit}"
            )
        status = os.statvfs(self.root)
        if status.f_bavail * status.f_frsize < needed + RESERVE_BYTES:
            raise NoRoom(
                f"a version needs {needed} bytes, and {self.root} has {status.f_bavail * status.f_frsize} left"
            )

    def commit(
        self, version: int, attempt: int, files: Sequence[dict[str, Any]], kind: str = "full",
        base: Key | None = None, deltas: Sequence[dict[str, Any]] = (),
    ) -> Published:  # fmt: skip
        """Declare a version complete. All that lies in its directory is durable already.

        Args:
            files: {"file", "bytes", "xxh3"} of each file of the full state.
            kind: full, delta or adapter (see `policy.adapter`).
            base, deltas: the version to start from, and the files {"file", "bytes", "xxh3", "makes"} that lead from it to this one.

        Raises Superseded when another start of the learner has claimed the store.
        """
        if self._owner() > attempt:
            raise Superseded(
                f"{self.root}: attempt {self._owner()} publishes here now; this is attempt {attempt}"
            )
        directory = self.root / f"{version}-{attempt}"
        plain = tuple(File(file["file"], file["bytes"], file["xxh3"]) for file in files)
        changes = tuple(
            File(file["file"], file["bytes"], file["xxh3"], file["makes"]) for file in deltas
        )
        write_manifest(
            directory, Manifest(version, attempt, kind, plain, base if changes else None, changes)
        )
        write_json(
            self.root / "latest.json",
            {"version": version, "attempt": attempt, "directory": directory.name},
        )
        return Published(attempt, version, directory)

    def retire(self, keep: int, attempt: int) -> None:
        """Let all go but the newest `keep` versions, what they are made from, and what is being read; never what latest.json names.

        For between publishes of that attempt: a directory that is being written counts as incomplete. What goes now can no longer be
        found by a reader; what went at the last call and is not being read is removed.
        """
        try:
            latest = self.latest()
        except BadVersion:
            latest = None
        if latest is None or self._owner() > attempt:
            return
        read = {name.partition("-")[0::2] for name in self.leased()}
        leased = {(int(a), int(v)) for v, a in read if v.isdigit() and a.isdigit()}
        whole: dict[Key, Manifest] = {}
        gone = []
        for version, own, directory in self._versions():
            try:
                whole[own, version] = read_manifest(directory)
            except BadVersion:
                gone.append(((own, version), directory))
        needed: set[Key] = set()
        for key in [latest.key, *leased, *sorted(whole, reverse=True)[:keep]]:
            while key in whole and key not in needed:
                needed.add(key)
                if whole[key].kind != "delta" or whole[key].base is None:
                    break
                key = whole[key].base  # type: ignore[assignment]
        for key, manifest in whole.items():
            if key not in needed:
                (self.root / manifest.name / MANIFEST).unlink(missing_ok=True)
        for key, directory in gone:
            if key not in leased and key != latest.key:
                shutil.rmtree(
                    directory, ignore_errors=True
                )  # on NFS a reader's open file leaves a name behind: the next sweep takes it

    # --- reading

    def latest(self) -> Published | None:
        """What latest.json names, or None before the first publish. Raises BadVersion if it is damaged."""
        try:
            latest = read_json(self.root / "latest.json")
            if not latest:
                return None
            published = Published(
                latest["attempt"], latest["version"], self.root / latest["directory"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadVersion(f"{self.root}/latest.json is damaged: {error!r}") from error
        if published.directory.name != f"{published.version}-{published.attempt}":
            raise BadVersion(f"{self.root}/latest.json is damaged: {latest}")
        return published

    def manifest(self, key: Key) -> Manifest:
        """Of a version. Raises BadVersion if it is not there, or is another's."""
        attempt, version = key
        manifest = read_manifest(self.root / f"{version}-{attempt}")
        if manifest.key != key:
            raise BadVersion(f"{version}-{attempt}: the manifest is of {manifest.name}")
        return manifest

    def leased(self) -> set[str]:
        """Names of the directories that some live reader reads now. A lease that does not change for LEASE_S has ended."""
        now, current, names = time.monotonic(), {}, set()
        try:
            readers = os.listdir(self.root / "readers")
        except FileNotFoundError:
            return set()
        for name in readers:
            if name.startswith("."):
                continue
            try:
                content = (self.root / "readers" / name).read_bytes()
            except OSError:
                continue
            known, since = self._leases.get(name, (b"", now))
            current[name] = (content, since if content == known else now)
            if now - current[name][1] < LEASE_S:
                try:
                    names |= set(json.loads(content)["reads"])
                except (ValueError, KeyError, TypeError):
                    continue
        self._leases = current
        return names

    # --- the directory

    def _versions(self) -> list[tuple[int, int, Path]]:
        found = []
        for name in os.listdir(self.root):
            version, dash, attempt = name.partition("-")
            if dash and version.isdigit() and attempt.isdigit():
                found.append((int(version), int(attempt), self.root / name))
        return found

    def _publishers(self) -> list[int]:
        names = [name.partition("publisher-") for name in os.listdir(self.root)]
        return [int(number) for before, _, number in names if not before and number.isdigit()]

    def _owner(self) -> int:
        """The newest attempt that was claimed."""
        return max(self._publishers(), default=0)


class Lease:
    """A reader's word to the publisher about what it is reading: readers/<name>.json, rewritten while it lasts."""

    def __init__(self, root: Path, reader: str) -> None:
        self.path = root / "readers" / f"{reader}.json"
        self.over = False  # the reader ends: nothing more is to be read
        self._reads: list[str] = []
        self._count, self._renewed = 0, 0.0

    def take(self, reads: Iterable[str]) -> None:
        """From here on these directories are being read; none: nothing is. A full disk does not keep anybody from reading."""
        self._reads = list(reads)
        self._write()

    def renew(self) -> None:
        """Call it now and then while reading. Raises BadVersion when the reader is to end."""
        if self.over:
            raise BadVersion("the reader is ending")
        if time.monotonic() - self._renewed > LEASE_S / 6:
            self._write()

    def _write(self) -> None:
        self._count, self._renewed = self._count + 1, time.monotonic()
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, {"reads": self._reads, "renewed": self._count}, durable=False)
        except OSError as error:
            log.warning("cannot write %s: %s", self.path, error)


@dataclass(frozen=True)
class Route:
    """One way to a version's full state: whole files of `start` (None: the copy one has), then these deltas, one after the other."""

    start: Manifest | None
    deltas: tuple[Manifest, ...]

    @property
    def bytes(self) -> int:
        """To be read."""
        whole = sum(file.bytes for file in self.start.files) if self.start else 0
        return whole + sum(file.bytes for manifest in self.deltas for file in manifest.deltas)

    @property
    def directories(self) -> list[str]:
        return [manifest.name for manifest in (*([self.start] if self.start else []), *self.deltas)]


def routes(manifest: Callable[[Key], Manifest], target: Key, have: Key | None) -> list[Route]:
    """Every way to `target`: from the newest full version, and from the version that one has; the one with the fewest bytes first.

    Raises BadVersion when there is none.
    """
    found: list[Route] = []
    deltas: list[Manifest] = []
    key, why, whole = target, "", False
    while True:
        if key == have:
            found.append(Route(None, tuple(reversed(deltas))))
        try:
            step = manifest(key)
        except BadVersion as error:
            why = f": {error}"
            break
        if step.kind != "delta" and not whole:
            whole = True
            found.append(Route(step, tuple(reversed(deltas))))
        if step.base is None or (whole and (have is None or step.base < have)):
            break
        deltas.append(step)
        key = step.base
    if not found:
        raise BadVersion(
            f"{target[1]}-{target[0]} can be made neither from a full version nor from the one at hand{why}"
        )
    return sorted(found, key=lambda route: route.bytes)


def verify(published: Published) -> Manifest:
    """Check every file that lies there against the manifest. Raises BadVersion, saying which file and what is wrong with it."""
    manifest = read_manifest(published.directory)
    for file in manifest.there:
        path = published.directory / file.file
        try:
            size, digest = path.stat().st_size, file_digest(path)
        except FileNotFoundError:
            raise BadVersion(f"{path}: missing") from None
        if size != file.bytes:
            raise BadVersion(f"{path}: {size} bytes, the manifest says {file.bytes}")
        if digest != file.xxh3:
            raise BadVersion(f"{path}: xxh3 {digest}, the manifest says {file.xxh3}")
    return manifest


def file_digest(path: Path) -> str:
    """xxh3-64 of a file, in hex."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(directory) if entry.is_file()]
    except FileNotFoundError:
        return []
