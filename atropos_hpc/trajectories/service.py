"""The trajectory server without HTTP: each method is one route, and returns its answer.

Order of writes: a change is journalled, then applied to the state, then answered. So every answer
that a client received is on disk.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from atropos_hpc.contracts import messages
from atropos_hpc.contracts.group import UNLIMITED, Limits, free_form_of
from atropos_hpc.contracts.scored_group import RequestError, draw_of
from atropos_hpc.contracts.wal_record import EVENT, GROUP, SNAPSHOT, Record
from atropos_hpc.trajectories import events
from atropos_hpc.trajectories.batching import split_by_tokens
from atropos_hpc.trajectories.decode import to_json
from atropos_hpc.trajectories.draws import DrawService
from atropos_hpc.trajectories.events import AnyEvent, Environment
from atropos_hpc.trajectories.journal import Damaged, Journal, NotWritten, Place
from atropos_hpc.trajectories.pacing import Pacing, Timeouts
from atropos_hpc.trajectories.state import QueuedGroup, TrajectoryState

log = logging.getLogger(__name__)

MAX_WAIT_S = 60.0  # of one lease request; a learner sends the next one
RECHECK_S = 1.0  # between two checks of a waiting lease for an allocation timeout
NOT_COUNTED = (401, 404, 405, 409, 410)  # refusals that say nothing about a group

T = TypeVar("T")


@dataclass(frozen=True)
class ServiceSettings:
    """What the trajectory server takes from the run's config."""

    segment_bytes: int
    max_length: int = UNLIMITED  # of a sequence, until a trainer registers
    max_staleness: int = 0  # staleness.max
    max_queued: int = 1 << 18  # groups; more are answered with 503
    timeouts: Timeouts = field(default_factory=Timeouts)


