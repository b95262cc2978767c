"""Notices that this process itself no longer gets on, from a thread, and says where it stands.

A heartbeat thread proves that a process lives. It says nothing about code of a user that blocks the
main thread, or waits for ever in a coroutine. So the main thread announces what it does next and
how long that may take; when that time is over, `on_stall` is called, which ends the process.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, Self

from atropos_hpc.runtime.error_text import locate

POLL_S = 0.2

Place = tuple[str, int, str]  # file, line, function


class StallWatch:
    """Watches the thread that makes it. `excused` says that the present wait is not its fault.

    As a context manager it ends with its block, however that ends.
    """

    def __init__(
        self,
        on_stall: Callable[[str], None],
        files: Collection[str] = (),
        excused: Callable[[], bool] = lambda: False,
    ) -> None:
        self.files, self._on_stall, self._excused = files, on_stall, excused
        self._watched = threading.get_ident()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._what, self._seconds, self._deadline = "", 0.0, float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._watch, name="stall watch", daemon=True).start()

    def expect(self, what: str, seconds: float) -> None:
        """Announce what happens next, and within how many seconds the next call comes."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        with self._lock:
            self._what, self._seconds, self._loop = what, seconds, loop
            self._deadline = time.monotonic() + seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            with self._lock:
                if time.monotonic() < self._deadline:
                    continue
                if self._excused():
                    self._deadline = time.monotonic() + self._seconds
                    continue
                self._deadline = float("inf")
                message = f"{self._what} has not ended after {self._seconds:.0f} s"
                place = self._place()
            self._on_stall(f"{message} (it is at {place})" if place else message)

    def _place(self) -> str | None:
        """Describe where the thread is, or what a task of its event loop awaits."""
        frame = sys._current_frames().get(self._watched)
        places = [list(_stack(frame))]
        for task in asyncio.all_tasks(self._loop) if self._loop is not None else ():
            places.append(list(_awaiting(task.get_coro())))
        found = [place for frames in places if (place := locate(frames, self.files))]
        own = [place for place in found if place.startswith(tuple(self.files))]
        return next(iter([*own, *found]), None)


def _stack(frame: FrameType | None) -> Iterator[Place]:
    """Yield the places of a running thread, outermost first."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    yield from reversed(frames)


def _awaiting(coroutine: Any) -> Iterator[Place]:
    """Yield the places at which a suspended coroutine and those that it awaits are."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        coroutine = coroutine.cr_await
