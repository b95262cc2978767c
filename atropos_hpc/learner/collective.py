"""Collective waits: ranks agree in every poll on whether all are ready and whether to stop.

So no rank waits in a collective operation for another that has left.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

from atropos_hpc.contracts.members import StopRequest, TrainerState
from atropos_hpc.runtime.membership import Member, pending_request
from atropos_hpc.runtime.process import END_TASKS
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.waiting import Waiting

FIRST_POLL_S, POLL_S = 0.002, 0.05  # between looks, at first and at most
REQUEST_POLL_S = 0.5  # between looks for a request to stop
SHOW_PROGRESS_S = 5.0  # between writes of the member file during a step


class MicroBatchCounter:
    """Shows in this rank's member file that a long step makes progress."""

    def __init__(
        self, member: Member[TrainerState], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._member, self._clock = member, clock
        self._count, self._shown = 0, clock()

    def __call__(self) -> None:
        self._count += 1
        if (now := self._clock()) - self._shown > SHOW_PROGRESS_S:
            self._member.update(micro_batches=self._count)
            self._shown = now


class StopRequested(Exception):
    """The run is to stop: save and exit."""


class Collective:
    """This rank's side of waits that all ranks share, in the same order on all of them.

    From its construction on, SIGTERM and END_TASKS are requests to stop: they are all that Slurm
    sends a rank when it takes the nodes away.
    """

    def __init__(self, run: RunDir, member: Member[TrainerState]) -> None:
        self.run, self.member = run, member
        self.is_leader = dist.get_rank() == 0
        self._polled, self._stop = 0.0, False
        for number in (signal.SIGTERM, END_TASKS):
            signal.signal(number, self._on_signal)

    def wait(
        self,
        what: str,
        from_whom: str,
        ready: Callable[[], bool],
        timeout_s: float,
        alarm: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Wait until `ready()` is true on all ranks.

        `alarm`: what keeps failing meanwhile, which becomes part of the error. Raises
        StopRequested when the run is to stop, and TimeoutError after `timeout_s` seconds, both on
        all ranks.
        """
        poll_s = FIRST_POLL_S
        with Waiting(what, from_whom, timeout_s, self.member) as waiting:
            while True:
                not_ready, stop, expired = self.on_any_rank(
                    not ready(), self.stop_requested(), waiting.expired
                )
                if not not_ready:
                    return
                if stop:
                    raise StopRequested
                if expired:
                    raise waiting.timeout(alarm() or "")
                waiting.show()
                time.sleep(poll_s)
                poll_s = min(1.1 * poll_s, POLL_S)

    def check(self) -> None:
        """Raise StopRequested on all ranks if the run is to stop."""
        if self.on_any_rank(self.stop_requested())[0]:
            raise StopRequested

    def stop_requested(self) -> bool:
        """Whether this rank got a signal or, on rank 0, there is a request to stop."""
        due = time.monotonic() - self._polled > REQUEST_POLL_S
        if self.is_leader and not self._stop and due:
            self._polled = time.monotonic()
            self._stop = pending_request(self.run, StopRequest) is not None
        return self._stop

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    @staticmethod
    def on_any_rank(*flags: bool) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        if dist.get_world_size() == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]
