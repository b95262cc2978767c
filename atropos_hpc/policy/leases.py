"""Leases on policy versions: readers keep the publisher from removing what they are reading.

A reader rewrites readers/<reader>.json while it reads. The publisher honours a lease until its
file has not changed for LEASE_S, measured on the publisher's own clock: clocks of nodes differ.
"""

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from atropos_hpc.contracts.policy import PolicyVersion, ReaderLease
from atropos_hpc.policy.manifest import BadVersion
from atropos_hpc.runtime.run_dir import write_struct

log = logging.getLogger(__name__)

READERS = "readers"
LEASE_S = 60.0  # a lease that has not been renewed for this long has expired


class Lease:
    """A reader's lease on the versions that it is reading."""

    def __init__(self, root: Path, reader: str) -> None:
        self.path = root / READERS / f"{reader}.json"
        self.cancelled = False  # set by another thread to abort the reading
        self._versions: tuple[PolicyVersion, ...] = ()
        self._renewals, self._renewed = 0, 0.0

    def take(self, versions: Iterable[PolicyVersion]) -> None:
        """Lease exactly these versions, or none. A full disk does not prevent reading."""
        versions = tuple(sorted(versions))
        if versions != self._versions:
            self._versions = versions
            self._write()
        elif versions:
            self._write_if_due()

    def renew(self) -> None:
        """Renew the lease if it is due; call it often. Raises BadVersion once cancelled."""
        if self.cancelled:
            raise BadVersion("the reader is shutting down")
        self._write_if_due()

    def _write_if_due(self) -> None:
        if time.monotonic() - self._renewed > LEASE_S / 6:
            self._write()

    def _write(self) -> None:
        self._renewals, self._renewed = self._renewals + 1, time.monotonic()
        lease = ReaderLease(self._versions, self._renewals)
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_struct(self.path, lease, durable=False)
        except OSError as error:
            log.warning("cannot write lease %s: %s; reading without it", self.path, error)


@dataclass(frozen=True)
class _Seen:
    content: bytes
    since: float  # monotonic time at which this content was first seen


class LeaseTable:
    def __init__(self, root: Path) -> None:
        self._directory = root / READERS
        self._seen: dict[str, _Seen] = {}

    def leased(self) -> set[PolicyVersion]:
        """Return the versions that some live reader is reading."""
        now, seen, versions = time.monotonic(), dict[str, _Seen](), set[PolicyVersion]()
        for name, content in self._contents():
            known = self._seen.get(name)
            seen[name] = known if known and known.content == content else _Seen(content, now)
            if now - seen[name].since >= LEASE_S:
                continue
            try:
                versions.update(msgspec.json.decode(content, type=ReaderLease).versions)
            except ValueError:
                continue  # damaged; its reader rewrites it soon
        self._seen = seen
        return versions

    def _contents(self) -> Iterable[tuple[str, bytes]]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            if not name.startswith("."):
                try:
                    yield name, (self._directory / name).read_bytes()
                except OSError:
                    continue
