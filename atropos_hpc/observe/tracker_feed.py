"""Give every step and evaluation to the experiment trackers exactly once, over crashes and resumes.

1. A line is appended to tracked.jsonl and synced. A step or evaluation that has a line there is not
   appended again: trackers keep the first values of a step that is repeated after a crash.
2. A thread per tracker reads the lines and logs those that the tracker's own store does not hold. A
   tracker that lost what it had not yet written gets it again when it is opened the next time.

So all trackers show the content of tracked.jsonl. One that fails or hangs does not hold up
training: its lines are delivered at the next step, or by the next start. Samples are not in the
file: they are shown with their step, or lost.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from atropos_hpc.contracts.metrics import Rollout, Tracked
from atropos_hpc.observe.trackers import Ending, Tracker
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.run_dir import RecordReader, RunDir, read_records, write_file

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0


class _Follower(threading.Thread):
    """Delivers the lines of tracked.jsonl to one tracker."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], path: Path) -> None:
        super().__init__(name=name, daemon=True)
        self._open, self._lines = open_tracker, RecordReader(path, Tracked)
        self._pending: deque[Tracked] = deque()
        self.samples: dict[int, Sequence[Rollout]] = {}  # by step, until that is delivered
        self.delivered = -1  # number of the newest line that the tracker has
        self.wake = threading.Event()
        self.closing: Ending | None = None

    def run(self) -> None:
        tracker, ending = None, None
        while ending is None:
            self.wake.wait()
            self.wake.clear()
            ending = self.closing  # what was appended before it was set is delivered below
            try:
                tracker = tracker or self._open()
                self._deliver(tracker)
                if ending is not None:
                    tracker.close(ending)
            except Exception as error:  # whatever the library raises
                when = "step" if ending is None else "start of the run"
                log.warning(
                    "%s: %s; retried at the next %s", self.name, describe_error(error), when
                )

    def _deliver(self, tracker: Tracker) -> None:
        self._pending.extend(self._lines.take())
        while self._pending:
            line = self._pending[0]
            if not tracker.holds(line):
                tracker.log(line, self.samples.get(line.step, ()) if line.kind == "step" else ())
            if line.kind == "step":
                self.samples.pop(line.step, None)
            self.delivered = self._pending.popleft().number


class TrackerFeed:
    """The trackers of a run. With none, every method does nothing."""

    def __init__(self, run: RunDir, trackers: Mapping[str, Callable[[], Tracker]]) -> None:
        """`trackers`: functions that open them, by name. They are opened in the background."""
        self._path = run.tracked
        self._newest: dict[str, int] = {}
        self._number = 0
        self._followers = [_Follower(name, each, self._path) for name, each in trackers.items()]
        if not self._followers:
            return
        lines = read_records(self._path, Tracked)
        for line in lines:
            self._newest[line.kind] = line.step
            self._number = line.number + 1
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):  # cut by a crash
            write_file(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        for follower in self._followers:
            follower.start()
            follower.wake.set()

    def __bool__(self) -> bool:
        return bool(self._followers)

    def knows(self, kind: str, step: int) -> bool:
        """Tell whether the trackers were given this step, or a later one, of the kind."""
        return step <= self._newest.get(kind, -1)

    def add(self, kind: str, step: int, time: float, scalars: Mapping[str, float]) -> None:
        """Give the trackers a step or an evaluation, unless they were given it before."""
        if not self._followers or self.knows(kind, step):
            return
        line = Tracked(self._number, kind, step, time, dict(scalars))
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._newest[kind], self._number = step, self._number + 1
        for follower in self._followers:
            follower.wake.set()

    def samples(self, step: int, samples: Sequence[Rollout]) -> None:
        """Show sequences with a step, before `add` is called with it."""
        for follower in self._followers:
            follower.samples[step] = samples

    def close(self, ending: Ending, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Deliver what is left and close the trackers; give up on those that need longer."""
        deadline = time.monotonic() + timeout_s
        for follower in self._followers:
            follower.closing = ending
            follower.wake.set()
        for follower in self._followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if follower.is_alive():
                lacks = f"lacks {self._number - 1 - follower.delivered} of {self._number} lines"
                log.warning("%s %s; the next start delivers them", follower.name, lacks)
