"""Why rollouts send no group: each one is classified and counted, and a worker gives up in time.

BaseEnv (atroposlib 0.4.0) logs a rollout that ends early and forgets it. These are all the places,
and what each is counted as:

    where                      what                                                   counted as
    collect_trajectories       raises, calls sys.exit, or returns no (group, backlog) failed
    postprocess_histories      raises                                                 failed
    either                     returns None or an empty list                          nothing
    env_manager                cancels a rollout after `worker_timeout`               failed
    handle_send_to_api         the group's size is not group_size                     malformed
                               all scores are equal                                   equal_scores
                               a sequence has max_token_len tokens or more            too_long
                               raises                                                 failed
    _send_scored_data_to_api   the group is malformed, or the server refuses it       refused

Equal scores are no failure: the environment works, and the group would train nothing. A worker
whose groups are all lost otherwise gives up (`Losses.verdict`) with its last error.
"""

import contextlib
import contextvars
import inspect
import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv

from atropos_hpc.contracts.members import LossReason
from atropos_hpc.rollout.saved_answers import forget_rollout
from atropos_hpc.rollout.stamping import record_generations
from atropos_hpc.runtime.error_text import describe_error

log = logging.getLogger(__name__)

SHOWN_REASONS = 3  # in the member file
KEPT_REASONS = 200  # that are told apart
# An environment may return nothing for a group without signal, too, so that takes more patience.
NOTHING_PATIENCE = 8
PAUSE_S, LONGEST_PAUSE_S = 0.02, 5.0  # before new rollouts: per failure in a row, and at most


class Loss(StrEnum):
    """What became of a group that was not sent, or not accepted."""

    FAILED = "failed"
    NOTHING = "nothing"
    MALFORMED = "malformed"
    TOO_LONG = "too_long"
    EQUAL_SCORES = "equal_scores"
    REFUSED = "refused"


class EnvironmentExit(Exception):
    """The environment called sys.exit."""


@dataclass
class Rollout:
    """One rollout, from handle_env to its send."""

    began: float
    error: BaseException | None = None  # that ended it
    request_error: BaseException | None = None  # of its last request that failed
    returned: str | None = None  # what collect_trajectories returned in place of a group
    sent: list[Any] = field(default_factory=list)  # groups
    backlog: Sequence[Any] = ()  # items that collect_trajectories returned for later
    lost: list[tuple[Loss, str]] = field(default_factory=list)


_rollout: contextvars.ContextVar[Rollout | None] = contextvars.ContextVar("rollout", default=None)


def note_sent(groups: Sequence[Any]) -> list[Any]:
    """Note that BaseEnv has handed these groups over to be sent; return those that are new."""
    forget_rollout()
    if (rollout := _rollout.get()) is None:
        return list(groups)
    new = [group for group in groups if not _is_among(group, rollout.sent)]
    rollout.sent += new
    return new


def left_for_later() -> Sequence[Any]:
    """Return the items that the surrounding rollout has put into BaseEnv's backlog."""
    rollout = _rollout.get()
    return () if rollout is None else rollout.backlog


def _is_among(group: object, others: Sequence[object]) -> bool:
    return any(group is each for each in others)


def note_request_error(error: BaseException) -> None:
    """Remember that a request failed: an environment may catch the error and return nothing."""
    if (rollout := _rollout.get()) is not None:
        rollout.request_error = error


@contextlib.contextmanager
def stage() -> Iterator[None]:
    """Note what an environment's method raises. sys.exit becomes an exception that BaseEnv catches,
    as it would end the whole worker."""
    rollout = _rollout.get()
    try:
        yield
    except SystemExit as error:
        if rollout is not None:
            rollout.error = error
        raise EnvironmentExit(describe_error(error)) from error
    except Exception as error:
        if rollout is not None and not isinstance(error, EnvironmentExit):
            rollout.error = error
        raise
    if rollout is not None:
        rollout.error = None  # of a nested call, which the environment has handled


@dataclass(frozen=True)
class Patience:
    """When a worker gives up: after so many lost groups in a row, over so many seconds."""

    groups: int
    seconds: float


