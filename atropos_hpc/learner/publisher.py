"""Publish each new policy version in the background of the next training step.

The training thread waits for the previous publish to end, then copies the weights to host memory.
Then, in a background thread on every rank:

1. Check that the store has space for the version.
2. Write it. policy.sync=full: all files. policy.sync=delta: what has changed; all files as well at
   every policy.anchor_every-th version, at the first one, and when a delta would be too large.
3. Name it in latest.json, and retire old versions.
4. Until the next version: retry if the publish failed (full disk), and publish the version again,
   in full, if a reader asks for that.

Before an update, `release` frees the copy of a large model that is out, where it is all that a
single rank needs for publishing. Until the next version, a reader's request has to wait then.

Training continues whatever happens here; staleness.max stops it when no version can be published.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from atropos_hpc.config import PolicyConf
from atropos_hpc.contracts.members import RepublishRequest
from atropos_hpc.contracts.policy import Manifest, PolicyVersion
from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.policy.manifest import UnreadableManifest
from atropos_hpc.policy.shard_writer import MAX_CHANGED_FRACTION, PublishFailed, ShardWriter
from atropos_hpc.policy.snapshot import Snapshot, snapshot
from atropos_hpc.policy.store import PolicyStore, StoreFull, Superseded
from atropos_hpc.runtime.deadlines import HINT
from atropos_hpc.runtime.membership import pending_request, withdraw_request
from atropos_hpc.runtime.process import return_freed_memory
from atropos_hpc.runtime.run_dir import RunDir

log = logging.getLogger(__name__)

RELEASED_BYTES = 256 << 20  # a smaller copy is not worth the wait until it is written


@dataclass(frozen=True)
class Intervals:
    """Timing of the background thread, in seconds."""

    timeout: float = 1800.0  # for one publish, including all ranks' writing
    retry: float = 5.0  # between attempts of a publish that failed
    poll: float = 1.0  # between looks for a reader's request
    keep_alive: float = 60.0  # between rank 0's messages to the others, which wait for `timeout`


@dataclass(frozen=True)
class ReaderLink:
    """Rank 0's link to the readers of the store and to the roster.

    `take_request` returns and removes a request to publish again. `show_alarm` shows a problem in
    the roster, or removes it.
    """

    take_request: Callable[[], RepublishRequest | None] = lambda: None
    show_alarm: Callable[[str | None], None] = lambda _: None


def take_request(run: RunDir) -> RepublishRequest | None:
    """Return and remove a reader's request to publish again. Raises OSError or ValueError."""
    try:
        request = pending_request(run, RepublishRequest)
    except ValueError:  # damaged: its reader asks again
        withdraw_request(run, RepublishRequest)
        raise
    if request is not None:
        withdraw_request(run, RepublishRequest)
    return request


class _Action(IntEnum):
    """What rank 0 has all ranks do next with a version."""

    FINISH = 0
    RETRY = 1
    REPUBLISH = 2
    WAIT = 3


