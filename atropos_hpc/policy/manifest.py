"""Write, read and check the manifest of a policy version.

The manifest holds a hash of itself (`seal`), because a flipped bit may still leave valid JSON.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from atropos_hpc.contracts.policy import Manifest
from atropos_hpc.runtime.run_dir import write_struct

MANIFEST = "manifest.json"
_CHUNK = 1 << 24


class BadVersion(Exception):
    """A version that fails its checks: a file is missing, or differs from the manifest."""


class UnreadableManifest(BadVersion):
    """A manifest that may be complete, but cannot be read now."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Seal a manifest and write it durably into the version's directory."""
    sealed = msgspec.structs.replace(manifest, seal=_seal(manifest))
    write_struct(directory / MANIFEST, sealed)


def read_manifest(directory: Path) -> Manifest:
    """Read a version's manifest. Raises BadVersion if it is missing or damaged."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | ValueError)
        kind = BadVersion if missing else UnreadableManifest
        raise kind(f"{directory.name}: no readable {MANIFEST}: {error}") from error
    if manifest.seal != _seal(manifest):
        raise BadVersion(f"{directory.name}: {MANIFEST} is damaged: its hash does not match")
    return manifest


def verify(directory: Path, heartbeat: Callable[[], None] = lambda: None) -> Manifest:
    """Check every stored file of a version against its manifest, which is returned.

    `heartbeat` is called now and then and may abort the check by raising. Raises BadVersion naming
    the file and the difference.
    """
    manifest = read_manifest(directory)
    for entry in manifest.stored_files:
        path = directory / entry.file
        try:
            size, digest = path.stat().st_size, file_digest(path, heartbeat)
        except FileNotFoundError:
            raise BadVersion(f"{path}: missing") from None
        if size != entry.bytes:
            raise BadVersion(f"{path}: {size} bytes, the manifest says {entry.bytes}")
        if digest != entry.xxh3:
            raise BadVersion(f"{path}: xxh3 {digest}, the manifest says {entry.xxh3}")
    return manifest


def file_digest(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    """Return the xxh3-64 of a file, in hex. `heartbeat` is called between its parts."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            heartbeat()
    return digest.hexdigest()


def _seal(manifest: Manifest) -> str:
    unsealed = msgspec.structs.replace(manifest, seal="")
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(unsealed))
