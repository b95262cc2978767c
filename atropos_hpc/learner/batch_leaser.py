"""Lease this rank's groups of each batch from the trajectory server, one batch ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.messages import ServerStatus
from atropos_hpc.trajectories.client import TrajectoryClient

LONG_POLL_S = 5.0  # the lease request is repeated until the batch is formed


class LeasedBatch(NamedTuple):
    """This rank's groups and, on rank 0, the trajectory server's status at that moment."""

    groups: list[Group]
    server: ServerStatus | None


class BatchLeaser:
    """Leases part `rank` of `world` of each batch in a thread, which alone uses `client`."""

    def __init__(self, client: TrajectoryClient, rank: int, world: int, staleness_max: int) -> None:
        self.client, self.rank, self.world = client, rank, world
        self.staleness_max = staleness_max
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lease")
        self._lease: Future[LeasedBatch] | None = None
        self._closed = False

    def start(self, batch: int, version: int) -> None:
        """Start leasing `batch`, to be trained at that version. The learner is at `version` now."""
        self._lease = self._thread.submit(self._poll, batch, version)

    def ready(self) -> bool:
        """Whether the lease has ended, successfully or not."""
        assert self._lease is not None
        return self._lease.done()

    def take(self) -> LeasedBatch:
        """Return the leased batch, or raise what leasing raised."""
        assert self._lease is not None
        return self._lease.result()

    def close(self) -> None:
        """Stop polling. Does not wait for a request under way."""
        self._closed = True
        self._thread.shutdown(wait=False)

    def _poll(self, batch: int, version: int) -> LeasedBatch:
        oldest = batch - self.staleness_max
        while not self._closed:
            groups = self.client.lease(
                batch, self.rank, self.world, oldest=oldest, version=version, wait_s=LONG_POLL_S
            )
            if groups is not None:
                return LeasedBatch(groups, self.client.status() if self.rank == 0 else None)
        return LeasedBatch([], None)


def missing_batches(next_batch: int, durable: int, trained: int) -> str | None:
    """Describe what the trajectory server's journal has lost; None if nothing is missing.

    `next_batch`: the first batch that the journal does not have. `durable`: the step that training
    resumes from. `trained`: the last step in the metrics. Step k trains batch k - 1.
    """
    known = max(durable, trained)
    if next_batch >= known:
        return None
    text = (
        f"the trajectory journal is incomplete: batches {next_batch} to {known - 1} were trained on"
        " and are missing in it, so it was cut, removed, or replaced by an older copy. "
    )
    if next_batch < durable:
        text += f"What is before step {durable} is in the checkpoint. "
    if (first := max(durable, next_batch)) < trained:
        text += f"Steps {first + 1} to {trained} are trained again, with new groups. "
    return text + "Groups that waited in the missing part are lost, and generated anew"