@dataclass
class Losses:
    """The lost groups of one worker. Times are monotonic seconds.

    `name` names the environment in messages; `files` are the files of its code, where errors are
    located.
    """

    name: str
    patience: Patience | None = None  # None: never give up
    files: Collection[str] = ()
    clock: Callable[[], float] = time.monotonic
    sent: int = 0
    counts: Counter[Loss] = field(default_factory=Counter)
    _reasons: Counter[tuple[Loss, str]] = field(default_factory=Counter)
    _texts: dict[tuple[Loss, str], str] = field(default_factory=dict)  # the last of each reason
    # lost since a group was good
    _in_a_row: deque[tuple[Loss, str]] = field(default_factory=lambda: deque(maxlen=1 << 16))
    _failing_since: float = 0.0
    _last_good: float = float("-inf")
    _paused_until: float = float("-inf")

    @property
    def refused(self) -> int:
        """Return how many groups the trajectory server refused, or would."""
        return self.counts[Loss.REFUSED]

    @property
    def unsent(self) -> int:
        """Return how many rollouts and groups were not sent."""
        return self.counts.total() - self.refused

    def state(self) -> dict[str, Any]:
        """Return the fields of the member file."""
        by_kind = {str(kind): n for kind, n in self.counts.items() if kind is not Loss.REFUSED}
        return {
            "sent": self.sent,
            "refused": self.refused,
            "unsent": self.unsent,
            "unsent_by": by_kind,
            "reasons": [
                LossReason(kind=str(key[0]), count=count, text=self._texts[key])
                for key, count in self._reasons.most_common(SHOWN_REASONS)
            ],
        }

    # --- rollouts

    @contextlib.contextmanager
    def rollout(self, timeout_s: float) -> Iterator[Rollout]:
        """Account for the rollout of this block, and swallow its exceptions. It is cancelled after
        `timeout_s` seconds; a rollout that is cancelled at another time is not counted."""
        rollout = Rollout(self.clock())
        token = _rollout.set(rollout)
        try:
            yield rollout
        except Exception as error:  # not caught by BaseEnv
            rollout.error = rollout.error or error
            self._ended(rollout)
        except BaseException as error:  # cancelled
            if not 0 < timeout_s < self.clock() - rollout.began:
                raise
            where = describe_error(TimeoutError().with_traceback(error.__traceback__), self.files)
            text = (
                f"it took more than {timeout_s:.0f} s (the environment's worker_timeout): {where}"
            )
            rollout.lost, rollout.error = [(Loss.FAILED, text)], None
            self._ended(rollout)
            raise
        else:
            self._ended(rollout)
        finally:
            _rollout.reset(token)

    def _ended(self, rollout: Rollout) -> None:
        if rollout.error is not None:
            self.lose(Loss.FAILED, describe_error(rollout.error, self.files), rollout)
        elif not rollout.sent and not rollout.lost:
            self.lose(Loss.NOTHING, self._nothing(rollout), rollout)
        for kind, text in rollout.lost:
            self.lose(kind, text, rollout)

    def _nothing(self, rollout: Rollout) -> str:
        text = rollout.returned or "no group was left to send"
        if rollout.request_error is not None:
            error = describe_error(rollout.request_error, self.files)
            text += f"; before, a request of it failed: {error}"
        return text

    def accept(self, groups: int) -> None:
        """Count groups that the trajectory server has."""
        self.sent += groups
        self._good()

    def lose(self, kind: Loss, text: str, rollout: Rollout | None = None) -> None:
        """Count a lost group. `rollout` gives the time at which it began, and its error."""
        now = self.clock()
        key = (kind, _without_numbers(text))
        if key not in self._reasons and len(self._reasons) >= KEPT_REASONS:
            key = (kind, "other")
        self.counts[kind] += 1
        self._reasons[key] += 1
        self._texts[key] = text if key[1] != "other" else "other reasons"
        if kind is Loss.EQUAL_SCORES:
            return self._good()
        if not self._in_a_row:
            began = now if rollout is None else rollout.began
            self._failing_since = max(began, self._last_good)
        self._in_a_row.append((kind, text))
        self._paused_until = now + min(LONGEST_PAUSE_S, PAUSE_S * len(self._in_a_row))
        times = self._reasons[key]
        if times <= 3 or not times & (times - 1):  # the first ones, then at each doubling
            error = rollout.error if rollout is not None and times == 1 else None
            log.error("%s: a rollout gave no group (%s; %d so far): %s",
                      self.name, kind, times, text, exc_info=error)  # fmt: skip

    def _good(self) -> None:
        self._in_a_row.clear()
        self._last_good = self.clock()

    # --- what follows

    def pausing(self) -> bool:
        """Whether no new rollout should start yet, so that failing ones do not use up prompts."""
        return self.clock() < self._paused_until

    def verdict(self) -> str | None:
        """Return why this worker gives up, None while it goes on."""
        row, patience = self._in_a_row, self.patience
        if patience is None or not row:
            return None
        kinds = Counter(kind for kind, _ in row)
        certain = len(row) - kinds[Loss.NOTHING] + kinds[Loss.NOTHING] / NOTHING_PATIENCE
        failing_s = self.clock() - self._failing_since
        if certain < patience.groups or failing_s < patience.seconds:
            return None
        kind, text = row[-1]
        wanted = _without_numbers(text)
        same = sum(_without_numbers(each) == wanted for _, each in row)
        which = "each time" if same == len(row) else f"{same} of {len(row)} times"
        if kind is Loss.REFUSED:
            text = f"the group was refused: {text}"
        return (
            f"{self.name}: the last {len(row)} rollouts, over {failing_s:.0f} s, gave no group that"
            f" can be trained on; {which}: {text}"
        )