class Publisher:
    """Publishes the versions of one start of the learner. Every method is collective."""

    def __init__(
        self,
        root: Path,
        conf: PolicyConf,
        dtype: str,
        link: ReaderLink | None = None,
        intervals: Intervals | None = None,
        released_bytes: int = RELEASED_BYTES,
    ) -> None:
        self.store, self.conf, self.dtype = PolicyStore(root), conf, getattr(torch, dtype)
        self.link, self.intervals = link or ReaderLink(), intervals or Intervals()
        self.released_bytes = released_bytes
        self.newest: int | None = None  # the newest published version, as of the last `wait`
        self.is_leader = dist.get_rank() == 0
        # A group of its own: these messages must not mix with those of training.
        timeout = timedelta(seconds=self.intervals.timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
        self.writer = ShardWriter(group, keep_base=conf.sync == "delta")
        self._pending: tuple[PolicyVersion, Future[bool]] | None = None
        self._finish, self._tried = threading.Event(), threading.Event()
        self._snapshot: Snapshot | None = None
        self._published = False  # whether the first attempt at the pending version succeeded
        self._base: PolicyVersion | None = None  # the version that deltas start from
        self._since_full = 0  # versions since the last full one
        self.alarm: str | None = None  # on rank 0: why the newest version cannot be published
        attempt = torch.tensor(self.store.claim_attempt() if self.is_leader else 0)
        dist.broadcast(attempt, src=0)
        self.attempt = int(attempt)

    def publish(self, backend: Backend, version: int) -> None:
        """Wait for the previous publish, copy the weights, and publish them in the background."""
        self.wait()
        self._snapshot = snapshot(
            backend.module, self.dtype, backend.weights(), reuse=self._snapshot
        )
        self._finish.clear()
        self._tried.clear()
        self._published = False
        key = PolicyVersion(version=version, attempt=self.attempt)
        published: Future[bool] = Future()
        arguments = (published, self._snapshot, key)
        # A daemon thread: a learner that ends by an error does not wait for other ranks here.
        threading.Thread(target=self._run, args=arguments, name="publish", daemon=True).start()
        self._pending = key, published

    def wait(self) -> None:
        """Wait for the pending publish. If it failed, the servers keep the previous version.

        Raises Superseded when another start of the learner publishes to the store now.
        """
        if self._pending is None:
            return
        key, future = self._pending
        self._pending = None
        self._finish.set()
        if not wait([future], self.intervals.timeout).done:
            within = f"within {self.intervals.timeout:.0f} s"
            raise TimeoutError(f"policy version {key} was not published {within}; {HINT}")
        error = future.exception()
        if error is not None:
            log.error("policy version %s was not published: %s", key, error)
        superseded = isinstance(error, Superseded)
        outcome = torch.tensor(-1 if superseded else int(error is None and future.result()))
        dist.all_reduce(outcome, op=dist.ReduceOp.MIN)
        if outcome < 0:
            raise Superseded(str(error or "rank 0 reports it"))
        if outcome:
            self.newest = key.version

    def release(self) -> None:
        """Free the copy of the pending version, if it is large and public. See above.

        Waits until it is written; one that could not be written stays, and is retried.
        """
        snapshot, pending = self._snapshot, self._pending
        if snapshot is None or pending is None or snapshot.bytes < self.released_bytes:
            return
        if not self.writer.one_copy:  # several ranks, or a GPU: the update need not wait
            return
        self._tried.wait(self.intervals.timeout)
        if self._published:
            self.wait()
            self._snapshot = None
            self.writer.release()
            return_freed_memory()

    # --- the background thread

    def _run(self, published: "Future[bool]", shot: Snapshot, key: PolicyVersion) -> None:
        try:
            published.set_result(self._publish_until_next(shot, key))
        except BaseException as error:
            published.set_exception(error)
        finally:
            self._tried.set()  # also where it failed: `release` waits for this

    def _publish_until_next(self, shot: Snapshot, key: PolicyVersion) -> bool:
        """Publish, retry and publish again, until the next version. Return whether it is out."""
        published = self._published = self._try(shot, key, self.writer.fill(shot), again=False)
        self._tried.set()
        while (action := self._next_action(key, published)) != _Action.FINISH:
            if action != _Action.WAIT:
                again = action == _Action.REPUBLISH
                published = self._try(shot, key, iter(()), again) or published
        return published

    def _try(self, shot: Snapshot, key: PolicyVersion, filling: Iterator[int], again: bool) -> bool:
        """Publish once. A failure is reported and leaves earlier versions as they are."""
        try:
            self._write(shot, key, filling, again)
        except PublishFailed as error:
            if self.is_leader:
                log.error(
                    "cannot publish policy version %s: %s; retrying every %.0f s until the next"
                    " version is due",
                    key,
                    error,
                    self.intervals.retry,
                )
                self._show_alarm(f"policy version {key} cannot be published: {error}")
            return False
        finally:
            deque(filling, maxlen=0)
        if self.is_leader:
            self._show_alarm(None)
        return True

    def _write(
        self, shot: Snapshot, key: PolicyVersion, filling: Iterator[int], again: bool
    ) -> None:
        """Write a version's files and commit it; `again`: in full, whatever the config.

        Raises PublishFailed or Superseded on all ranks.
        """
        writer, directory = self.writer, self.store.directory(key)
        base = None if again else self._base
        anchor = base is None or self._since_full + 1 >= self.conf.anchor_every
        needed = shot.bytes if anchor else round(MAX_CHANGED_FRACTION * shot.bytes)
        writer.on_all_ranks(partial(self._prepare, key, needed), str(directory))
        delta = None
        if not anchor:
            deque(filling, maxlen=0)
            delta = writer.write_delta(directory)
        if delta is not None:
            manifest = Manifest(
                version=key, kind="delta", files=delta[0], base=base, deltas=delta[1]
            )
        else:
            if not anchor:  # too much has changed for a delta
                writer.on_all_ranks(partial(self._prepare, key, shot.bytes), str(directory))
            files = writer.write_full(directory, filling)
            beside = writer.write_delta(directory) if anchor and base is not None else None
            manifest = Manifest(
                version=key,
                kind="full" if shot.adapter is None else "adapter",
                files=files,
                base=base if beside else None,
                deltas=beside[1] if beside else (),
            )
        self._commit(manifest)

    def _prepare(self, key: PolicyVersion, needed: int) -> None:
        """On rank 0: make space if there is too little, and the directory. Raises StoreFull."""
        if not self.is_leader:
            return
        try:
            self.store.check_quota(needed, self.conf.max_bytes)
        except StoreFull:
            for _ in range(2):  # removal takes two calls
                self.store.retire(self.conf.keep, self.attempt)
            self.store.check_quota(needed, self.conf.max_bytes)
        self.store.begin(key)

    def _commit(self, manifest: Manifest) -> None:
        """Publish the version, make it the base of the next delta, and retire old versions."""

        def commit() -> str | None:
            if self.is_leader:
                try:
                    self.store.commit(manifest)
                except Superseded as error:
                    return str(error)
            return None

        if superseded := self.writer.on_all_ranks(commit, str(manifest.version))[0]:
            raise Superseded(superseded)
        self.writer.set_base()
        if self.conf.sync == "delta" and manifest.kind != "adapter":
            self._base = manifest.version
        self._since_full = self._since_full + 1 if manifest.kind == "delta" else 0
        if self.is_leader:
            try:
                self.store.retire(self.conf.keep, self.attempt)
            except (OSError, UnreadableManifest) as error:
                log.warning("cannot remove old policy versions: %s; the next publish tries", error)

    def _next_action(self, key: PolicyVersion, published: bool) -> _Action:
        """Rank 0 waits for something to do, and tells all ranks."""
        action = torch.tensor(_Action.FINISH)
        if self.is_leader:
            action.fill_(self._wait_for_work(key, published))
        dist.broadcast(action, src=0, group=self.writer.group)
        return _Action(int(action))

    def _wait_for_work(self, key: PolicyVersion, published: bool) -> _Action:
        waited = 0.0
        while not self._finish.wait(self.intervals.poll):
            waited += self.intervals.poll
            request = self._take_request() if published else None
            if request and (self._since_full or request.version == key):
                log.warning("publishing policy version %s again, in full, for %s", key, request.why)
                return _Action.REPUBLISH
            if not published and waited >= self.intervals.retry:
                return _Action.RETRY
            if waited >= self.intervals.keep_alive:
                return _Action.WAIT
        return _Action.FINISH

    def _take_request(self) -> RepublishRequest | None:
        """Take a reader's request. An unreadable one is looked at again: other ranks wait here."""
        try:
            return self.link.take_request()
        except (OSError, ValueError) as error:
            log.warning("cannot read requests to publish again: %s; looking again", error)
            return None

    def _show_alarm(self, alarm: str | None) -> None:
        if alarm != self.alarm:
            self.alarm = alarm
            self.link.show_alarm(alarm)