class Service:
    """The journal, the state that it makes durable, and the requests that wait for it.

    Construct it inside the event loop; that replays the journal.
    """

    def __init__(self, directory: Path, settings: ServiceSettings) -> None:
        self.settings = settings
        self.journal = Journal(directory, settings.segment_bytes)
        self.state = TrajectoryState()
        self.pacing = Pacing(self.state, settings.max_staleness, settings.timeouts)
        self.rejections: Counter[int] = Counter()  # by HTTP status
        self.closing = False
        self.draws = DrawService(self.state, self.pacing, self._commit)
        self._deciding = asyncio.Lock()  # one decision about the queue at a time
        self._changed = asyncio.Event()  # set and replaced at each arrival
        self._storing: dict[int, asyncio.Future[None]] = {}  # by payload hash
        self._handed_out: int | None = None  # the batch that the last GET /batch returned
        self._replay()
        self.journal.start(self._snapshot)

    async def close(self) -> None:
        """Stop the waits and the journal."""
        self.end_waits()
        await asyncio.to_thread(self.journal.close)

    # --- state on disk

    def _replay(self) -> None:
        start, records = time.monotonic(), 0
        for place, header, record in self.journal.replay():
            records += 1
            if header.kind == GROUP:
                draw = draw_of(free_form_of(record, header))
                group = QueuedGroup.of(header, place, draw)
                self.state.add(group, header.hash, replay=True)
            elif header.kind == EVENT:
                self.state.apply(events.read_event(header, record))
            elif header.kind == SNAPSHOT:
                self.state.restore(*events.read_snapshot(header, record))
        if missing := self.state.end_replay():
            raise Damaged(
                f"{self.journal.directory}: {len(missing)} groups that are needed are not there, "
                f"the first is {missing[0]}. Was a segment removed? Restore it; or move the "
                "directory away and resume from the checkpoint"
            )
        self.pacing.restart(time.monotonic())
        self._retire()
        elapsed = time.monotonic() - start
        log.info("replayed %d journal records in %.2f s: %s", records, elapsed, self.status())

    def _snapshot(self) -> Record:
        return events.snapshot_record(self.state.snapshot(), list(self.state.known))

    async def _commit(self, event: AnyEvent) -> None:
        """Journal an event, then apply it."""
        record = events.event_record(event)
        try:
            await self.journal.append(record, lambda place: self.state.apply(event))
        except NotWritten as error:
            raise RequestError(503, str(error)) from None

    def _retire(self) -> None:
        self.journal.retire(lambda segment: self.state.live[segment] > 0)

    def end_waits(self) -> None:
        """Answer the leases that wait, and let none wait from now on."""
        self.closing = True
        self._wake_leases()

    def _wake_leases(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- trainers

    async def register(self, registration: messages.Registration) -> messages.Registered:
        """Register a trainer, or update its registration. The queue stays."""
        async with self._deciding:
            await self._commit(events.TrainerRegistered(registration))
        self._retire()
        self._wake_leases()
        return messages.Registered(uuid.uuid4().int >> 65)

    async def lease(self, query: messages.LeaseQuery) -> list[Place] | None:
        """Return where this rank's groups of the batch are, None if it is not there in time.

        The answer is the same until the batch is acknowledged. A batch that is formed now leaves
        out, and drops, groups that a version before `query.oldest` produced. Raises RequestError:
        409 if this is not the next batch or no trainer is registered, 410 if it was acknowledged.
        """
        if query.rank >= query.world:
            raise RequestError(422, f"rank {query.rank} of {query.world}: there is no such rank")
        version = query.version if isinstance(query.version, int) else query.batch
        if query.batch in self.state.batches or query.batch == self.state.next_batch:
            self.state.version = version
        groups = await self._wait_for(
            lambda: self._form(query.batch, query.oldest, version), query.wait
        )
        if groups is None:
            return None
        return [group.place for group in split_by_tokens(groups, query.world)[query.rank]]

    async def _wait_for(self, find: Callable[[], Awaitable[T | None]], wait_s: float) -> T | None:
        deadline = time.monotonic() + min(wait_s, MAX_WAIT_S)
        while True:
            changed = self._changed  # taken first, so that an arrival during `find` is not missed
            found = await find()
            left = deadline - time.monotonic()
            if found is not None or self.closing or left <= 0:
                return found
            try:
                async with asyncio.timeout(min(left, RECHECK_S)):
                    await changed.wait()
            except TimeoutError:
                pass

    async def _form(self, batch: int, oldest: int, version: int) -> list[QueuedGroup] | None:
        """Return the groups of `batch`. Form it if it is the next and enough groups are queued."""
        state = self.state
        async with self._deciding:
            if batch in state.batches:
                return state.batches[batch]
            if state.registration is None:
                raise RequestError(409, "no trainer is registered: POST /register first")
            if batch < state.next_batch:
                raise RequestError(
                    410,
                    f"batch {batch} was acknowledged as part of a checkpoint, and is gone; "
                    f"the next batch is {state.next_batch}",
                )
            if batch > state.next_batch:
                raise RequestError(409, f"the next batch is {state.next_batch}, not {batch}")
            if not state.started:
                await self._commit(events.Started())
            await self._drop_stale(oldest)
            gids = self.pacing.next_batch(time.monotonic())
            if gids is None:
                return None
            await self._commit(events.BatchFormed(batch, gids, version))
            return state.batches[batch]

    async def _drop_stale(self, oldest: int) -> None:
        stale = self.state.stale(oldest)
        if not stale:
            return
        log.info(
            "batch %d: dropping %d groups older than policy version %d, or larger than a batch",
            self.state.next_batch,
            len(stale),
            oldest,
        )
        groups = [self.state.queue[gid] for gid in stale]
        sequences = sum(group.sequences for group in groups)
        draws = [group.draw for group in groups if group.draw is not None]
        await self._commit(events.GroupsDropped(stale, oldest, sequences, draws))
        self._retire()

    async def acknowledge(self, batch: int) -> messages.Acknowledged:
        """Forget all batches up to this one: they are part of a durable checkpoint."""
        if batch >= self.state.next_batch:
            coming = self.state.next_batch
            raise RequestError(409, f"batch {batch} is not formed yet; the next batch is {coming}")
        if any(number <= batch for number in self.state.batches):
            await self._commit(events.BatchesAcknowledged(batch))
            self._retire()
        return messages.Acknowledged("ok", len(self.state.batches))

    async def batch(self) -> list[Place] | None:
        """Return the next batch, for trainers of Atropos' protocol.

        Asking for it acknowledges the one before.
        """
        state = self.state
        if self._handed_out is not None and self._handed_out in state.batches:
            await self.acknowledge(self._handed_out)
        first = state.registration.starting_step if state.registration else 0
        batch = min((k for k in state.batches if k >= first), default=state.next_batch)
        state.version = batch
        groups = await self._form(batch, oldest=0, version=batch)
        if groups is None:
            return None
        self._handed_out = batch
        return [group.place for group in groups]

    async def reset(self) -> None:
        async with self._deciding:
            await self._commit(events.Reset())
            self.pacing.presence.clear()
        self._handed_out = None
        self._retire()

    # --- environments

    async def register_environment(
        self, request: messages.EnvironmentRegistration
    ) -> messages.EnvironmentRegistered:
        """Register an environment. A member that registers again keeps its env_id and name."""
        state = self.state
        if state.registration is None or not state.started:
            return messages.EnvironmentRegistered("wait for trainer to start")
        async with self._deciding:
            environment = self._environment_of(request)
            await self._commit(events.EnvironmentAdded(environment))
            self.pacing.connect(environment.env_id, time.monotonic())
        return messages.EnvironmentRegistered(
            "success",
            env_id=environment.env_id,
            wandb_name=environment.real_name,
            checkpoint_dir=state.registration.checkpoint_dir,
            starting_step=state.next_batch,
            checkpoint_interval=state.registration.save_checkpoint_interval,
            num_steps=state.registration.num_steps,
        )

    def _environment_of(self, request: messages.EnvironmentRegistration) -> Environment:
        name, known = request.desired_name or "environment", self.state.environments
        same = [e for e in known if e.member is not None and e.member == request.member]
        number = sum(e.desired_name == name for e in known)
        return Environment(
            env_id=same[0].env_id if same else len(known),
            desired_name=name,
            real_name=same[0].real_name if same else f"{name}_{number}",
            max_token_length=request.max_token_length,
            group_size=request.group_size,
            weight=1.0 if request.weight is None else request.weight,
            min_batch_allocation=request.min_batch_allocation,
            member=request.member,
        )

    async def environment_status(
        self, request: messages.StatusRequest
    ) -> messages.EnvironmentStatus:
        """Take an environment's report, and return its status and quota."""
        now = time.monotonic()
        if request.env_id not in self.pacing.presence:
            detail = f"env_id {request.env_id} is not registered: POST /register-env first"
            raise RequestError(404, detail)
        self.pacing.report(request, now)
        return self.pacing.status(request.env_id, now)

    async def disconnect_environment(
        self, request: messages.StatusRequest
    ) -> messages.Disconnected:
        if request.env_id not in self.pacing.presence:
            return messages.Disconnected("failure", f"env_id {request.env_id} is not registered")
        self.pacing.presence[request.env_id].heard = None
        await self.draws.give_back(request.env_id)
        return messages.Disconnected("success")

    def limits(self) -> Limits:
        """Return the limits of groups. Raises RequestError (503) if the queue is full."""
        if len(self.state.queue) >= self.settings.max_queued:
            queued = len(self.state.queue)
            raise RequestError(503, f"{queued} groups wait to be trained on: send it again later")
        registration = self.state.registration
        if registration is None:
            return Limits(max_length=self.settings.max_length)
        return Limits(
            registration.vocab_size or UNLIMITED,
            registration.max_token_len or UNLIMITED,
            registration.batch_size,
        )

    async def store(self, records: Sequence[Record]) -> None:
        """Journal and queue groups: all, or none unless the disk fills in between."""
        now = time.monotonic()
        for env_id in {record.env_id for record in records}:
            self.pacing.deliver(env_id, now)
        with self.draws.claim(records, self._was_sent) as new:
            self.state.repeated += len(records) - len(new)
            outcomes = await asyncio.gather(*map(self._store, new), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if any(outcomes):
            self._wake_leases()

    def _was_sent(self, record: Record) -> bool:
        return record.hash in self._storing or record.hash in self.state.known

    async def _store(self, record: Record) -> bool:
        """Store a group unless it was sent before, and return whether it is new.

        A repeated group is answered once its original is durable.
        """
        original = self._storing.get(record.hash)
        repeated = original is not None or record.hash in self.state.known
        self.state.repeated += repeated
        try:
            if original is not None:
                await asyncio.shield(original)
            elif not repeated:
                await asyncio.shield(self._begin_storing(record))
        except NotWritten as error:
            raise RequestError(503, str(error)) from None
        return not repeated

    def _begin_storing(self, record: Record) -> "asyncio.Future[None]":
        record.gid = self.state.next_gid
        self.state.next_gid += 1
        storing = self.journal.append(
            record,
            lambda place: self.state.add(QueuedGroup.of(record, place, record.draw), record.hash),
        )
        self._storing[record.hash] = storing
        storing.add_done_callback(lambda _: self._storing.pop(record.hash, None))
        return storing

    # --- queries

    def status(self) -> messages.ServerStatus:
        """Return how much is where."""
        state = self.state
        counted = [n for status, n in self.rejections.items() if status not in NOT_COUNTED]
        return messages.ServerStatus(
            current_step=state.next_batch,
            queue_size=len(state.queue),
            queued_groups=len(state.queue),
            queued_sequences=state.queued_sequences,
            next_batch=state.next_batch,
            unacknowledged=len(state.batches),
            stale=state.stale_groups,
            stale_sequences=state.stale_sequences,
            repeated=state.repeated,
            refused=sum(counted),
            prompts={name: each.counts() for name, each in state.prompts.streams.items()},
        )

    def info(self) -> messages.ServerInfo:
        registration = self.state.registration
        if registration is None:
            return messages.ServerInfo(-1, -1)
        return messages.ServerInfo(registration.batch_size, registration.max_token_len)

    def wandb_info(self) -> messages.WandbInfo:
        registration = self.state.registration
        if registration is None:
            return messages.WandbInfo(None, None)
        return messages.WandbInfo(registration.wandb_group, registration.wandb_project)

    def latest_example(self) -> bytes | None:
        """Return the latest group as JSON; None if there is none, or its segment is gone."""
        if self.state.latest is None:
            return None
        try:
            return to_json(self.journal.read(self.state.latest.place))
        except KeyError:
            return None