def _without_numbers(text: str) -> str:
    """Return what two reasons have in common that differ in their numbers only."""
    return re.sub(r"\d+", "#", text)


def why_unsent(group: Any, group_size: int, longest: int, equal_refused: bool) -> tuple[Loss, str]:
    """Return why BaseEnv's handle_send_to_api left out a group.

    `longest`: tokens of the longest sequence that is sent; `equal_refused`: groups of equal scores
    are not.
    """
    if group is None:
        return Loss.NOTHING, "the list of groups contains None"
    tokens, scores = group.get("tokens"), group.get("scores")
    if tokens is None or len(tokens) != group_size:
        found = "no tokens" if tokens is None else f"{len(tokens)} sequences"
        return Loss.MALFORMED, f"a group has {found}, not group_size={group_size}"
    if equal_refused and scores is not None and len(set(scores)) == 1:
        return Loss.EQUAL_SCORES, "all scores of the group are equal"
    if longest > 0 and (most := max(map(len, tokens))) > longest:
        return Loss.TOO_LONG, f"a sequence has {most} tokens, more than model.max_length={longest}"
    return Loss.NOTHING, "handle_send_to_api did not send the group"


def _definition(method: Any) -> str:
    code = inspect.unwrap(getattr(method, "__func__", method)).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def files_of(environment: type[Any]) -> set[str]:
    """Return the files of an environment's class and of its bases, except BaseEnv's."""
    files = set()
    for base in environment.__mro__:
        with contextlib.suppress(TypeError, OSError):
            files.add(str(Path(inspect.getfile(base)).resolve()))
    return {file for file in files if "/atroposlib/envs/base" not in file}


class AccountedRollouts(BaseEnv):
    """Accounts for every rollout of an environment in `losses`. It comes before the environment's
    class in the MRO: its `super()` is that class."""

    losses: Losses

    async def handle_env(self, item_uuid: str) -> Any:
        """Run one rollout, recording its generations and what becomes of it."""
        with self.losses.rollout(self.config.worker_timeout), record_generations():
            return await super().handle_env(item_uuid)
        self.running_items.pop(item_uuid, None)  # it raised
        return None

    async def collect_trajectory(self, item: Any) -> Any:
        """Sample one sequence, noting errors."""
        with stage():
            return await super().collect_trajectory(item)

    async def collect_trajectories(self, item: Any) -> Any:
        """Sample a group, noting errors."""
        with stage():
            found = await super().collect_trajectories(item)
            method = f"collect_trajectories ({_definition(super().collect_trajectories)})"
            if not isinstance(found, tuple | list) or len(found) != 2:
                raise TypeError(f"{method} returned {type(found).__name__}, not (group, backlog)")
            if (rollout := _rollout.get()) is not None:
                rollout.backlog = found[1] or ()
                if not found[0]:
                    rollout.returned = f"{method} returned {found[0]!r}"
            return found[0], found[1] or []

    async def postprocess_histories(self, trajectories: Any) -> Any:
        """Postprocess a group, noting errors."""
        with stage():
            return await super().postprocess_histories(trajectories)

    async def handle_send_to_api(
        self, scored_data: Any, item: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Send what may be sent, and note why the rest is not."""
        with stage():
            await super().handle_send_to_api(scored_data, item, *args, **kwargs)
        if (rollout := _rollout.get()) is None:
            return
        for group in scored_data if isinstance(scored_data, list) else [scored_data]:
            if not _is_among(group, rollout.sent):
                size = ((group or {}).get("group_overrides") or {}).get("group_size")
                size = self.config.group_size if size is None else size
                equal_refused = self.config.ensure_scores_are_not_same
                why = why_unsent(group, size, self.max_token_len - 1, equal_refused)
                rollout.lost.append(why)
