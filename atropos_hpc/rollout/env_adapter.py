"""Any Atropos environment class, unmodified, as a member of a run.

`as_member(EnvClass)` gives a subclass that
  - generates through VllmServer, over all of the run's servers;
  - stamps each group with the policy versions behind it;
  - starts no rollout that would be too stale when its batch is trained on (`room`);
  - posts with the run's token, and outlives restarts of the trajectory server.
What these methods do not mention is BaseEnv's, or the environment's own.
"""

import asyncio
import logging
import math
import time
import uuid
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from atroposlib.envs.base import BaseEnv

from atropos_hpc.contracts.members import EnvironmentState, Wait
from atropos_hpc.rollout.server_pool import Generation, Pool, record_generations, recorded
from atropos_hpc.rollout.vllm_client import VllmServer
from atropos_hpc.runtime.http import TrajectoryLink
from atropos_hpc.runtime.membership import Member

log = logging.getLogger(__name__)

HELD_S = 1.0  # an environment that could start nothing for so long is shown as waiting
FULL = 2**31  # sequences queued
REPORT_S = 1.0  # between two updates of the member's figures
RATE_S = 10.0  # over which tokens per second are counted


class Limits(Protocol):
    """The run's `staleness.max`."""

    max: int


@dataclass
class Counts:
    """What became of this member's groups."""

    sent: int = 0
    refused: int = 0  # by the trajectory server: malformed
    unsent: int = 0  # rollouts that sent nothing: equal scores, too long, or failed


