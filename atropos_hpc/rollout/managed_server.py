"""A vLLM server as its node agent sees it: started, probed, and brought to the newest version."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from atropos_hpc.config import Config, environments
from atropos_hpc.contracts.members import ServerState, Wait
from atropos_hpc.policy.follower import Follower, LoadableVersion
from atropos_hpc.policy.weight_update import PushError, Stuck, UpdateOptions, push
from atropos_hpc.runtime import cores, devices
from atropos_hpc.runtime.deadlines import engine_step_s, load_rate, request_timeout_s
from atropos_hpc.runtime.network import free_port, http_url
from atropos_hpc.runtime.private_tmp import PrivateDirectory, compile_caches
from atropos_hpc.runtime.process import ProcessSpec
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.supervision import Limits, ManagedProcess, SupervisionEngine
from atropos_hpc.runtime.token_check import REFUSING

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
PROBE_EVERY_S = 5.0
# vLLM passes this route on to its engine, while /health answers even though the engine hangs.
ENGINE_ROUTE = "/is_sleeping"
UNHEALTHY_S = 60.0  # without an answer, after which a server that was up is killed; on a CPU, later


@dataclass(frozen=True)
class ServerContext:
    """What the servers of a node share."""

    run: RunDir
    config: Config
    host: str
    token: str
    engine: SupervisionEngine
    follower: Follower
    http: aiohttp.ClientSession
    private: PrivateDirectory  # of the servers' temporary files
    changed: asyncio.Event  # set when a server has taken a version


class ManagedServer:
    """One vLLM server. `serves` is the version that it serves; until then it is not listed."""

    def __init__(self, name: str, index: int, limits: Limits, context: ServerContext) -> None:
        self.managed = ManagedProcess(name, "server", self._specs, limits)
        self.name, self.index, self.url, self.context = name, index, "", context
        self.serves: LoadableVersion | None = None
        self._answered = 0.0  # monotonic
        self._step_s = 0.0  # see `engine_step_s`; known when the server is up and has its model
        self._probing: asyncio.Task[None] | None = None
        self._updating: asyncio.Task[None] | None = None

    def state(self) -> ServerState:
        """The server's entry in the agent's member file."""
        version = self.serves.version if self.serves else None
        return ServerState(name=self.name, url=self.url, version=version, pid=self.managed.pid)

    def wait(self) -> Wait | None:
        """What has to happen before the server serves; None when it does."""
        if self.serves is not None:
            return None
        newest, now = self.context.follower.newest, time.time()
        if not self.managed.ready:
            return Wait(
                "a healthy server", self.name, now, now + self.context.config.launch.start_timeout_s
            )
        if newest is None:
            return Wait("the first policy version", "the learner", now)
        return Wait(f"policy version {newest.version} to be loaded", self.name, now)

    def ended(self) -> None:
        """Call when the process has ended: it serves nothing any more."""
        self.serves = None

    def _specs(self) -> Sequence[ProcessSpec]:
        port = free_port(self.context.host)
        self.url, self.serves = http_url(self.context.host, port), None
        self._answered = time.monotonic()
        arguments = ("--run-dir", str(self.context.run.path), "--port", str(port))
        command = (sys.executable, "-m", "atropos_hpc.rollout.vllm_server", *arguments)
        # of this start of the server; a killed one has left its sockets
        private = str(self.context.private.empty(str(self.index)))
        variables = {
            "TMPDIR": private,
            "VLLM_RPC_BASE_PATH": private,
            **own_hardware(self.context.config, self.index),
        }
        caches = {**compile_caches("vllm"), **os.environ}
        variables |= {name: caches[name] for name in compile_caches("vllm")}
        return [ProcessSpec(self.name, command, variables)]

    def tick(self) -> None:
        """Probe the server and bring it to the newest version; each in a task of its own."""
        if not self.managed.children:
            return
        probing = self._probing is not None and not self._probing.done()
        due = not self.managed.ready or time.monotonic() - self._answered > PROBE_EVERY_S
        if due and not probing:
            self._probing = asyncio.create_task(self._probe())
        newest = self.context.follower.newest
        outdated = newest is not None and self.serves != newest
        if self.managed.ready and newest is not None and outdated and not self._is_updating():
            self._updating = asyncio.create_task(self._update(newest))

    def _is_updating(self) -> bool:
        return self._updating is not None and not self._updating.done()

    async def _probe(self) -> None:
        """Request an answer. A server that does not come up, or answers no more, is killed;
        the engine starts it again."""
        child, updating = self.managed.children[0], self._updating
        if await self._answers():
            if self.managed.children != [child]:
                return  # it was restarted meanwhile
            if not self.managed.ready:
                log.info("%s is up at %s", self.name, self.url)
                self._step_s = engine_step_s(self.context.config)
            self.managed.ready, self._answered = True, time.monotonic()
            return
        if self.managed.children != [child] or self._updating is not updating:
            return  # restarted, or its engine was busy with an update that began meanwhile
        silent_s = self._silent_s()
        if silent_s > self._limit_s():
            self._kill(f"has not answered for {silent_s:.0f} s")
        await asyncio.sleep(0.5)

    def _silent_s(self) -> float:
        return time.monotonic() - self._answered

    def _limit_s(self) -> float:
        if not self.managed.ready:
            return self.context.config.launch.start_timeout_s
        return UNHEALTHY_S + self._step_s

    async def _answers(self) -> bool:
        # An update has deadlines of its own, and keeps the engine busy.
        route = "/health" if self._is_updating() else ENGINE_ROUTE
        headers = {"Authorization": f"Bearer {self.context.token}"}
        timeout_s = PROBE_TIMEOUT_S
        if self.managed.ready and route == ENGINE_ROUTE:
            # One long request: the engine answers after its step, however often it is asked.
            timeout_s = max(timeout_s, self._limit_s() - self._silent_s())
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=PROBE_TIMEOUT_S)
        try:
            async with self.context.http.get(
                self.url + route, headers=headers, timeout=timeout
            ) as answer:
                if answer.status in REFUSING:
                    log.error(
                        "%s answers %d to this run's token at %s: it asks for another key",
                        *(self.name, answer.status, route),
                    )
                # A server without that route answers, too.
                return answer.status == 200 or (route == ENGINE_ROUTE and answer.status == 404)
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False

    async def _update(self, newest: LoadableVersion) -> None:
        """Push a version once. A server that refuses keeps what it serves, and is asked again."""
        children, context = list(self.managed.children), self.context
        try:
            with context.follower.loading(newest):
                await push(
                    context.http,
                    self.url,
                    context.token,
                    newest.directory,
                    newest.version,
                    _update_options(context.config, self._step_s),
                )
        except Stuck as error:
            if self.managed.children == children:
                self._kill(f"is stuck: {error}")
            return
        except PushError as error:
            if context.follower.newest != newest:
                return  # the node has a newer version, and has removed this one's copy
            log.error(
                "%s did not load a policy version and keeps the one it serves: %s", self.name, error
            )
            await asyncio.sleep(1.0)
            return
        if self.managed.children == children:  # else it was restarted, without these weights
            self.serves = newest
            context.changed.set()

    def _kill(self, why: str) -> None:
        self.context.engine.kill_hung(self.managed, f"{self.name} {why}")


def own_hardware(config: Config, index: int) -> dict[str, str]:
    """Return the variables that give server `index` its own GPUs, or else its own CPUs."""
    if not (gpus := config.roles.rollout.gpus_per_node):
        return cores.variables(index, config.rollout.servers, bind=True)
    visible = devices.visible_devices(os.environ, gpus)
    own = devices.server_devices(visible, index, config.rollout.tensor_parallel)
    return {devices.VISIBLE: ",".join(own)}


def _update_options(config: Config, step_s: float) -> UpdateOptions:
    return UpdateOptions(
        mode=config.policy.update_mode,
        keep_kv=config.policy.kv == "keep",
        adapter=config.model.lora.rank > 0,
        verified=True,  # by the follower
        longest_request_s=max(
            request_timeout_s(conf, config.model.max_length)
            for conf in environments(config).values()
        ),
        load_rate=load_rate(config),
        step_s=step_s,
    )
