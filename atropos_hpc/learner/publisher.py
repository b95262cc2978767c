"""The learner's side of the policy store: each new version, written in the background of the next step.

    in the training thread: wait for the publish before, copy the weights
    in the background, on all ranks together:
        check that there is room
        policy.sync=full: write everything; delta: what has changed, and everything at every policy.anchor_every-th version, at the first
        one, and when so much has changed that a delta would not help
        name the version in latest.json, let old ones go
        until the next version comes: try again if this one failed (full disk), publish it anew if a reader asks for that
Training goes on whatever happens here; it is staleness.max that stops it when no version gets out.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atropos_hpc.config import PolicyConf
from atropos_hpc.contracts.members import RepublishRequest
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.policy.shard_writer import WORTH_SHARE, PublishFailed, Shares, Snapshot, snapshot
from atropos_hpc.policy.store import Key, NoRoom, PolicyStore, Superseded

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMEOUT_S = 1800.0  # for one publish, all ranks' writing included
RETRY_S = 5.0  # between tries of a publish that failed
LOOK_S = 1.0  # between looks for a reader's request
NEWS_S = (
    60.0  # after so long without any, rank 0 says so to the others, whose patience is TIMEOUT_S
)
LEAVE, RETRY, RENEW, NOTHING = range(
    4
)  # what rank 0 has all do with a version: leave it, once more, once more and in full, wait on


@dataclass
class Readers:
    """What rank 0 hears from the readers of the store, and tells the others: `asked` gives a request to publish anew, if there is one,
    `answered` takes it away; `tell` shows an alarm, or None when all is well."""

    asked: Callable[[], RepublishRequest | None] = lambda: None
    answered: Callable[[], None] = lambda: None
    tell: Callable[[str | None], None] = lambda _: None


class Publishing:
    """Publishes versions of one learner start. Collective: all ranks call each method at the same place in the loop."""

    def __init__(
        self, root: Path, conf: PolicyConf, dtype: str, readers: Readers | None = None
    ) -> None:
        self.store, self.conf, self.dtype, self.readers = (
            PolicyStore(root),
            conf,
            DTYPES[dtype],
            readers or Readers(),
        )
        self.newest: int | None = None  # the newest version that is public, as of the last `wait`
        self.leads = dist.get_rank() == 0
        group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=TIMEOUT_S)
        )  # the default group is training's
        self.shares = Shares(group, keeps_base=conf.sync == "delta")
        self._under_way: tuple[int, Future[bool]] | None = None
        self._leave = threading.Event()
        self._shot: Snapshot | None = None
        self._base: Key | None = None  # what readers have
        self._since_full = 0  # versions
        self._alarm: str | None = None
        attempt = torch.tensor(self.store.claim() if self.leads else 0)
        dist.broadcast(attempt, src=0)
        self.attempt = int(attempt)

    def publish(self, backend: Backend, version: int) -> None:
        """Copy the weights, once the publish before has ended, and return; the rest goes on in the background."""
        self.wait()
        self._shot = snapshot(backend.module, self.dtype, backend.weights(), self._shot)
        self._leave.clear()
        public: Future[bool] = Future()
        # A daemon: a learner that ends by an error does not wait for other ranks here
        threading.Thread(
            target=self._run, args=(public, self._shot, version), name="publish", daemon=True
        ).start()
        self._under_way = version, public

    def wait(self) -> None:
        """For the publish under way; one that failed is not tried again. The servers then keep the version that they have.

        Raises Superseded when another start of the learner publishes here now.
        """
        if self._under_way is None:
            return
        version, future = self._under_way
        self._under_way = None
        self._leave.set()
        error = future.exception(TIMEOUT_S)
        if error is not None:
            log.error("policy version %d was not published: %s", version, error)
        public = torch.tensor(
            -1 if isinstance(error, Superseded) else int(error is None and future.result())
        )
        dist.all_reduce(public, op=dist.ReduceOp.MIN)
        if public < 0:
            raise Superseded(str(error or "said rank 0"))
        if public:
            self.newest = version

    # --- in the background

    def _run(self, public: "Future[bool]", shot: Snapshot, version: int) -> None:
        try:
            public.set_result(self._publish(shot, version))
        except BaseException as error:
            public.set_exception(error)

    def _publish(self, shot: Snapshot, version: int) -> bool:
        """Until the next version comes, or the learner ends. True: this one is public."""
        filling = self.shares.fill(shot)
        public = self._try(shot, version, filling, again=False)
        while (todo := self._what_next(version, public)) != LEAVE:
            if todo != NOTHING:
                public = self._try(shot, version, iter(()), again=todo == RENEW) or public
        return public

    def _try(self, shot: Snapshot, version: int, filling: Any, again: bool) -> bool:
        """Publish once; `again`: in full, whatever the sync. A failure is told, and leaves the versions before."""
        try:
            self._write(shot, version, filling, again)
        except PublishFailed as error:
            if self.leads:
                log.error(
                    "policy version %d is not published, and tried again until the next one is there: %s",
                    version,
                    error,
                )
                self._tell(f"policy version {version} cannot be published: {error}")
            return False
        finally:
            deque(filling, maxlen=0)
        if self.leads:
            self._tell(None)
        return True

    def _write(self, shot: Snapshot, version: int, filling: Any, again: bool) -> None:
        """A version's files, and its place in latest.json. Raises PublishFailed, or on rank 0 Superseded."""
        shares, directory = self.shares, self.store.root / f"{version}-{self.attempt}"
        in_full = (
            again
            or self.conf.sync == "full"
            or self._base is None
            or self._since_full + 1 >= self.conf.anchor_every
        )
        room = partial(
            self._prepare, version, shot.bytes if in_full else round(WORTH_SHARE * shot.bytes)
        )
        shares.on_all(room, str(directory))
        changes = None
        if not in_full:
            deque(filling, maxlen=0)
            changes = shares.write_delta(directory)
            in_full = changes is None
            if in_full:
                shares.on_all(partial(self._prepare, version, shot.bytes), str(directory))
        if in_full:
            files = shares.write_full(directory, filling)
            if changes is None and self._base is not None and not again:
                changes = shares.write_delta(directory)
            kind = "full" if shot.adapter is None else "adapter"
        else:
            assert changes is not None
            files, kind = changes[0], "delta"
        deltas = changes[1] if changes is not None else []

        def commit() -> str | None:
            if not self.leads:
                return None
            try:
                self.store.commit(version, self.attempt, files, kind, self._base, deltas)
            except Superseded as error:
                return str(error)
            return None

        if superseded := shares.on_all(commit, str(directory))[0]:
            raise Superseded(superseded)
        shares.readers_have_it()
        if self.conf.sync == "delta" and kind != "adapter":
            self._base = (self.attempt, version)
        self._since_full = 0 if in_full else self._since_full + 1
        if self.leads:
            try:
                self.store.retire(self.conf.keep, self.attempt)
            except OSError as error:  # the next time; the version is out
                log.warning("old policy versions are not removed: %s", error)

    def _prepare(self, version: int, needed: int) -> None:
        """Rank 0: make room if there is too little, and the directory. Raises NoRoom."""
        if not self.leads:
            return
        try:
            self.store.check_room(needed, self.conf.max_bytes)
        except NoRoom:
            for _ in range(2):  # what may go is first no longer found, then removed
                self.store.retire(self.conf.keep, self.attempt)
            self.store.check_room(needed, self.conf.max_bytes)
        self.store.begin(version, self.attempt)

    def _request(self) -> RepublishRequest | None:
        """A reader's, which counts as met from now on. A filesystem that cannot say is asked again: the other ranks wait for this one."""
        try:
            if (request := self.readers.asked()) is not None:
                self.readers.answered()
            return request
        except (OSError, ValueError) as error:
            log.warning("cannot look for requests: %s", error)
            return None

    def _tell(self, alarm: str | None) -> None:
        if alarm != self._alarm:
            self._alarm = alarm
            self.readers.tell(alarm)

    def _what_next(self, version: int, public: bool) -> int:
        """Rank 0 waits until there is something to do, or nothing more, and says so to all."""
        todo = torch.tensor(LEAVE)
        if self.leads:
            todo.fill_(self._wait_for_work(version, public))
        dist.broadcast(todo, src=0, group=self.shares.group)
        return int(todo)

    def _wait_for_work(self, version: int, public: bool) -> int:
        waited = 0.0
        while not self._leave.wait(LOOK_S):
            waited += LOOK_S
            request = self._request() if public else None
            if request and (
                self._since_full
                or request.version == PolicyVersion(attempt=self.attempt, version=version)
            ):
                log.warning(
                    "policy version %d is published again, in full: %s", version, request.why
                )
                return RENEW
            if not public and waited >= RETRY_S:
                return RETRY
            if waited >= NEWS_S:
                return NOTHING
        return LEAVE
