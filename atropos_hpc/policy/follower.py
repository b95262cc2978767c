"""The node agent's side of weight sync: notice a new version, get a verified copy of it once for the node, complain about a bad one.

latest.json names a newer version
take a lease on what is going to be read          the publisher leaves it there meanwhile
by the cheapest route: a delta on the copy at hand, or the newest full version and the deltas since
if that fails its checks: by the next route; then report it, and try again; the second time, ask for it to be published anew
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from atropos_hpc.policy.node_cache import Mirror
from atropos_hpc.policy.store import (
    BadVersion,
    Lease,
    NoRoom,
    PolicyStore,
    Published,
    routes,
    verify,
)

log = logging.getLogger(__name__)

RETRY_BAD_S = 2.0  # a version that failed its checks is read again after this long: it may have been a slow filesystem


class Follower:
    """Takes only versions that are newer than the last one and whose files are what the manifest says.

    `complain` is called with a version, and why it cannot be used, when trying again has not helped.
    """

    def __init__(
        self,
        store: PolicyStore,
        cache: Path,
        reader: str,
        complain: Callable[[Published, str], None] = lambda *_: None,
    ) -> None:
        self.store, self.complain = store, complain
        self.mirror, self.lease = Mirror(cache, store.root), Lease(store.root, reader)
        self.newest: Published | None = None  # the newest verified version: this node's copy
        self.bad: str | None = None  # why the newest published version cannot be used, if so
        self.failures = 0  # one after the other
        self._look_again = 0.0

    def look(self) -> Published | None:
        """The newest verified version, reading the disk. Blocks while files are read: call it from a thread."""
        if time.monotonic() < self._look_again:
            return self.newest
        latest = None
        try:
            latest = self.store.latest()
            if latest is None or (self.newest is not None and latest <= self.newest):
                return self.newest
            self.newest = self._bring(latest)
        except (BadVersion, OSError) as error:
            if self.lease.over or (latest is not None and self._was_replaced(latest)):
                return (
                    self.newest
                )  # it was retired while we read: the next look takes the newer one
            self._failed(latest, error)
        else:
            self.bad, self.failures = None, 0
        return self.newest

    def stop(self) -> None:
        """Have a `look` that another thread is at end soon."""
        self.lease.over = True

    def close(self) -> None:
        """Free the memory."""
        self.lease.take([])
        self.mirror.close()

    def _bring(self, latest: Published) -> Published:
        """By the first route that leads there. Raises what the last one raised."""
        self.lease.take([latest.directory.name])
        try:
            target = self.store.manifest(latest.key)
            have = self.mirror.newest.key if self.mirror.newest else None
            ways = routes(self.store.manifest, latest.key, have)
            self.lease.take(
                {latest.directory.name, *(name for way in ways for name in way.directories)}
            )
            for way in ways:
                try:
                    return self.mirror.bring(target, way, self.lease)
                except NoRoom as error:
                    if target.kind == "delta":
                        raise
                    log.warning(
                        "every server reads version %d from the store itself: %s",
                        latest.version,
                        error,
                    )
                    verify(latest)
                    return latest
                except BadVersion as error:
                    if way is ways[-1]:
                        raise
                    log.warning(
                        "policy version %d is not taken as %s: %s",
                        latest.version,
                        "delta" if way.deltas else "full",
                        error,
                    )
            raise AssertionError("unreachable")
        finally:
            self.lease.take([])

    def _was_replaced(self, latest: Published) -> bool:
        try:
            return self.store.latest() != latest
        except BadVersion:
            return False

    def _failed(self, latest: Published | None, error: Exception) -> None:
        """Report it, and look again later; once trying again has not helped, ask for the version to be published anew."""
        what = f"policy version {latest.version}" if latest else "the newest policy version"
        log.error("%s is not used: %s", what, error)
        self.bad, self.failures = str(error), self.failures + 1
        self._look_again = time.monotonic() + RETRY_BAD_S
        if latest is not None and self.failures > 1:
            self.complain(latest, str(error))
