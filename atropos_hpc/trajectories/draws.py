"""POST /draws of the trajectory server, and the rule that the first group of a draw counts."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec

from atropos_hpc.contracts.prompts import DrawAnswer, DrawRequest
from atropos_hpc.contracts.wal_record import Record
from atropos_hpc.trajectories import events
from atropos_hpc.trajectories.events import AnyEvent
from atropos_hpc.trajectories.pacing import Pacing
from atropos_hpc.trajectories.prompts import Stream
from atropos_hpc.trajectories.state import TrajectoryState

log = logging.getLogger(__name__)


class DrawService:
    """Hands out draws. `commit` journals an event and then applies it to the state."""

    def __init__(
        self, state: TrajectoryState, pacing: Pacing, commit: Callable[[AnyEvent], Awaitable[None]]
    ) -> None:
        self.state, self.pacing, self.commit = state, pacing, commit
        self._reserved: Counter[tuple[str, int]] = Counter()  # being journalled as handed out
        self._claimed: Counter[tuple[str, int]] = Counter()  # a group of it is being stored

    async def draw(self, request: DrawRequest) -> DrawAnswer:
        """Take a worker's reports and return the numbers that it shall draw.

        A worker of an earlier attempt of the run gets none.
        """
        name, prompts = request.stream, self.state.prompts
        if prompts.is_outdated(request):
            return DrawAnswer(numbers=[])
        await self._return_draws_of_absent(request)
        stream = prompts.stream(name)
        reserved = {number for key, number in self._reserved if key == name}
        numbers, ordered = stream.choose(request, reserved), stream.unordered is None
        adopted = [number for number in request.held if number in stream.returned]
        known = stream.workers.get(request.worker)
        if numbers or adopted or request.reports or request.seen or known is None:
            keys = [(name, number) for number in numbers]
            self._reserved.update(keys)
            try:
                short = msgspec.structs.replace(request, held=adopted)
                await self.commit(events.PromptsDrawn(short, numbers))
            finally:
                self._reserved -= Counter(keys)
        stream = self.state.prompts.stream(name)  # /reset_data may have replaced it
        if ordered and stream.unordered is not None:
            _warn_unordered(name, stream)
        held = set(request.held)
        return DrawAnswer(
            numbers=sorted(n for n in stream.held_by(request.worker) if n not in held),
            lowest=stream.lowest,
        )

    async def _return_draws_of_absent(self, request: DrawRequest) -> None:
        """Return the draws of workers that died, disconnected, or were not heard of for long."""
        name, prompts = request.stream, self.state.prompts
        died, interrupted = prompts.gone(request)
        here = {each.env_id for each in self.pacing.connected(time.monotonic())}
        for worker, holder in prompts.stream(name).workers.items():
            if worker not in died and holder.env_id not in here and worker != request.worker:
                interrupted.append(worker)
        for workers, lost in ((died, True), (interrupted, False)):
            if workers:
                await self.commit(events.DrawsReturned(name, sorted(set(workers)), lost))

    async def give_back(self, env_id: int) -> None:
        for name, stream in list(self.state.prompts.streams.items()):
            workers = [key for key, each in stream.workers.items() if each.env_id == env_id]
            if workers:
                await self.commit(events.DrawsReturned(name, workers, lost=False))

    @contextlib.contextmanager
    def claim(
        self, records: Sequence[Record], was_sent: Callable[[Record], bool]
    ) -> Iterator[list[Record]]:
        """Choose the records to store: all but those whose draw has its outcome already.

        One request may bring several groups of a draw, so a request that is sent again after a
        part of it was stored is stored in full.
        """
        drawn = [
            ((record.draw.stream, record.draw.number), record.draw, record)
            for record in records
            if record.draw is not None
        ]
        again = {key for key, _, record in drawn if was_sent(record)}
        late = {
            key
            for key, draw, _ in drawn
            if key not in again and (self._claimed[key] or self.state.prompts.is_settled(draw))
        }
        keys = [key for key, _, _ in drawn if key not in late]
        self._claimed.update(keys)
        try:
            yield [
                record
                for record in records
                if record.draw is None or (record.draw.stream, record.draw.number) not in late
            ]
        finally:
            self._claimed -= Counter(keys)


def _warn_unordered(name: str, stream: Stream) -> None:
    log.warning(
        "environment %s: prompt %d is not the same item in every worker, so its order is not "
        "deterministic. For this environment it is not promised that each prompt is drawn once "
        "per epoch; its groups are trained on as before. Let get_next_item depend on the seed "
        "and on the number of calls only",
        name,
        stream.unordered,
    )
