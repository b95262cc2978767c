"""A worker's draws: it asks the trajectory server for numbers and reports what became of them.

A draw is held from the answer that brings its number until the server has its group or its report.
Each request names the draws that are held, so an answer that was lost is given again.
"""

import asyncio
import contextlib
import glob
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atroposlib.envs.base import BaseEnv

from atropos_hpc.contracts.prompts import Draw, DrawAnswer, DrawRequest, Report, Reported, Seen
from atropos_hpc.rollout.prompt_stream import PromptStream
from atropos_hpc.rollout.rollout_failures import left_for_later
from atropos_hpc.runtime.run_dir import RunDir, numbered

log = logging.getLogger(__name__)

MOST = 4096  # numbers per request

Send = Callable[[DrawRequest], Awaitable[DrawAnswer | None]]


@dataclass(frozen=True)
class Drawer:
    """Who draws: `name` is the environment's in the run, `attempt` returns the run's.

    `label` is written into each group, in a run with several environments.
    """

    name: str
    member: str
    attempt: Callable[[], int]
    label: str | None = None


def attempt_of(run: RunDir) -> Callable[[], int]:
    """Return what tells the attempt of the run that this worker belongs to.

    It is the one in which the worker started. Workers of a job of their own go on when the
    trainer's job is requeued, and belong to the newest.
    """
    if run.config().launch.allocation == "split":
        return run.attempt
    started_in = run.attempt()
    return lambda: started_in


@dataclass
class Drawn:
    """A draw whose item is being rolled out."""

    draw: Draw
    sending: bool = False  # a group of it is on its way to the server
    accepted: bool = False  # the server has a group of it
    no_signal: bool = False  # its groups have equal scores


