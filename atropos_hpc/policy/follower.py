"""The node agent's reader of the policy store.

1. Notice a new version in latest.json.
2. Take a lease on the versions to be read, so that the publisher keeps them.
3. Make a verified copy for the node by the cheapest route: a delta on the copy held, or the newest
   full version and the deltas since.
4. If the copy fails its checks, try the next route. If all fail, report it and try again later.
   From the second failure on, ask the learner to publish the version again.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.policy.leases import Lease
from atropos_hpc.policy.manifest import MANIFEST, BadVersion, verify
from atropos_hpc.policy.node_cache import CacheFull, NodeCache
from atropos_hpc.policy.routes import find_routes
from atropos_hpc.policy.store import PolicyStore

log = logging.getLogger(__name__)

RETRY_S = 2.0  # before a version that failed its checks is read again


@dataclass(frozen=True)
class LoadableVersion:
    """A verified version, and the directory that servers load it from."""

    version: PolicyVersion
    directory: Path = field(compare=False)


class Follower:
    """Takes versions that are newer than the last one and pass their checks.

    `request_republish` is called with a version and the reason when retries have not helped.
    """

    def __init__(
        self,
        store: PolicyStore,
        cache: Path,
        reader: str,
        request_republish: Callable[[PolicyVersion, str], None] = lambda *_: None,
    ) -> None:
        self.store, self.request_republish = store, request_republish
        self.cache, self.lease = NodeCache(cache, store.root), Lease(store.root, reader)
        self.newest: LoadableVersion | None = None
        self.failure: str | None = None  # why the newest published version cannot be used
        self.failures = 0  # consecutive
        self._retry_at = 0.0

    def poll(self) -> LoadableVersion | None:
        """Return the newest verified version. Blocks while files are read; call it in a thread."""
        if time.monotonic() < self._retry_at:
            return self.newest
        latest = None
        try:
            latest = self.store.latest()
            if latest is None or self._has(latest):
                return self.newest
            self.newest = LoadableVersion(latest, self._fetch(latest))
        except (BadVersion, OSError) as error:
            # A version that was retired while it was read is no failure: the next poll takes the
            # newer one.
            if not self.lease.cancelled and not self._was_replaced(latest):
                self._failed(latest, error)
        else:
            self.failure, self.failures = None, 0
        finally:
            self._lease()
        return self.newest

    def _has(self, version: PolicyVersion) -> bool:
        """Whether a version is not newer than the newest one here, and that is still in place."""
        if self.newest is None or version > self.newest.version:
            return False
        return version < self.newest.version or (self.newest.directory / MANIFEST).exists()

    @contextmanager
    def loading(self, version: LoadableVersion) -> Iterator[None]:
        """Keep a version, in the node's cache or in the store, while a server loads it."""
        self.cache.loading.append(version.directory)
        try:
            yield
        finally:
            self.cache.loading.remove(version.directory)

    def _lease(self, *versions: PolicyVersion) -> None:
        """Lease what is read now: these versions, and those that servers read in the store."""
        newest = [self.newest.directory] if self.newest else []
        read = {
            path.name for path in (*self.cache.loading, *newest) if path.parent == self.store.root
        }
        self.lease.take({*versions, *map(PolicyVersion.parse, read)})

    def stop(self) -> None:
        """Abort a `poll` in another thread."""
        self.lease.cancelled = True

    def close(self) -> None:
        """Free the node's copy."""
        self.lease.take([])
        self.cache.close()

    def _fetch(self, version: PolicyVersion) -> Path:
        """Make the version by the first route that works, and return its directory.

        Raises what the last route raised.
        """
        self._lease(version)
        try:
            target = self.store.manifest(version)
            routes = find_routes(self.store.manifest, version, self.cache.held())
            self._lease(version, *(step for route in routes for step in route.versions))
            for route in routes[:-1]:
                try:
                    return self.cache.fetch(target, route, self.lease)
                except BadVersion as error:
                    kind = "a delta" if route.deltas else "a full version"
                    log.warning(
                        "cannot take policy version %s as %s: %s; trying another route",
                        version,
                        kind,
                        error,
                    )
            return self.cache.fetch(target, routes[-1], self.lease)
        except CacheFull as error:
            if target.kind == "delta":
                raise
            log.warning("%s; every server reads version %s from the store", error, version)
            verify(self.store.directory(version), self.lease.renew)
            return self.store.directory(version)

    def _was_replaced(self, version: PolicyVersion | None) -> bool:
        try:
            return version is not None and self.store.latest() != version
        except BadVersion:
            return False

    def _failed(self, version: PolicyVersion | None, error: Exception) -> None:
        what = f"policy version {version}" if version else "the newest policy version"
        log.error("cannot use %s: %s; trying again in %.0f s", what, error, RETRY_S)
        self.failure, self.failures = str(error), self.failures + 1
        self._retry_at = time.monotonic() + RETRY_S
        if version is not None and self.failures > 1:
            self.request_republish(version, str(error))
