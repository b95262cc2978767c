"""The learner's side of the policy store: each new version, written in the background of the next step."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from atropos_hpc.learner.backends.base import Backend
from atropos_hpc.policy.publish import Snapshot, snapshot, write_shards
from atropos_hpc.policy.store import PolicyStore

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMEOUT_S = 1800.0  # for one publish, all ranks' writing included


class Publishing:
    """Publishes versions of one learner start. Collective: all ranks call each method at the same place in the loop."""

    def __init__(self, root: Path, keep: int, dtype: str) -> None:
        self.store, self.keep, self.dtype = PolicyStore(root), keep, DTYPES[dtype]
        self.newest: int | None = None  # the newest version that is public, as of the last `wait`
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))  # the default group is training's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._under_way: tuple[int, Future[None]] | None = None
        attempt = torch.tensor(self.store.next_attempt() if dist.get_rank() == 0 else 0)
        dist.broadcast(attempt, src=0)
        self.attempt = int(attempt)

    def publish(self, backend: Backend, version: int) -> None:
        """Copy the weights, once the publish before has ended, and return; the rest goes on in the background."""
        self.wait()
        self._under_way = version, self._thread.submit(self._publish, snapshot(backend.module, self.dtype, backend.weights()), version)

    def wait(self) -> None:
        """For the publish under way. One that failed (full disk) is logged: the servers keep the version that they have."""
        if self._under_way is None:
            return
        version, future = self._under_way
        self._under_way = None
        error = future.exception(TIMEOUT_S)
        if error is not None:
            log.error("policy version %d was not published: %s", version, error)
        public = torch.tensor(int(error is None))
        dist.all_reduce(public, op=dist.ReduceOp.MIN)
        if public:
            self.newest = version

    def _publish(self, shot: Snapshot, version: int) -> None:
        files = write_shards(shot, self.store.begin(version, self.attempt), self._group)
        if dist.get_rank() == 0:
            self.store.commit(version, self.attempt, files, "full" if shot.adapter is None else "adapter")
            self.store.retire(self.keep)