class PromptDraws:
    """The draws of one worker process. `send` posts a request; None: not answered, ask again."""

    def __init__(self, env: Any, drawer: Drawer, send: Send) -> None:
        self.stream = PromptStream(env)
        self.drawer, self._send = drawer, send
        self.worker = f"{drawer.member}/{uuid.uuid4().hex[:12]}"
        self.lowest = 0  # no lower number will be handed out
        self.closing = False  # what is cancelled from now on is handed out again
        self._serial = 0
        self._unanswered: DrawRequest | None = None
        self._held: set[int] = set()
        self._hand: list[int] = []  # held, and their items not taken yet
        self._reports: list[Reported] = []
        self._rollouts: dict[asyncio.Task[Any] | None, Drawn] = {}
        self._parked: list[tuple[Any, Drawn]] = []  # items in BaseEnv's backlog

    async def take(self, count: int) -> list[tuple[Any, Drawn]]:
        """Draw up to `count` prompts; fewer where the environment has no more for now."""
        await self.request_numbers(count - len(self._hand))
        taken: list[tuple[Any, Drawn]] = []
        while self._hand and len(taken) < count:
            number = self._hand[0]
            try:
                found = await self.stream.item(number)
            except LookupError as error:
                log.warning("cannot roll prompt %d of %s out: %s", number, self.drawer.name, error)
                self.finish(Drawn(Draw(self.drawer.name, self._hand.pop(0))), "failed")
                continue
            if found is None:
                break
            item, digest = found
            self._hand.pop(0)
            taken.append((item, Drawn(Draw(self.drawer.name, number, digest))))
        return taken

    async def request_numbers(self, want: int, always: bool = False) -> None:
        """Send what there is to report and take new numbers into the hand."""
        if want <= 0 and not self._reports and not always:
            return
        # One that was not answered is sent again as it was: the server may have journalled it.
        request = self._unanswered = self._unanswered or self._build(want)
        answer = await self._send(request)
        if answer is None:
            return
        self._unanswered = None
        self._reports = self._reports[len(request.reports) :]
        for _ in request.seen:
            self.stream.seen.popleft()
        self.lowest = answer.lowest
        self._held.update(answer.numbers)
        self._hand = sorted({*self._hand, *answer.numbers})

    async def report_last(self, patience_s: float) -> None:
        """Report what is left to report, at the end."""
        try:
            async with asyncio.timeout(patience_s):
                for _ in range(2):  # the first may be one that was not answered
                    await self.request_numbers(0)
        except (TimeoutError, RuntimeError) as error:
            log.warning("%d draws were not reported: %s", len(self._reports), error)

    def _build(self, want: int) -> DrawRequest:
        self._serial += 1
        return DrawRequest(
            stream=self.drawer.name,
            worker=self.worker,
            member=self.drawer.member,
            env_id=self.stream.env.env_id,
            attempt=self.drawer.attempt(),
            serial=self._serial,
            want=max(0, min(want, MOST)),
            held=sorted(self._held),
            reach=self.stream.reach,
            length=self.stream.length,
            reports=list(self._reports),
            seen=[Seen(number, digest) for number, digest in self.stream.seen],
        )

    # --- the life of a draw

    def start(self, rollout: asyncio.Task[Any], drawn: Drawn) -> None:
        """Note which task rolls the draw out."""
        self._rollouts[rollout] = drawn

    def current(self) -> Drawn | None:
        """Return the draw that the current task rolls out; None for an item of the backlog.

        Also None once the server has a group of it: it would take later ones, which an environment
        sends in a call of their own, for those of a worker that was believed lost.
        """
        drawn = self._rollouts.get(asyncio.current_task())
        return None if drawn is None or drawn.accepted else drawn

    def finish(self, drawn: Drawn, report: Report | None) -> None:
        """Note what became of a draw; None: the server has its group."""
        number = drawn.draw.number
        if number in self._held:
            self._held.discard(number)
            if report is not None:
                self._reports.append(Reported(number, report))

    def refuse(self, drawn: Drawn | None) -> None:
        """Note that none of a draw's groups may be sent."""
        if drawn is not None:
            drawn.sending = True
            self.finish(drawn, "refused")

    async def follow(self, drawn: Drawn | None, send: Awaitable[bool]) -> None:
        """Await the send of a draw's groups, and note whether the server took them."""
        report: Report | None = "failed"
        if drawn is not None:
            drawn.sending = True
        try:
            accepted = await send
            report = None if accepted else "refused"
            if drawn is not None:
                drawn.accepted = accepted
        finally:
            if drawn is not None:
                self.finish(drawn, report)

    def end(self, later: Sequence[Any], cancelled: bool) -> None:
        """Note that the current task's rollout has ended.

        If it sent nothing, the first item of `later` that is in BaseEnv's backlog goes on with its
        draw: the item itself, or what the environment made of it.
        """
        drawn = self._rollouts.pop(asyncio.current_task(), None)
        if drawn is None or drawn.sending or (cancelled and self.closing):
            return
        backlog = self.stream.env.backlog
        for item in later:
            if any(each is item for each in backlog):
                return self._parked.append((item, drawn))
        self.finish(drawn, "no_signal" if drawn.no_signal else "failed")

    def unpark(self, item: Any) -> Drawn | None:
        """Return the draw with which an item of the backlog goes on; None if it has none."""
        for at, (parked, drawn) in enumerate(self._parked):
            if parked is item:
                del self._parked[at]
                return drawn
        return None


