"""The one way to wait: every wait has a name, a counterpart and a deadline.

    with Waiting("batch 3", "the trajectory server", 600, member) as wait:
        while not ready():
            wait.check()
            time.sleep(0.1)

A wait of more than a second is shown in the member's file, so that `status` and the supervisor can
say who waits for whom.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

from atropos_hpc.contracts.members import Wait

T = TypeVar("T")
SHOW_AFTER_S = 1.0


class WaitTimeout(TimeoutError):
    """A wait that passed its deadline. The message says what was awaited, from whom, how long."""


class ShowsWait(Protocol):
    """Something that shows others what it waits for, such as a `membership.Member`."""

    def show_wait(self, wait: Wait | None) -> None: ...


class Waiting:
    """One wait, for loops of any kind: blocking, asyncio or collective.

    `timeout_s` None means that the wait is bounded elsewhere. `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        what: str,
        from_whom: str,
        timeout_s: float | None,
        member: ShowsWait | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.from_whom, self.timeout_s = what, from_whom, timeout_s
        self._member, self._clock = member, clock
        self._start, self._shown = clock(), False

    @property
    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return self._clock() - self._start

    @property
    def expired(self) -> bool:
        return self.timeout_s is not None and self.elapsed > self.timeout_s

    def check(self) -> None:
        """Call before each pause: show a long wait, and raise WaitTimeout after the deadline."""
        if self.expired:
            raise self.timeout()
        self.show()

    def show(self) -> None:
        """Show a long wait. For collective waits, in which no process may raise by itself."""
        if self._member is not None and not self._shown and self.elapsed >= SHOW_AFTER_S:
            self._shown = True
            self._member.show_wait(self.record())

    def timeout(self, detail: str = "") -> WaitTimeout:
        """The error for a wait that failed; `detail` says what was seen last."""
        detail = f"; last: {detail}" if detail else ""
        return WaitTimeout(
            f"waited {self.elapsed:.0f} s for {self.what} from {self.from_whom}, in vain{detail}"
        )

    def record(self) -> Wait:
        """The wait as it is shown to others, in Unix time."""
        since = time.time() - self.elapsed
        deadline = None if self.timeout_s is None else since + self.timeout_s
        return Wait(self.what, self.from_whom, since, deadline)

    def end(self) -> None:
        """Show that the wait is over. May be called again."""
        if self._shown and self._member is not None:
            self._shown = False
            self._member.show_wait(None)

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.end()


def wait_for(
    what: str,
    from_whom: str,
    poll: Callable[[], T | None],
    timeout_s: float,
    poll_s: float = 0.1,
    member: ShowsWait | None = None,
) -> T:
    """Call `poll` until it returns something true, and return that.

    Raises WaitTimeout, a TimeoutError, after `timeout_s` seconds.
    """
    with Waiting(what, from_whom, timeout_s, member) as waiting:
        while not (found := poll()):
            waiting.check()
            time.sleep(poll_s)
        return found
