"""The items of an environment by number: the n-th call of its own `get_next_item`, from 0.

All workers of an environment are seeded alike, so a number names the same item in each. Three ways
lead to a number:

    item_at(n)      an environment that has this method and `epoch_length`, as ours do
    env.iter = n    Atropos' convention, an index into `env.train` that get_next_item increments.
                    It is used where a probe shows that an item depends on the index alone
    calling         get_next_item for every item in between; the latest are kept, because another
                    worker may not come to deliver what it drew
"""

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import orjson
import xxhash

KEPT = 1024  # of the latest items, where the stream cannot go back
FAR = 64  # items to skip, from which on setting `iter` is tried
REPORTED = 32  # hashes of skipped items that are reported before each drawn one
WALK_S = 2.0  # without a break in which the worker reports that it lives
AT_ONCE = 256  # calls of get_next_item, between which the event loop gets its turn
ADDRESS = re.compile(r" at 0x[0-9a-f]+")

T = TypeVar("T")


class RandomState:
    """The state of the global generators (random, numpy.random) of one thread of execution."""

    def __init__(self) -> None:
        self._state = (random.getstate(), np.random.get_state())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchange the global state for this one."""
        outside = (random.getstate(), np.random.get_state())
        random.setstate(self._state[0])
        np.random.set_state(self._state[1])
        try:
            yield
        finally:
            self._state = (random.getstate(), np.random.get_state())
            random.setstate(outside[0])
            np.random.set_state(outside[1])

    def is_at(self, other: "RandomState") -> bool:
        """Return whether the two would draw the same numbers."""
        mine, others = self._state[1], other._state[1]
        return self._state[0] == other._state[0] and all(
            np.array_equal(a, b) for a, b in zip(mine, others, strict=True)
        )

    def copy(self) -> "RandomState":
        copied = RandomState()
        copied._state = self._state
        return copied

    def run(self, coroutine: Awaitable[T]) -> "_Steps[T]":
        """Await a coroutine with this state active while it runs, and not while it waits."""
        return _Steps(self, coroutine)


class _Steps(Awaitable[T]):
    def __init__(self, state: RandomState, inner: Awaitable[T]) -> None:
        self.state, self.inner = state, inner

    def __await__(self) -> Generator[Any, Any, T]:
        steps: Any = self.inner.__await__()
        value: Any = None
        raised: BaseException | None = None
        while True:
            try:
                with self.state.active():
                    waited = steps.send(value) if raised is None else steps.throw(raised)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            value = raised = None
            try:
                value = yield waited
            except BaseException as error:  # a cancellation, for the coroutine to handle
                raised = error


class PromptStream:
    """The items of one environment, of class BaseEnv, by number."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.random = RandomState()
        self.position = 0  # calls of get_next_item so far
        self.seen: deque[tuple[int, str]] = deque(maxlen=4 * REPORTED)  # hashes, not yet reported
        self._items: dict[int, Any] = {}
        self._indexed: bool | None = None  # whether `iter` may be set; None: not probed yet

    @property
    def direct(self) -> bool:
        """Return whether the environment gives items by number."""
        return hasattr(self.env, "item_at") and hasattr(self.env, "epoch_length")

    @property
    def length(self) -> int | None:
        """Return the number of items of an epoch, None if the environment does not tell it."""
        if self.direct:
            return int(self.env.epoch_length)
        return len(self.env.train) or None if self.has_index() else None

    @property
    def reach(self) -> int:
        """Return the lowest number that can still be reached."""
        if self.direct:
            return 0
        kept = next(iter(self._items), self.position)
        return min(kept, self._epoch_start()) if self._indexed else kept

    async def item(self, number: int) -> tuple[Any, str] | None:
        """Return an item and its hash; None if the environment has no further item for now, or if
        the way to it takes longer than WALK_S: call again.

        Raises LookupError for a number below `reach`.
        """
        if self.direct:
            item = self.env.item_at(number)
            return item, self._saw(number, item)
        if number in self._items:
            return self._items[number], item_hash(self._items[number])
        if number < self.position:
            if not (self._indexed and number >= self._epoch_start()):
                raise LookupError(f"item {number} is behind; the lowest is {self.reach}")
            self._set_index(number)
        deadline = time.monotonic() + WALK_S
        while self.position <= number:
            if time.monotonic() > deadline:
                return None
            far = number - self.position > FAR
            if far and await self._jump(number):
                continue
            one = far and self._indexed is not False  # the first of an epoch: then jump on
            steps = 1 if one else min(number + 1 - self.position, AT_ONCE)
            if not await self.random.run(self._call(steps, number)):
                return None
            await asyncio.sleep(0)
        return self._items[number], item_hash(self._items[number])

    async def _call(self, times: int, number: int) -> bool:
        """Call get_next_item on the way to a number. Return whether there was always an item."""
        for _ in range(times):
            item = await self.env.get_next_item()
            if item is None:
                return False
            self._keep(item, report=number - self.position <= REPORTED)
        return True

    def _keep(self, item: Any, report: bool) -> None:
        self._items[self.position] = item
        if report:
            self._saw(self.position, item)
        self.position += 1
        while len(self._items) > KEPT:
            del self._items[next(iter(self._items))]

    def _saw(self, number: int, item: Any) -> str:
        found = item_hash(item)
        self.seen.append((number, found))
        return found

    # --- Atropos' convention: `iter`, an index into `train`

    def has_index(self) -> bool:
        """Return whether the environment follows the convention, by its attributes."""
        index, train = getattr(self.env, "iter", None), getattr(self.env, "train", None)
        return type(index) is int and hasattr(train, "__len__")

    def _epoch_start(self) -> int:
        return self.position - self.env.iter % max(1, len(self.env.train))

    def _set_index(self, number: int) -> None:
        self._items.clear()
        self.env.iter += number - self.position
        self.position = number

    async def _jump(self, number: int) -> bool:
        """Skip items by setting the index, at most to the last of this epoch."""
        if self._indexed is None:
            await self._probe()
        if not self._indexed:
            return False
        taken = self.env.iter % len(self.env.train)
        if taken == 0:  # the next call may set it to 0, and shuffle
            return False
        to_last = len(self.env.train) - 1 - taken
        skipped = min(number - REPORTED - self.position, to_last)
        if skipped <= 0:
            return False
        self._set_index(self.position + skipped)
        return True

    async def _probe(self) -> None:
        """Find out whether an item depends on the index alone.

        A call must increment the index by one, change no other attribute and use no random numbers,
        and the same index must give the same item again.
        """
        self._indexed = False
        if not self.has_index():
            return
        index, last = self.env.iter, len(self.env.train) - 1
        if index % max(1, last + 1) == last:
            self._indexed = None  # the last call of an epoch may do more: probe at the next one
            return
        before, random_before = self._attributes(), self.random.copy()
        if not await self.random.run(self._call(1, self.position)):
            return
        regular = self._attributes() == before and self.random.is_at(random_before)
        if not (regular and self.env.iter == index + 1):
            return
        number = self.position - 1
        self.env.iter = index
        again = await self.random.run(self.env.get_next_item())
        if again is not None and item_hash(again) == item_hash(self._items[number]):
            self._indexed = True
        else:  # it goes on by something else than the index: this was the next item
            self.env.iter = index + 2
            if again is not None:
                self._keep(again, report=True)

    def _attributes(self) -> dict[str, int]:
        return {name: id(value) for name, value in vars(self.env).items() if name != "iter"}


def item_hash(item: Any) -> str:
    """Return a hash of an item that is the same in all processes for equal items."""
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return xxhash.xxh3_64_hexdigest(orjson.dumps(_canonical(item), option=options))


def _canonical(value: Any, depth: int = 0) -> Any:
    """Make plain JSON of a value: sets sorted, objects as their class and attributes."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)
    if depth > 20:
        return type(value).__qualname__
    if isinstance(value, dict):
        return {str(key): _canonical(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(each, depth + 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((_canonical(each, depth + 1) for each in value), key=orjson.dumps)
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if hasattr(value, "tolist"):
        return value.tolist()
    if callable(getattr(value, "model_dump", None)):
        return _canonical(value.model_dump(), depth + 1)
    if getattr(value, "__dict__", None) and not callable(value):
        return [type(value).__qualname__, _canonical(vars(value), depth + 1)]
    return ADDRESS.sub("", repr(value))
