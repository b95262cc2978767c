"""What the trajectory server does, free of HTTP: each method is one route, and returns what its answer says.

Every change is journalled first, then applied to the ledger, then answered. Whatever was answered is on disk.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import orjson

from atropos_hpc.contracts import group
from atropos_hpc.contracts.group import Refused
from atropos_hpc.trajectories.batching import (
    Count,
    Environment,
    Item,
    Ledger,
    Presence,
    Registration,
    Share,
    Text,
    share_out,
)
from atropos_hpc.trajectories.journal import Damaged, Journal, NotWritten, Place
from atropos_hpc.trajectories.wal_record import EVENT, GROUP, HEADER_BYTES, SNAPSHOT, Record

log = logging.getLogger(__name__)

MAX_WAIT_S = 60.0  # for one lease; a learner asks again
MAX_QUEUED = 1 << 18  # groups; environments that take no notice of queue_size are held up here
LOOK_AGAIN_S = 1.0  # how often a waiting lease looks for what no arrival announces: a share that is not waited for any longer
ACKNOWLEDGED = (
    "batch {} was acknowledged as part of a checkpoint, and is gone; the next batch is {}"
)

T = TypeVar("T")


class EnvironmentRequest(msgspec.Struct):
    """The body of /register-env. `member` is ours: the same member registering again keeps its env_id."""

    max_token_length: Count
    desired_name: Text | None = None
    weight: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = 1.0
    group_size: Count = 1
    min_batch_allocation: Share | None = None
    member: Text | None = None


class StatusRequest(msgspec.Struct):
    """The body of /status-env and /disconnect-env. `in_flight` is ours: sequences being generated."""

    env_id: Count
    in_flight: Count | None = None


def parse(body: bytes, into: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=into, strict=False)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(422, str(error)[:200]) from None


class Service:
    """The journal, the ledger over it, and the waiting between them. Construct inside the event loop; that replays the journal."""

    def __init__(
        self, directory: Path, segment_bytes: int, max_length: int = group.ANY_LENGTH
    ) -> None:
        self.journal, self.ledger, self.max_length = (
            Journal(directory, segment_bytes),
            Ledger(),
            max_length,
        )
        self.refusals: Counter[int] = Counter()  # by HTTP status
        self.closing = False
        self._forming = asyncio.Lock()  # one decision at a time about what is in the queue
        self._arrived = asyncio.Event()  # replaced at each arrival
        self._being_stored: dict[
            int, asyncio.Future[None]
        ] = {}  # payload hash -> its first copy's way to the disk
        self._handed_out: int | None = None  # the batch that the last /batch gave away
        self._replay()
        self.journal.start(self._snapshot)

    async def close(self) -> None:
        self.end_waits()
        await asyncio.to_thread(self.journal.close)

    # --- state on disk

    def _replay(self) -> None:
        start, records = time.monotonic(), 0
        for place, header, record in self.journal.replay():
            records += 1
            if header.kind == GROUP:
                item = Item(
                    header.gid, place, header.sequences, header.tokens, header.env_id, header.oldest
                )
                self.ledger.add(item, header.hash, replay=True)
                continue
            text = bytes(record[HEADER_BYTES : HEADER_BYTES + header.meta_size])
            if header.kind == EVENT:
                self.ledger.apply(orjson.loads(text))
            elif header.kind == SNAPSHOT:
                hashes = np.frombuffer(
                    bytes(record[HEADER_BYTES + header.meta_size + -header.meta_size % 8 :]), "<u8"
                )
                self.ledger.restore(orjson.loads(text), hashes.tolist())
        missing = self.ledger.replayed(time.monotonic())
        if missing:
            raise Damaged(
                f"{self.journal.directory}: {len(missing)} groups that are needed are not there, the first is {missing[0]}: was a segment"
                " removed? Restore it; or move the directory away and resume from the checkpoint"
            )
        self._retire()
        log.info(
            "replayed %d records in %.2f s; %s", records, time.monotonic() - start, self.depth()
        )

    def _snapshot(self) -> Record:
        text = orjson.dumps(self.ledger.snapshot())
        padded = text + b"\0" * (-len(text) % 8)
        return Record(
            SNAPSHOT, padded + np.fromiter(self.ledger.known, "<u8").tobytes(), meta_size=len(text)
        )

    async def _record(self, event: str, **details: Any) -> None:
        """Journal an event, then apply it."""
        value = {"event": event, **details}
        text = orjson.dumps(value)
        try:
            await self.journal.append(
                Record(EVENT, text, meta_size=len(text)), lambda place: self.ledger.apply(value)
            )
        except NotWritten as error:
            raise Refused(503, str(error)) from None

    def _retire(self) -> None:
        self.journal.retire(lambda segment: self.ledger.live[segment] > 0)

    def end_waits(self) -> None:
        """Answer the leases that wait, and let none wait any more."""
        self.closing = True
        self._announce()

    def _announce(self) -> None:
        """Have every waiting lease look again."""
        self._arrived.set()
        self._arrived = asyncio.Event()

    # --- trainers

    async def register(self, body: bytes) -> dict[str, Any]:
        registration = parse(body, Registration)
        async with self._forming:
            await self._record("register", data=msgspec.to_builtins(registration))
        self._retire()
        self._announce()
        return {"uuid": uuid.uuid4().int >> 65}

    async def lease(
        self, batch: int, rank: int, world: int, wait_s: float, oldest: int, version: int
    ) -> list[Place] | None:
        """Where this rank's groups of the batch lie; None: not there after `wait_s` seconds. The same until it is acknowledged.

        A batch that is formed now leaves out, and drops, groups that a policy version before `oldest` has produced. `version`
        is the learner's own. Raises Refused: 409 if this is not the next batch or no trainer is registered, 410 if it is done with.
        """
        if not 0 <= rank < world <= 1 << 16:
            raise Refused(422, f"rank {rank} of {world}: there is no such rank")
        if batch in self.ledger.batches or batch == self.ledger.formed:
            self.ledger.version = version
        items = await self._wait_for(lambda: self._form(batch, oldest, version), wait_s)
        return None if items is None else [item.place for item in share_out(items, world)[rank]]

    async def _wait_for(self, look: Callable[[], Awaitable[T | None]], wait_s: float) -> T | None:
        deadline = time.monotonic() + min(wait_s, MAX_WAIT_S)
        while True:
            arrived = self._arrived  # before the look: an arrival during it is not missed
            found = await look()
            left = deadline - time.monotonic()
            if found is not None or self.closing or left <= 0:
                return found
            try:
                await asyncio.wait_for(arrived.wait(), min(left, LOOK_AGAIN_S))
            except TimeoutError:
                pass

    async def _form(self, batch: int, oldest: int, version: int) -> list[Item] | None:
        """The groups of `batch`; formed now if it is the next, and enough is queued."""
        ledger = self.ledger
        async with self._forming:
            if batch in ledger.batches:
                return ledger.batches[batch]
            if ledger.registration is None:
                raise Refused(409, "no trainer is registered: POST /register first")
            if batch < ledger.formed:
                raise Refused(410, ACKNOWLEDGED.format(batch, ledger.formed))
            if batch > ledger.formed:
                raise Refused(409, f"the next batch is {ledger.formed}, not {batch}")
            if not ledger.started:
                await self._record("started")
            if stale := ledger.stale(oldest):
                log.info(
                    "batch %d: dropping %d groups older than policy version %d",
                    batch,
                    len(stale),
                    oldest,
                )
                await self._record(
                    "drop",
                    groups=stale,
                    oldest=oldest,
                    sequences=sum(ledger.queue[gid].sequences for gid in stale),
                )
                self._retire()
            gids = ledger.choose(time.monotonic())
            if gids is None:
                return None
            await self._record("batch", batch=batch, groups=gids, version=version)
            return ledger.batches[batch]

    async def acknowledge(self, batch: int) -> dict[str, Any]:
        """All batches up to this one are in weights that survive; nobody will go back to before them."""
        if batch >= self.ledger.formed:
            raise Refused(
                409, f"batch {batch} has not been formed; the next batch is {self.ledger.formed}"
            )
        if any(k <= batch for k in self.ledger.batches):
            await self._record("ack", batch=batch)
            self._retire()
        return {"status": "ok", "unacknowledged": len(self.ledger.batches)}

    async def batch(self) -> list[Place] | None:
        """The next batch, for trainers of Atropos' own protocol. Asking for it acknowledges the one before."""
        ledger = self.ledger
        if self._handed_out is not None and self._handed_out in ledger.batches:
            await self.acknowledge(self._handed_out)
        first = ledger.registration.starting_step if ledger.registration else 0
        k = min((batch for batch in ledger.batches if batch >= first), default=ledger.formed)
        ledger.version = k
        items = await self._form(k, oldest=0, version=k)
        if items is None:
            return None
        self._handed_out = k
        return [item.place for item in items]

    async def reset(self) -> None:
        async with self._forming:
            await self._record("reset")
        self._handed_out = None
        self._retire()

    # --- environments

    async def register_environment(self, body: bytes) -> dict[str, Any]:
        request, ledger = parse(body, EnvironmentRequest), self.ledger
        if ledger.registration is None or not ledger.started:
            return {"status": "wait for trainer to start"}
        async with self._forming:
            before = next(
                (
                    e
                    for e in ledger.environments
                    if request.member is not None and e.member == request.member
                ),
                None,
            )
            name = request.desired_name or "environment"
            environment = Environment(
                env_id=before.env_id if before else len(ledger.environments),
                desired_name=name,
                real_name=before.real_name
                if before
                else f"{name}_{sum(e.desired_name == name for e in ledger.environments)}",
                max_token_length=request.max_token_length,
                group_size=request.group_size,
                weight=1.0 if request.weight is None else request.weight,
                min_batch_allocation=request.min_batch_allocation,
                member=request.member,
            )
            await self._record("environment", data=msgspec.to_builtins(environment))
            ledger.presence[environment.env_id] = Presence(time.monotonic())
        return {
            "status": "success",
            "env_id": environment.env_id,
            "wandb_name": environment.real_name,
            "checkpoint_dir": ledger.registration.checkpoint_dir,
            "starting_step": ledger.formed,
            "checkpoint_interval": ledger.registration.save_checkpoint_interval,
            "num_steps": ledger.registration.num_steps,
        }

    async def environment_status(self, body: bytes) -> dict[str, Any]:
        request, now = parse(body, StatusRequest), time.monotonic()
        if request.env_id not in self.ledger.presence:
            raise Refused(
                404, f"env_id {request.env_id} is not registered: POST /register-env first"
            )
        self.ledger.hear(request.env_id, now, request.in_flight)
        return self.ledger.status_of(request.env_id, now)

    async def disconnect_environment(self, body: bytes) -> dict[str, Any]:
        env_id = parse(body, StatusRequest).env_id
        if env_id not in self.ledger.presence:
            return {"status": "failure", "error": f"env_id {env_id} is not registered"}
        self.ledger.presence[env_id].heard = None
        return {"status": "success"}

    async def store(self, body: bytes, many: bool) -> int:
        """Journal and queue the posted groups, all or none of them unless the disk fills between. Returns how many there were."""
        if len(self.ledger.queue) >= MAX_QUEUED:
            raise Refused(
                503,
                f"{len(self.ledger.queue)} groups wait to be trained on, and no more are taken: send it again later",
            )
        registration = self.ledger.registration
        vocabulary = (registration.vocab_size if registration else 0) or group.ANY_VOCABULARY
        longest = registration.max_token_len if registration else self.max_length
        records = group.decode(body, many, vocabulary, longest if longest > 0 else group.ANY_LENGTH)
        now = time.monotonic()
        for env_id in {record.env_id for record in records}:
            self.ledger.deliver(env_id, now)
        if len(records) == 1:  # the usual case, without a task of its own
            stored: list[Any] = [await self._store(records[0])]
        else:
            stored = await asyncio.gather(*map(self._store, records), return_exceptions=True)
        if failure := next(
            (outcome for outcome in stored if isinstance(outcome, BaseException)), None
        ):
            raise failure
        if any(stored):
            self._announce()
        return len(records)

    async def _store(self, record: Record) -> bool:
        """Returns whether the group is new. One that was sent before is not stored again; its first copy is waited for."""
        first = self._being_stored.get(record.hash)
        repeated = first is not None or record.hash in self.ledger.known
        try:
            if repeated:
                self.ledger.repeated += 1
                if first is not None:
                    await asyncio.shield(first)
            else:
                await asyncio.shield(self._begin_storing(record))
        except NotWritten as error:
            raise Refused(503, str(error)) from None
        return not repeated

    def _begin_storing(self, record: Record) -> "asyncio.Future[None]":
        record.gid = self.ledger.next_gid
        self.ledger.next_gid += 1

        def add(place: Place) -> None:
            item = Item(
                record.gid, place, record.sequences, record.tokens, record.env_id, record.oldest
            )
            self.ledger.add(item, record.hash)

        storing = self.journal.append(record, add)
        self._being_stored[record.hash] = storing
        storing.add_done_callback(lambda _: self._being_stored.pop(record.hash, None))
        return storing

    # --- what anybody may ask

    def depth(self) -> dict[str, int]:
        """How much lies where."""
        ledger = self.ledger
        return {
            "queued_groups": len(ledger.queue),
            "queued_sequences": ledger.queued_sequences,
            "formed": ledger.formed,
            "unacknowledged": len(ledger.batches),
            "stale": ledger.stale_groups,
            "stale_sequences": ledger.stale_sequences,
            "repeated": ledger.repeated,
            "refused": sum(
                n for status, n in self.refusals.items() if status not in (401, 404, 405, 409, 410)
            ),
        }

    def status(self) -> dict[str, Any]:
        return {
            "current_step": self.ledger.formed,
            "queue_size": len(self.ledger.queue),
            **self.depth(),
        }

    def info(self) -> dict[str, Any]:
        registration = self.ledger.registration
        return {
            "batch_size": registration.batch_size if registration else -1,
            "max_token_len": registration.max_token_len if registration else -1,
        }

    def wandb_info(self) -> dict[str, Any]:
        registration = self.ledger.registration
        return {
            "group": registration.wandb_group if registration else None,
            "project": registration.wandb_project if registration else None,
        }

    def latest_example(self) -> bytes | None:
        """The group that came last, as JSON; None if there is none, or it is done with and gone."""
        try:
            return (
                group.as_json(self.journal.read(self.ledger.latest.place))
                if self.ledger.latest
                else None
            )
        except KeyError:
            return None
