"""The append-only write-ahead journal on disk.

Order of writes of a commit:
  1. records that arrive during the previous commit wait in memory; one thread writes them all with
     one pwritev
  2. fdatasync
  3. only then are their senders answered, in the order of the file, so the state in memory always
     equals what a replay would give
Order of writes when a segment is full:
  1. the next segment's file is created, and its name made durable
  2. its first record is a snapshot of the whole state, in the same commit as the records after it
  3. only when that commit is durable may older segments be unlinked, in any order

A crash leaves a whole journal and perhaps a torn end, which replay cuts off: it was never
acknowledged. A record that is not intact although it had been durable is damage, and replay refuses
it. When the disk is full, the file is cut back to its last durable end, the senders get an error,
and the next append tries again.
"""

import asyncio
import concurrent.futures
import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from atropos_hpc.contracts.wal_record import MAGIC, Header, Record, header_at, scan
from atropos_hpc.runtime.run_dir import numbered, sync_directory

log = logging.getLogger(__name__)

LOCK_WAIT_S = 20.0  # for the previous server to exit
SNAPSHOT_WAIT_S = 120.0
MAX_BUFFERS = 512  # per pwritev; the kernel takes 1024


class Place(NamedTuple):
    """Where a record is."""

    segment: int
    offset: int
    size: int


class Damaged(Exception):
    """The journal is damaged; the message says where, and what to do."""


class InUse(Damaged):
    """Another trajectory server has the journal open."""


class NotWritten(Exception):
    """A record could not be written (full disk, quota), and is not in the journal.

    A later append may succeed.
    """


Apply = Callable[[Place], None]
_Pending = tuple[Record, Apply, "asyncio.Future[None]"]


