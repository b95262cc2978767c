"""The node agent's side of weight sync: notice a new version, check it once for the node, say when each server serves it."""

import logging
import time

from atropos_hpc.policy.store import BadVersion, PolicyStore, Published, verify

log = logging.getLogger(__name__)

RETRY_BAD_S = 5.0  # a version that failed its checks is read again after this long: it may have been a slow filesystem


class Follower:
    """Takes only versions that are newer than the last one and whose files are what the manifest says."""

    def __init__(self, store: PolicyStore) -> None:
        self.store = store
        self.newest: Published | None = None  # the newest verified version
        self.bad: str | None = None  # why the newest published version cannot be used, if so
        self._look_again = 0.0

    def look(self) -> Published | None:
        """The newest verified version, reading the disk. Blocks while files are hashed: call it from a thread."""
        latest = self.store.latest()
        if latest is None or (self.newest is not None and latest <= self.newest) or time.monotonic() < self._look_again:
            return self.newest
        try:
            verify(latest)
        except (BadVersion, OSError) as error:
            if self.store.latest() == latest:  # else it was retired while we read: the next look takes the newer one
                log.error("policy version %d is not used: %s", latest.version, error)
                self.bad, self._look_again = str(error), time.monotonic() + RETRY_BAD_S
            return self.newest
        self.newest, self.bad = latest, None
        return latest