class DrawingEnv(BaseEnv):
    """Comes before an environment class in the MRO: follows its draws and its checkpoints."""

    draws: PromptDraws
    iter: Any  # of environments that follow Atropos' convention
    curr_step: int
    wandb_prepend: Any
    _resumed = False  # the run has taken steps before
    _every = 0  # the learner's steps between two checkpoints; 0: none
    _saved_step = 0

    async def setup(self) -> None:
        """Set up with the random state that all workers of the environment share."""
        await self.draws.stream.random.run(super().setup())

    async def handle_env(self, item_uuid: str) -> Any:
        """Run one rollout, and note how its draw ended."""
        item, cancelled = self.running_items[item_uuid]["item"], False
        try:
            return await super().handle_env(item_uuid)
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            self.draws.end([item] if cancelled else left_for_later(), cancelled)

    async def handle_send_to_api(self, scored_data: Any, *args: Any, **kwargs: Any) -> Any:
        """Note whether the scores of all groups are equal, then send."""
        drawn = self.draws.current()
        if drawn is not None:
            groups = scored_data if isinstance(scored_data, list) else [scored_data]
            drawn.no_signal = all(map(_is_flat, groups))
        return await super().handle_send_to_api(scored_data, *args, **kwargs)

    # --- Atropos' checkpoints of environments: <checkpoint_dir>/env_checkpoints/<name>/step-N.json

    def take_over_checkpoints(self, registered: dict[str, Any]) -> None:
        """Take the interval of checkpoints from BaseEnv, before it sees it in this answer.

        BaseEnv saves none at an interval of 1, and misses some where its loop skips steps.
        """
        self._every, registered["checkpoint_interval"] = registered["checkpoint_interval"] or 0, -1
        self._saved_step = max(self._saved_step, registered["starting_step"] or 0)

    def save_if_due(self, step: int) -> None:
        """Save for the learner's last checkpoint up to `step`, unless that was done."""
        due = step // self._every * self._every if self._every > 0 else 0
        if due > self._saved_step:
            self._saved_step = due
            self.save_checkpoint(due)

    def save_checkpoint(self, step: int, data: Any = None) -> None:
        """Save what the environment saves, and beside it the position of its stream."""
        folder = f"{self.draws.drawer.name}.{self.draws.drawer.member}"
        path = self._checkpoints() / folder / f"step-{step}.json"
        try:
            with self._checkpoint_of(folder, step):
                super().save_checkpoint(step, data)
            if path.exists():
                position = path.with_suffix(".position")
                position.write_text(str(self.draws.stream.position))
        except Exception:  # of the environment; the run does not depend on it
            log.exception("the environment's checkpoint of step %d could not be saved", step)

    def load_checkpoint(self) -> None:
        """Leave it to `resume_stream`, which follows: BaseEnv asks for step `curr_step` only."""
        self._resumed = True

    async def resume_stream(self) -> None:
        """Load the newest checkpoint, of any worker, from which the next draw can be reached."""
        if not self._resumed:
            return
        await self.draws.request_numbers(0, always=True)
        stream, indexed = self.draws.stream, self.draws.stream.has_index()
        index = self.iter if indexed else None
        workers = self._checkpoints().glob(f"{glob.escape(self.draws.drawer.name)}.*")
        saved = [each for own in workers for each in numbered(own, "step-", ".json").items()]
        for step, path in sorted(saved, reverse=True):
            if step > self.curr_step:
                continue
            try:
                position = int(path.with_suffix(".position").read_text())
                json.loads(path.read_text())
            except (OSError, ValueError):  # a worker was killed while it wrote
                continue
            if stream.direct or indexed or position <= self.draws.lowest:
                with self._checkpoint_of(path.parent.name, step):
                    super().load_checkpoint()
                if indexed:
                    self.iter = index  # the ledger knows the position better
                elif not stream.direct:
                    stream.position = position
                log.info("loaded the environment's checkpoint %s", path)
                return

    @contextlib.contextmanager
    def _checkpoint_of(self, folder: str, step: int) -> Iterator[None]:
        """Have BaseEnv, which names files by these attributes, use this one."""
        before = self.wandb_prepend, self.curr_step
        self.wandb_prepend, self.curr_step = folder, step
        try:
            yield
        finally:
            self.wandb_prepend, self.curr_step = before

    def _checkpoints(self) -> Path:
        return Path(self.checkpoint_dir) / "env_checkpoints"


def _is_flat(group: Any) -> bool:
    """Return whether all scores of a group are equal."""
    try:
        return len({float(score) for score in group["scores"]}) == 1
    except (TypeError, ValueError, KeyError):
        return False