class Journal:
    """The segments in one directory.

    Call `replay` once, then `start` inside the event loop, then `append` and `read`.
    """

    def __init__(
        self, directory: Path, segment_bytes: int, lock_wait_s: float = LOCK_WAIT_S
    ) -> None:
        self.directory, self.segment_bytes = directory, segment_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory / "lock", lock_wait_s)
        self._files: dict[int, int] = {}  # segment -> fd
        self._tail = (0, 0)  # current segment, and its durable end
        self._dirty = False  # whether the file may reach beyond its durable end
        self._pending: list[_Pending] = []
        self._wake = threading.Condition()
        self._closed = False
        self._failures = 0  # since the last successful write
        self.alarm: str | None = None  # why it cannot be written at present
        self._thread: threading.Thread | None = None

    def replay(self) -> Iterator[tuple[Place, Header, memoryview]]:
        """Yield (place, header, bytes) of every record in order.

        Cuts off a torn end. Raises Damaged. Each memoryview is valid until the next is requested.
        """
        segments = sorted(numbered(self.directory, "", ".journal"))
        for segment in segments:
            path = self._path(segment)
            fd = self._files[segment] = os.open(path, os.O_RDWR)
            size, end = os.fstat(fd).st_size, 0
            if size:
                with (
                    mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped,
                    memoryview(mapped) as buffer,
                ):
                    mapped.madvise(mmap.MADV_SEQUENTIAL)
                    for start, end, header in scan(buffer):
                        with buffer[start:end] as record:
                            yield Place(segment, start, end - start), header, record
                    if end < size:
                        self._refuse_damage(path, mapped, buffer, end, last=segment == segments[-1])
            if end < size:
                log.warning(
                    "%s: cutting off %d bytes of an unfinished write at byte %d",
                    path,
                    size - end,
                    end,
                )
                os.ftruncate(fd, end)
            if segment == segments[-1]:
                os.fsync(fd)  # a killed server may have written this and not synced it
            self._tail = (segment, end)

    @staticmethod
    def _refuse_damage(
        path: Path, mapped: mmap.mmap, buffer: memoryview, bad: int, last: bool
    ) -> None:
        """Raise Damaged if what follows `bad` shows that it had been durable.

        A power cut may keep later records of a commit and lose earlier ones, but nothing that an
        earlier commit made durable.
        """
        where = f"{path} is damaged at byte {bad}"
        advice = (
            "restore it from a copy; or, to give up the groups that wait in it, move the directory "
            "away and resume from the checkpoint"
        )
        if not last:
            raise Damaged(f"{where}: more segments follow; {advice}")
        if bad == 0 and mapped[:3] == MAGIC[:3] and mapped[3] != MAGIC[3]:
            raise Damaged(f"{path} was written by another version of atropos_hpc: resume with that")
        at = mapped.find(MAGIC, bad + 1)
        while at >= 0:
            header = header_at(buffer, at)
            if header is not None and header.durable > bad:
                raise Damaged(f"{where}: an intact record follows at byte {at}; {advice}")
            at = mapped.find(MAGIC, at + 1)

    def start(self, snapshot: Callable[[], Record]) -> None:
        """Start the writing thread.

        `snapshot` returns the state after all records so far; it is called in the event loop.
        """
        self._snapshot, self._loop = snapshot, asyncio.get_running_loop()
        if self._files:
            sync_directory(self.directory)  # a killed server may have begun a segment and no more
        else:
            self._begin_segment(0)
        self._thread = threading.Thread(
            target=self._write_until_closed, name="journal", daemon=True
        )
        self._thread.start()

    def append(self, record: Record, apply: Apply) -> "asyncio.Future[None]":
        """Return a future that is done once `record` is durable, or fails with NotWritten.

        `apply` is called before it is done, in the event loop, in the order of the file.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        with self._wake:
            if self._closed:
                done.set_exception(NotWritten("the journal is being closed"))
                return done
            self._pending.append((record, apply, done))
            self._wake.notify()
        return done

    def read(self, place: Place) -> bytes:
        """Return the record at `place`. Raises KeyError if its segment was retired."""
        data = os.pread(self._files[place.segment], place.size, place.offset)
        if len(data) != place.size:
            raise Damaged(
                f"{self._path(place.segment)}: read {len(data)} of {place.size} bytes at "
                f"{place.offset}; was the file changed?"
            )
        return data

    def retire(self, live: Callable[[int], bool]) -> None:
        """Unlink the segments that are not `live`."""
        current, end = self._tail
        if end == 0:  # the snapshot that replaces older segments is not durable yet
            return
        # The writing thread may begin another segment meanwhile, which nothing is live in yet.
        for segment in [s for s in list(self._files) if s < current and not live(s)]:
            self._path(segment).unlink(missing_ok=True)
            os.close(self._files.pop(segment))

    def close(self) -> None:
        """Write what is pending and stop. Blocks on the event loop: call it in another thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread:
            self._thread.join()
        for fd in (*self._files.values(), self._lock):
            os.close(fd)
        self._files.clear()

    # --- the writing thread

    def _write_until_closed(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._closed:
                    self._wake.wait()
                if not self._pending:
                    return
                batch, self._pending = self._pending, []
            error: NotWritten | None = None
            places: list[Place] = []
            try:
                places = self._commit([record for record, _, _ in batch])
            except Exception as failure:  # whatever it is, the senders must get an error
                self._failures += 1
                self.alarm = f"the journal in {self.directory} cannot be written: {failure}"
                # Log the 1st, 2nd, 4th, 8th, ... failure: a full disk lasts.
                if self._failures & (self._failures - 1) == 0:
                    log.error(
                        "cannot write the journal in %s (%d times): %s; senders retry",
                        self.directory,
                        self._failures,
                        failure,
                    )
                error = NotWritten(f"{self.alarm}; nothing was stored, send it again later")
            self._loop.call_soon_threadsafe(_finish, batch, places, error)

    def _commit(self, records: list[Record]) -> list[Place]:
        if self._dirty:
            self._cut_back()
        if self._tail[1] >= self.segment_bytes:
            self._begin_segment(self._tail[0] + 1)
        segment, durable = self._tail
        buffers: list[memoryview] = []
        places, at = [], durable
        for record in [self._take_snapshot(), *records] if durable == 0 else records:
            buffers += memoryview(record.header(durable)), memoryview(record.payload)
            places.append(Place(segment, at, record.size))
            at += record.size
        self._dirty = True
        try:
            _write_all(self._files[segment], buffers, durable)
            os.fdatasync(self._files[segment])
        except OSError:
            try:
                self._cut_back()
            except OSError as error:
                log.error(
                    "cannot truncate segment %d to byte %d: %s; retrying before the next write",
                    segment,
                    durable,
                    error,
                )
            raise
        self._dirty, self._failures, self.alarm = False, 0, None
        self._tail = (segment, at)
        return places[-len(records) :]

    def _cut_back(self) -> None:
        segment, end = self._tail
        os.ftruncate(self._files[segment], end)
        os.fsync(self._files[segment])
        self._dirty = False

    def _begin_segment(self, segment: int) -> None:
        if segment not in self._files:
            self._files[segment] = os.open(self._path(segment), os.O_RDWR | os.O_CREAT, 0o600)
        sync_directory(self.directory)
        self._tail = (segment, 0)

    def _take_snapshot(self) -> Record:
        """Call `snapshot` in the event loop, after `apply` of all earlier commits."""
        answer: concurrent.futures.Future[Record] = concurrent.futures.Future()

        def take() -> None:
            try:
                answer.set_result(self._snapshot())
            except Exception as error:
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(take)
        return answer.result(SNAPSHOT_WAIT_S)

    def _path(self, segment: int) -> Path:
        return self.directory / f"{segment:08d}.journal"


def _finish(batch: list[_Pending], places: list[Place], error: NotWritten | None) -> None:
    """Apply each record of a commit, then wake its sender. Runs in the event loop."""
    for index, (_, apply, done) in enumerate(batch):
        failure: Exception | None = error
        if failure is None:
            try:
                apply(places[index])
            except Exception as wrong:  # the rest of the commit must be applied all the same
                log.exception("a durable record could not be applied")
                failure = wrong
        if not done.done():  # the sender may have been cancelled
            done.set_exception(failure) if failure else done.set_result(None)


def _write_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    first = 0
    while first < len(buffers):
        written = os.pwritev(fd, buffers[first : first + MAX_BUFFERS], offset)
        offset += written
        while first < len(buffers) and written >= len(buffers[first]):
            written -= len(buffers[first])
            first += 1
        if written:
            buffers[first] = buffers[first][written:]


def _lock(path: Path, wait_s: float) -> int:
    """Lock out a second server on this machine, where the filesystem has locks."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise InUse(
                    f"{path.parent}: another trajectory server has had this open for "
                    f"{wait_s:.0f} s; stop it first"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            log.warning("%s: this filesystem has no locks (%s); going on without", path, error)
            return fd
