"""Any Atropos environment class, unmodified, as a member of a run.

`as_member(EnvClass)` returns a subclass that
  - generates through VllmServer, over all of the run's vLLM servers;
  - stamps each group with the policy versions that produced it;
  - starts as many rollouts as the trajectory server's quota allows;
  - posts groups as binary records, with the run's token, and survives restarts of the server;
  - sends what the environment logs for training to the run's metrics.
Everything else is BaseEnv's (atroposlib 0.4.0) or the environment's own.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec
import orjson
from atroposlib.envs.base import BaseEnv

from atropos_hpc.contracts import messages
from atropos_hpc.contracts.group import encode_group, group_bytes
from atropos_hpc.contracts.members import EnvironmentState, Wait
from atropos_hpc.contracts.prompts import DrawAnswer
from atropos_hpc.contracts.scored_group import JsonObject, RequestError, ScoredGroup
from atropos_hpc.contracts.wal_record import CONTENT_TYPE, Record
from atropos_hpc.rollout.env_metrics import LoggedEnvironment, Rate
from atropos_hpc.rollout.environment_process import GaveUp
from atropos_hpc.rollout.prompt_draws import Drawer, DrawingEnv, Drawn, PromptDraws
from atropos_hpc.rollout.rollout_failures import AccountedRollouts, Loss, Losses, note_sent
from atropos_hpc.rollout.sampling_support import complete_group
from atropos_hpc.rollout.server_pool import Pool
from atropos_hpc.rollout.vllm_client import VllmServer
from atropos_hpc.runtime.http import HttpClient, Request
from atropos_hpc.runtime.membership import Member

log = logging.getLogger(__name__)

IDLE_S = 0.5  # without any quota, between two reports, unless something changes
SHOW_WAIT_S = 1.0  # without a rollout, before a worker shows what it waits for
REPORT_S = 1.0  # between two updates of the member file
RETRY_S = 0.5
LEAVE_PATIENCE_S = 2.0  # for /disconnect-env at the end

M = TypeVar("M", bound=msgspec.Struct)


class RunEnvironment(AccountedRollouts, DrawingEnv):
    """Comes before an environment class in the MRO: its `super()` is that class."""

    server_cls = VllmServer
    env_id: int
    on_turn: Callable[[], None] = staticmethod(lambda: None)  # called as long as BaseEnv gets on

    def __init__(
        self,
        config: Any,
        server_configs: Any,
        *,
        member: Member[EnvironmentState],
        token: str,
        losses: Losses,
        drawer: Drawer,
    ) -> None:
        super().__init__(config, server_configs, slurm=False)
        self.pool: Pool = self.server.servers[0].pool
        self._rollout = self.pool.run.config().rollout
        self._saved = self.pool.save_answers()
        self.http = HttpClient(self._trajectory_server, token, member=member)
        self.member, self.losses = member, losses
        self.draws = PromptDraws(
            self, drawer, lambda request: self._call("POST", "/draws", request, DrawAnswer)
        )
        self.label = drawer.label
        self.quota: messages.Quota | None = None  # None: Atropos' own server, which computes none
        self._token = token
        self._outages_seen = 0
        self._sends: set[asyncio.Task[None]] = set()
        self._early: asyncio.Task[None] | None = None
        self._looping = self._exhausted = False
        self._idle_since: float | None = None
        self._reported = 0.0
        self._rate = Rate()

    # --- pacing

    async def get_status(self) -> None:
        """Refresh the status. BaseEnv's loop calls this, at most ten times a second."""
        if self._early is not None:
            self._looping = True
            await self._early
            self._early = None
        # Without a quota, wait for what may bring one: a new version, the end of a rollout.
        await self.pool.await_change(IDLE_S if self._exhausted else 0)
        await self._refresh()

    async def _start_early(self) -> None:
        """Start rollouts while BaseEnv sleeps 5 s for servers to come up, which they have here."""
        while not self._looping:
            await self._refresh()
            if len(self.workers) < self.max_num_workers:
                await self.add_train_workers()
            await asyncio.sleep(0.02)
            await self.pool.await_change(0.08)

    async def _refresh(self) -> None:
        """Report to the trajectory server and take its status and quota, registering if needed."""
        self.on_turn()
        status = await self._request_status()
        self.status_dict = msgspec.structs.asdict(status)  # BaseEnv reads it as a dict
        self.quota = status.quota
        self.save_if_due(status.current_step)
        if status.batch_size != -1:
            self.config.batch_size = status.batch_size
        if self.config.max_num_workers == -1:
            # BaseEnv counts server objects; here one stands for all servers.
            servers = max(1, len(self.pool.servers))
            self.max_num_workers = self.config.max_num_workers_per_node * servers
        await self.server.update_weight(status.env_weight)
        if self.quota is not None:
            self._show_idle(self.quota)
            self._exhausted = not self.quota.groups
            if self.losses.pausing():
                self.quota.groups = 0
        self._report()
        if (verdict := self.losses.verdict()) is not None:
            raise GaveUp(verdict)

    async def add_train_workers(self) -> None:
        """Start as many rollouts as the quota allows. BaseEnv's scheduling hook.

        BaseEnv's own formula infers a limit from the length of the queue. The quota replaces it.
        """
        if self.quota is None:
            return await super().add_train_workers()
        free = min(self.quota.groups, self.max_num_workers - len(self.workers))
        while self.backlog and free > 0:
            item = self.backlog.pop()
            self._start_rollout(item, self.draws.unpark(item))
            free -= 1
        for item, drawn in await self.draws.take(free):
            self._start_rollout(item, drawn)

    def _start_rollout(self, item: Any, drawn: Drawn | None) -> None:
        if self.quota is not None:
            self.quota.groups -= 1
        item_uuid = str(uuid.uuid4())
        worker = asyncio.create_task(self._saved.follow(self.handle_env(item_uuid)))
        if drawn is not None:
            self.draws.start(worker, drawn)
        running = {"item": item, "worker": worker, "start_time": time.time()}
        self.running_items[item_uuid] = running
        self.workers.add(worker)

        def finished(worker: asyncio.Task[Any]) -> None:
            self.pool.changed.set()
            if not worker.cancelled():  # BaseEnv removes those that it cancels
                self.workers.discard(worker)
                if worker.result():
                    self.last_completed_item = item

        worker.add_done_callback(finished)

    def _show_idle(self, quota: messages.Quota) -> None:
        """Show what this worker waits for, if it has had no rollout for a while."""
        if quota.groups or self.workers:
            self._idle_since = None
            return self._show_wait(None)
        now, served = time.time(), self.pool.served_version()
        self._idle_since = self._idle_since or now
        if now - self._idle_since < SHOW_WAIT_S:
            return
        what, from_whom = "quota for more groups", "the learner"
        if served is None:
            what, from_whom = "a vLLM server", "the node agents"
        elif served < quota.oldest_version:
            what = f"policy version {quota.oldest_version}, served by all (now {served})"
            from_whom = "the learner and the node agents"
        self._show_wait(what, from_whom, self._idle_since)

    def _show_wait(self, what: str | None, from_whom: str = "", since: float | None = None) -> None:
        """Show what this member waits for; None: for nothing."""
        self.member.show_wait(Wait(what, from_whom, since or time.time()) if what else None)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_S:
            return
        self._reported = now
        self.member.update_if_changed(
            **self.losses.state(),
            in_flight=len(self.workers),
            state="generating" if self.workers else "idle",
            tokens_per_s=self._rate.after(now, self.pool.generated),
            continued_tokens=self.pool.kept,
            regenerated_tokens=self.pool.dropped,
        )

    # --- the trajectory server's routes

    async def _call(
        self, method: str, path: str, message: msgspec.Struct | None, into: type[M]
    ) -> M | None:
        """Send a message and decode the answer; None for 404 and 500: registered no longer."""
        body = None if message is None else msgspec.json.encode(message)
        answer = await self.http.send(Request(method, path, body, retry_500=False))
        if answer.status in (404, 500):
            return None
        if answer.status != 200:
            text = bytes(answer.body[:500]).decode(errors="replace")
            raise RuntimeError(f"trajectory server refused {path} with {answer.status}: {text}")
        return msgspec.json.decode(answer.body, type=into)

    async def _register_env(self) -> JsonObject:
        """Try to register once; BaseEnv repeats it until a trainer is there."""
        self.on_turn()
        config = self.config
        message = messages.EnvironmentRegistration(
            max_token_length=config.max_token_length,
            desired_name=config.wandb_name,
            weight=config.inference_weight,
            group_size=config.group_size,
            min_batch_allocation=config.min_batch_allocation,
            member=self.member.name,
        )
        answer = await self._call("POST", "/register-env", message, messages.EnvironmentRegistered)
        if answer is None:
            return {"status": "error of the trajectory server"}
        registered = answer.status == "success"
        wait = None if registered else "the run's first request for a batch"
        self._show_wait(wait, "the learner")
        found = msgspec.structs.asdict(answer)
        if registered:
            self.take_over_checkpoints(found)
        return found

    async def get_server_info(self) -> None:
        """Take the batch size. BaseEnv calls this once, registered and just before its loop."""
        await self._take_server_info()
        await self.resume_stream()
        self.pool.watch()
        self._early = asyncio.create_task(self._start_early())

    async def _take_server_info(self) -> None:
        info = await self._call("GET", "/info", None, messages.ServerInfo)
        if info is not None and info.batch_size != -1:
            self.config.batch_size = info.batch_size
        if info is not None and info.max_token_len != -1:
            # BaseEnv drops a group whose longest sequence has `max_token_len` tokens or more. A
            # server stops at exactly model.max_length, so a truncated answer would drop its group.
            self.max_token_len = info.max_token_len + 1
        if self.config.group_size > self.config.batch_size:
            raise ValueError(
                f"environment.group_size={self.config.group_size} exceeds "
                f"algorithm.batch_size={self.config.batch_size}: no batch could hold a group"
            )

    async def _request_status(self) -> messages.EnvironmentStatus:
        """Report, and register again if the server was away or no longer knows this worker."""
        while True:
            in_flight = len(self.workers) * self.config.group_size
            report = messages.StatusRequest(self.env_id, in_flight, self.pool.served_version())
            status = await self._call("GET", "/status-env", report, messages.EnvironmentStatus)
            if status is not None and self.http.outages == self._outages_seen:
                return status
            outages = self.http.outages
            answer = await self._register_env()
            if answer["status"] == "success":
                log.info("registered again: env_id %s -> %s", self.env_id, answer["env_id"])
                self.env_id, self._outages_seen = answer["env_id"], outages
                await self._take_server_info()
            else:
                log.warning("cannot register again yet (%s); retrying", answer["status"])
                await asyncio.sleep(1)

    def _trajectory_server(self) -> str | None:
        """Return the trajectory server's URL, and set it for the environment's own requests."""
        url = self.pool.trajectory_server()
        if url is not None:
            parts = urlsplit(url)
            netloc = f"atropos:{self._token}@{parts.netloc}"
            self.config.rollout_server_url = urlunsplit(parts._replace(netloc=netloc))
        return url

    # --- sending

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        """Stamp and send. BaseEnv calls this last in a rollout.

        The send is a task of its own, so that a finished group is sent even if BaseEnv cancels the
        rollout.
        """
        groups = note_sent(scored_data if isinstance(scored_data, list) else [scored_data])
        drawn = self.draws.current()
        groups = [group for group in groups if self._is_faithful(group, drawn)]
        if not groups:
            return self.draws.refuse(drawn)
        send = asyncio.create_task(self.draws.follow(drawn, self._send(groups)))
        self._sends.add(send)
        send.add_done_callback(self._sends.discard)
        await asyncio.shield(send)

    def _is_faithful(self, group: JsonObject, drawn: Drawn | None) -> bool:
        """Stamp a group, and add its support. Return False, and count it, if it is refused."""
        draw, binary = None if drawn is None else drawn.draw, self.quota is not None
        why = complete_group(group, self._rollout, binary, self.label, draw)
        if why is not None:
            self._count_refused([group], why)
        return why is None

    async def _send(self, groups: list[JsonObject]) -> bool:
        """Encode and post groups, retrying while the server is away. Return whether it took them.

        It posts only while registered: Atropos' own server breaks on a group that arrives before
        its trainer has registered.
        """
        records: list[Record] = []
        if self.quota is not None:
            try:
                records = await asyncio.to_thread(
                    lambda: [encode_group(ScoredGroup.from_python(group)) for group in groups]
                )
            except RequestError as error:
                self._count_refused(groups, str(error))
                return False
        began = time.monotonic()
        while True:
            # `get_status` registers again, until the worker leaves
            while self.http.outages != self._outages_seen and not (records and self.draws.closing):
                if time.monotonic() - began > self.http.patience_s:
                    break
                await asyncio.sleep(0.2)
            try:
                answer = await self.http.send(self._post(groups, records), patience_s=0)
                break
            except TimeoutError as error:
                if time.monotonic() - began > self.http.patience_s:
                    self._count_refused(groups, str(error))
                return False
                await asyncio.sleep(RETRY_S)
        if answer.status >= 400:
            text = bytes(answer.body[:500]).decode(errors="replace")
            self._count_refused(groups, f"status {answer.status}: {text}")
            return False
        self.losses.accept(len(groups))
        return True

    def _post(self, groups: list[JsonObject], records: list[Record]) -> Request:
        """Build the request, with this worker's current env_id."""
        env_id = getattr(self, "env_id", None)
        if records:
            for record in records:
                record.env_id = -1 if env_id is None else env_id
            return Request("POST", "/scored_data_list", group_bytes(records), CONTENT_TYPE)
        body = orjson.dumps(
            [{**group, "env_id": env_id} for group in groups],
            default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value),
            option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS,
        )
        return Request("POST", "/scored_data_list", body)

    def _count_refused(self, groups: list[JsonObject], why: str) -> None:
        for _ in groups:
            self.losses.lose(Loss.REFUSED, why)

    async def leave(self) -> None:
        """Stop generating, save the answers under way, wait for sends, disconnect, and close."""
        self.draws.closing = True
        async with self._saved.stopping():
            tasks = [task for task in (self._early, *self.workers, *self.eval_workers) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._sends, return_exceptions=True)  # may have to wait for long
        if getattr(self, "env_id", None) is not None:
            await self.draws.report_last(LEAVE_PATIENCE_S)
            body = msgspec.json.encode(messages.StatusRequest(self.env_id))
            disconnect = Request("POST", "/disconnect-env", body)
            try:
                await self.http.send(disconnect, patience_s=LEAVE_PATIENCE_S)
            except TimeoutError as error:
                log.warning("%s", error)
        await self.http.close()
        await self.pool.close()


def as_member(environment: type[BaseEnv]) -> type[Any]:
    """Make the class of this environment as a member of a run."""
    return type(
        f"{environment.__name__}Member",
        (RunEnvironment, environment, LoggedEnvironment),
        {"__doc__": environment.__doc__},
    )