def room(
    served: int | None,
    formed: int,
    staleness: int,
    batch_size: int,
    queued: int,
    under_way: int,
    others: int,
    group_size: int,
    part: float,
    own_queued: int = 0,
    share: int = 0,
    shares_of_others: Iterable[tuple[int, int]] = (),
) -> int:
    """How many more groups this worker may start now, >= 0.

    Batch k is trained on by the learner at version k. What is started now is sampled by version `served` or a later one, so it may go into
    batches up to served + staleness. `formed` is the next batch to be formed; before it come `queued` sequences, then those that the
    others and this worker generate. (`others`, `under_way`: sequences.)

    Room for a part of a group is room for one: groups of other sizes may have left it, and a batch must not wait for ever. All workers
    see the same room at once; so each takes no more than its `part`, between 0 and 1, rounded up.

    `share` of each batch, in sequences, is this worker's at least, and its room for that is no other's: what the others lack of their
    own, by `shares_of_others` (share, queued and under way), is left to them. The next batch waits for the share; so room for it there is
    even where groups of others, started before this worker was known, fill all batches to come.
    """
    if served is None or (batches := served + staleness + 1 - formed) <= 0:
        return 0

    def lacks(share: int, has: int, batches: int) -> int:
        return max(0, share * batches - has)

    window = batches * batch_size - queued
    left = (
        window
        - others
        - under_way
        - sum(lacks(their, has, batches) for their, has in shares_of_others)
    )
    mine = math.ceil(window * part / group_size - 1e-9) * group_size - under_way
    more = max(
        min(left, max(mine, lacks(share, own_queued + under_way, batches))),
        lacks(share, own_queued + under_way, 1),
    )
    return max(0, -(-more // group_size))


class RunEnvironment(BaseEnv):
    """Goes before an environment class in the order of resolution: its `super()` is that class."""

    server_cls = VllmServer
    env_id: int

    def __init__(
        self,
        config: Any,
        server_configs: Any,
        *,
        member: Member[EnvironmentState],
        token: str,
        staleness: Limits,
        called: str | None = None,
    ) -> None:
        super().__init__(config, server_configs, slurm=False)
        self.pool: Pool = self.server.servers[0].pool
        self.link = TrajectoryLink(
            self._trajectory_server,
            token,
            lambda what: self._wait_for(what, "the trajectory server"),
        )
        self.member, self.counts, self.staleness = member, Counts(), staleness
        self._token = token
        self.called = called  # written into each group, where a run has several environments
        self._losses_seen = 0
        self._sends: set[asyncio.Task[None]] = set()
        self._senders: set[asyncio.Task[Any] | None] = (
            set()
        )  # rollouts that have come to their send
        self._early: asyncio.Task[None] | None = None
        self._looping = False
        self._held_since: float | None = None
        self._reported = 0.0
        self._counted = deque(
            [(time.monotonic(), 0)]
        )  # (when, tokens generated by then), RATE_S back

    # --- pacing

    async def get_status(self) -> None:
        """BaseEnv's loop asks this ten times a second. The first time, it takes over from `_start_early`."""
        if self._early is not None:
            self._looping = True
            await self._early
            self._early = None
        await self._refresh()

    async def _start_early(self) -> None:
        """BaseEnv sleeps 5 s between registering and its loop, for servers to come up; here they are up. So begin without it."""
        while not self._looping:
            await self._refresh()
            if len(self.workers) < self.max_num_workers:
                await self.add_train_workers()
            await asyncio.sleep(0.1)

    async def _refresh(self) -> None:
        """Ask for the status, registering again if need be, and turn it into what BaseEnv's own formula makes `room` of."""
        in_flight = len(self.workers) * self.config.group_size
        status = await self._ask_status(in_flight)
        self.status_dict = status
        if (
            self.config.max_num_workers == -1
        ):  # upstream counts its server objects; there is one, for many servers
            self.max_num_workers = self.config.max_num_workers_per_node * max(
                1, len(self.pool.servers)
            )
        await self.server.update_weight(status["env_weight"])
        if (
            "formed" in status
        ):  # our own trajectory server's; upstream's leaves BaseEnv to its own numbers
            self._pace(status)
        self._report()

    def _pace(self, status: dict[str, Any]) -> None:
        self.config.batch_size = status["batch_size"]
        served, formed, group_size = (
            self.pool.served_version(),
            status["formed"],
            self.config.group_size,
        )
        more = room(
            served=served, formed=formed, staleness=self.staleness.max, batch_size=status["batch_size"],
            queued=status["queued_sequences"], others=status["others_in_flight"], under_way=len(self.workers) * group_size,
            group_size=group_size, part=status["env_weight"],
            own_queued=status["own_queued"], share=status["share"], shares_of_others=status["shares_of_others"],
        )  # fmt: skip
        # BaseEnv lets so many rollouts run: max_batches_offpolicy * derived_batch_size // group_size - queue_size, and cancels what
        # exceeds it. This queue_size makes that the ones that run already, and `more`. Below zero is as good as any.
        limit = self.config.max_batches_offpolicy * self.derived_batch_size // group_size
        status["queue_size"] = limit - len(self.workers) - more
        status["self_queue_size"] = (
            FULL  # else a minimum allocation would add rollouts beyond these
        )
        self._show_wait(more, served, formed)

    def _show_wait(self, more: int, served: int | None, formed: int) -> None:
        if more or self.workers:
            self._held_since = None
            self._wait_for(None, "")
            return
        now = time.time()
        self._held_since = self._held_since or now
        if now - self._held_since < HELD_S:
            return
        needed = formed - self.staleness.max
        if served is None:
            what, whom = "a vLLM server", "the node agents"
        elif served < needed:
            what, whom = (
                f"policy version {needed}, served by all (now {served})",
                "the learner and the node agents",
            )
        else:
            what, whom = "room for more groups", "the learner"
        self._wait_for(what, whom, self._held_since)

    def _wait_for(self, what: str | None, whom: str, since: float | None = None) -> None:
        """Show what this member waits for; None: for nothing."""
        self.member.show_wait(Wait(what, whom, since or time.time()) if what else None)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_S:
            return
        self._reported = now
        figures = {**asdict(self.counts), "in_flight": len(self.workers), "state": "generating" if self.workers else "idle",
                   "tokens_per_s": self._tokens_per_s(now)}  # fmt: skip
        self.member.update_if_changed(**figures)

    def _tokens_per_s(self, now: float) -> float:
        """Generated by this worker over the last RATE_S seconds."""
        self._counted.append((now, self.pool.generated))
        while len(self._counted) > 2 and now - self._counted[1][0] > RATE_S:
            self._counted.popleft()
        since, before = self._counted[0]
        return round((self.pool.generated - before) / (now - since), 1)

    # --- the trajectory server's calls

    async def _register_env(self) -> dict[str, Any]:
        """One attempt to register. `member` lets our server know a member that comes back; upstream's passes it over."""
        config = self.config
        body = {
            "max_token_length": config.max_token_length,
            "desired_name": config.wandb_name,
            "weight": config.inference_weight,
            "min_batch_allocation": config.min_batch_allocation,
            "group_size": config.group_size,
            "member": self.member.name,
        }
        status, answer = await self.link.call("POST", "/register-env", body)
        if status != 200:
            raise RuntimeError(
                f"the trajectory server refused to register this environment with {status}: {str(answer)[:500]}"
            )
        self._wait_for(
            None if answer.get("status") == "success" else "the run's first request for a batch",
            "the learner",
        )
        return dict(answer)

    async def get_server_info(self) -> None:
        """BaseEnv asks this once, registered and just before its loop."""
        await self._learn_batch_size()
        self.pool.watch()
        self._early = asyncio.create_task(self._start_early())

    async def _learn_batch_size(self) -> None:
        _, answer = await self.link.call("GET", "/info")
        if answer["batch_size"] != -1:
            self.config.batch_size = answer["batch_size"]
        if answer["max_token_len"] != -1:
            self.max_token_len = answer["max_token_len"]
        if self.config.group_size > self.config.batch_size:
            raise ValueError(
                f"environment.group_size={self.config.group_size} is more than algorithm.batch_size={self.config.batch_size}: "
                "no batch could hold a group"
            )

    async def _ask_status(self, in_flight: int) -> dict[str, Any]:
        """/status-env; registers again when the server was away or no longer knows us."""
        while True:
            body = {"env_id": self.env_id, "in_flight": in_flight}
            status, answer = await self.link.call("GET", "/status-env", body, retry_500=False)
            if status == 200 and "env_weight" in answer and self.link.losses == self._losses_seen:
                return dict(answer)
            losses = self.link.losses
            answer = await self._register_env()
            if answer.get("status") == "success":
                log.info("registered again: env_id %s -> %s", self.env_id, answer["env_id"])
                self.env_id, self._losses_seen = answer["env_id"], losses
                await self._learn_batch_size()
            else:
                log.warning("waiting to register again: %s", answer.get("status"))
                await asyncio.sleep(1)

    def _trajectory_server(self) -> str | None:
        """Where the trajectory server is now. Also told to the environment, for the calls that it makes by itself."""
        url = self.pool.trajectory_server()
        if url is not None:
            parts = urlsplit(url)
            self.config.rollout_server_url = urlunsplit(
                parts._replace(netloc=f"atropos:{self._token}@{parts.netloc}")
            )
        return url

    # --- stamping: one handle_env is one group's life, in one task: collect, postprocess, send

    async def handle_env(self, item_uuid: str) -> Any:
        task = asyncio.current_task()
        try:
            with record_generations():
                return await super().handle_env(item_uuid)
        finally:
            self.counts.unsent += task not in self._senders
            self._senders.discard(task)

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        """Called last in a group's life. The send is a task of its own: BaseEnv may cancel its workers, but not what is done."""
        for group in scored_data if isinstance(scored_data, list) else [scored_data]:
            stamp(group, recorded(), self.called)
        self._senders.add(asyncio.current_task())
        send = asyncio.create_task(self._send(scored_data))
        self._sends.add(send)
        send.add_done_callback(self._sends.discard)
        await asyncio.shield(send)

    async def _send(self, scored_data: Any) -> None:
        """Post, but only while registered: upstream's server is poisoned by a post that precedes its trainer's /register."""
        groups = scored_data if isinstance(scored_data, list) else [scored_data]
        path = "/scored_data_list" if isinstance(scored_data, list) else "/scored_data"
        since = time.monotonic()
        while True:
            while (
                self.link.losses != self._losses_seen
                and time.monotonic() - since < self.link.patience_s
            ):
                await asyncio.sleep(0.2)  # get_status registers again
            for group in groups:
                group["env_id"] = getattr(self, "env_id", None)
            try:
                status, answer = await self.link.call("POST", path, scored_data, once=True)
                break
            except TimeoutError:
                if time.monotonic() - since > self.link.patience_s:
                    raise
                await asyncio.sleep(0.5)
        if status >= 400:
            self.counts.refused += len(groups)
            log.error("trajectory server refused a group with %d: %s", status, str(answer)[:500])
        else:
            self.counts.sent += len(groups)

    async def leave(self) -> None:
        """Stop generating, wait for the sends under way, say goodbye, close the connections."""
        await cancelled(
            [task for task in (self._early, *self.workers, *self.eval_workers) if task is not None]
        )
        await asyncio.gather(*self._sends, return_exceptions=True)
        self.link.patience_s = min(self.link.patience_s, 2.0)
        try:
            if getattr(self, "env_id", None) is not None:
                await self.link.call("POST", "/disconnect-env", {"env_id": self.env_id})
        except TimeoutError as error:
            log.warning("%s", error)
        await self.link.close()
        await self.pool.close()


async def cancelled(tasks: list["asyncio.Task[Any]"]) -> None:
    """Cancel these tasks and wait for them to end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def as_member(environment: type[BaseEnv]) -> type[Any]:
    """The class of this environment as a member of a run."""
    return type(
        f"{environment.__name__}Member",
        (RunEnvironment, environment),
        {"__doc__": environment.__doc__},
    )


def stamp(group: dict[str, Any], seen: list[Generation], environment: str | None = None) -> None:
    """Write generation_params.{group_id, environment, policy_versions, temperature}.

    Versions are [oldest, newest] per sequence, or None where nothing was generated.

    A sequence gets the versions of the generations whose tokens it holds. One that holds none of them (the environment tokenized the
    text anew, and got other ids) gets the range of the whole group: its oldest is never newer than the truth. The temperature is that of
    all its generations, if they have one in common and the environment has not said it itself: log-probs are of the policy at it.
    """
    params = dict(group.get("generation_params") or {})
    params["group_id"] = uuid.uuid4().hex
    params["policy_versions"] = None
    if environment is not None:
        params["environment"] = environment
    if seen:
        everything = span([g.versions for g in seen])
        outputs = [(array("i", g.tokens).tobytes(), g.versions) for g in seen if g.tokens]
        ranges = []
        for tokens in group["tokens"]:
            sequence = array("i", [int(t) for t in tokens]).tobytes()
            ranges.append(
                span([versions for output, versions in outputs if aligned_in(output, sequence)])
                or everything
            )
        params["policy_versions"] = ranges
        if len(temperatures := {g.temperature for g in seen}) == 1:
            params.setdefault("temperature", *temperatures)
    group["generation_params"] = params


def span(ranges: list[tuple[int, int]]) -> list[int] | None:
    """[oldest, newest] over all, or None of none."""
    return [min(r[0] for r in ranges), max(r[1] for r in ranges)] if ranges else None


def aligned_in(needle: bytes, haystack: bytes, width: int = array("i").itemsize) -> bool:
    """Whether `needle` lies in `haystack` at a multiple of `width`."""
    at = haystack.find(needle)
    while at % width and at != -1:
        at = haystack.find(needle, at + 1)
    return at != -1
