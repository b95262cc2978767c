"""Waiting as one: ranks agree at every look whether all are ready and whether anybody wants to stop, so that none waits in a
collective for another that has left.
"""

import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from atropos_hpc.contracts.members import StopRequest, TrainerState, Wait
from atropos_hpc.runtime.membership import Member, pending_request
from atropos_hpc.runtime.process import END_TASKS
from atropos_hpc.runtime.run_dir import RunDir

TICK_S = 0.05
LOOK_FOR_REQUESTS_S = 0.5


class StopAsked(Exception):
    """Somebody wants the run to stop: save, and leave."""


class Together:
    """This rank's part in common waits. Collective: all ranks wait for the same things in the same order.

    From here on TERM is a wish to stop, too: it is all that Slurm tells a rank when it takes the nodes away. So is END_TASKS.
    """

    def __init__(self, run: RunDir, member: Member[TrainerState]) -> None:
        self.run, self.member = run, member
        self.leads = dist.get_rank() == 0
        self._looked, self._stop = 0.0, False
        for number in (signal.SIGTERM, END_TASKS):
            signal.signal(number, self._term)

    def _term(self, _number: int, _frame: Any) -> None:
        self._stop = True

    def wait(self, what: str, whom: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Until `ready()` is true on all ranks.

        Raises StopAsked when the run is asked to stop meanwhile, and TimeoutError after `timeout_s` seconds, both on all ranks.
        """
        start, shown = time.monotonic(), False
        try:
            while True:
                waited = time.monotonic() - start
                not_ready, stop, late = self._greatest(
                    not ready(), self.stop_asked(), waited > timeout_s
                )
                if not not_ready:
                    return
                if stop:
                    raise StopAsked
                if late:
                    raise TimeoutError(f"waited {waited:.0f} s for {what} from {whom}, in vain")
                if waited > 1 and not shown:
                    shown = True
                    since = time.time() - waited
                    self.member.show_wait(Wait(what, whom, since, since + timeout_s))
                time.sleep(TICK_S)
        finally:
            if shown:
                self.member.show_wait(None)

    def check(self) -> None:
        """Raises StopAsked on all ranks if the run has been asked to stop."""
        if self._greatest(self.stop_asked())[0]:
            raise StopAsked

    def stop_asked(self) -> bool:
        """Has this rank had TERM, or seen the request? Rank 0 looks, at most every half second."""
        if self.leads and not self._stop and time.monotonic() - self._looked > LOOK_FOR_REQUESTS_S:
            self._looked = time.monotonic()
            self._stop = pending_request(self.run, StopRequest) is not None
        return self._stop

    @staticmethod
    def _greatest(*flags: bool) -> list[bool]:
        """Each flag's maximum over the ranks."""
        if dist.get_world_size() == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]
