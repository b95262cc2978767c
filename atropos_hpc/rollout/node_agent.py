"""The node agent: the one process per rollout node that runs all others there.

It runs the node's vLLM servers, environment workers and (on the first node) the evaluator, follows
the policy store, and pushes each new version into every server. Its member file lists the servers
with the versions they serve. A server is listed only while it serves a published version, so no
request goes to one with older weights than it should have.

    python -m atropos_hpc.rollout.node_agent --run-dir DIR --index I
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from atropos_hpc.config import environments
from atropos_hpc.contracts.members import AgentState, RepublishRequest
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.policy.follower import Follower
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.rollout.leader_failover import LeaderFailover
from atropos_hpc.rollout.managed_server import PROBE_TIMEOUT_S, ManagedServer, ServerContext
from atropos_hpc.runtime import devices, process, restart_policy
from atropos_hpc.runtime.hang_detection import SilenceWatch
from atropos_hpc.runtime.membership import Member, RosterReader, post_request, read_members
from atropos_hpc.runtime.network import own_host
from atropos_hpc.runtime.private_tmp import PrivateDirectory
from atropos_hpc.runtime.process import REFUSED, STOPPED, ProcessSpec
from atropos_hpc.runtime.restart_policy import Action, ExitFacts, Kind, Phase
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.supervision import Exit, Limits, ManagedProcess, SupervisionEngine

log = logging.getLogger(__name__)

ENV_WORKER = "atropos_hpc.rollout.env_worker"
TICK_S = 0.1
PEAKS_S = 3.0  # between two looks at the servers' memory
LOOK_S = 1.0  # between two looks at the other members
TAKE_OVER_S = 60.0  # before the evaluator is taken over, as nodes start at different times


class NodeAgent:
    """One rollout node. `refused` says why the run cannot go on, once a process has shown that."""

    def __init__(self, run: RunDir, node: str, index: int) -> None:
        self.config = run.config()
        self.run, self.node, self.index = run, node, index
        launch = self.config.launch
        self.limits = Limits(restarts=launch.restarts, backoff_s=launch.backoff_s)
        self.member = Member(run, AgentState(number=index), node)
        store, cache = PolicyStore(run.policy), Path(self.config.policy.cache)
        self.follower = Follower(store, cache, self.member.name, self._request_republish)
        self.engine = SupervisionEngine(run.logs, lambda: self.follower.newest)
        self.servers: list[ManagedServer] = []  # made by `work`
        self.private: PrivateDirectory | None = None  # made by `work`
        self.others = self._workers()
        evaluation = self.config.evaluation
        self.evaluates = bool(evaluation.before or evaluation.after or evaluation.every)
        self.failover = LeaderFailover(run)
        self.refused: str | None = None
        self._peaks_due = 0.0  # monotonic
        self.abandoned: str | None = None  # why nobody needs this agent any more
        self.changed = asyncio.Event()  # the node's newest version, or one that a server serves

    def _workers(self) -> list[ManagedProcess]:
        keys = [
            key
            for key, environment in environments(self.config).items()
            for _ in range(environment.workers)
        ]
        return [
            self._child(
                f"environment-{number}",
                Kind.ENVIRONMENT,
                ("-m", ENV_WORKER, "--index", str(number), "--environment", key),
                environments(self.config)[key].python,
            )
            for number, key in enumerate(keys, self.index * len(keys))
        ]

    def _child(
        self, name: str, kind: Kind, arguments: tuple[str, ...], python: str | None
    ) -> ManagedProcess:
        command = (python or sys.executable, *arguments, "--run-dir", str(self.run.path))
        # The node's GPUs are the servers'. Sets of strings have one order in all workers.
        variables = {devices.VISIBLE: "", "PYTHONHASHSEED": "0"}
        spec = ProcessSpec(name, command, variables)
        return ManagedProcess(name, kind.value, lambda: [spec], self.limits)

    async def work(self) -> None:
        """Run the node until cancelled, or until `refused` is set."""
        process.dump_tasks_on_request(request_all_stacks)
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        self.private = PrivateDirectory()
        async with aiohttp.ClientSession(timeout=timeout) as http:
            context = ServerContext(
                self.run,
                self.config,
                own_host(self.config.cluster.host),
                self.run.token(),
                self.engine,
                self.follower,
                http,
                self.private,
                self.changed,
            )
            self.servers = [
                ManagedServer(f"server-{self.index}-{i}", i, self.limits, context)
                for i in range(self.config.rollout.servers)
            ]
            self.engine.add(*(server.managed for server in self.servers), *self.others)
            tasks = [
                asyncio.create_task(self._follow()),
                asyncio.create_task(self._watch_members()),
            ]
            try:
                while self.refused is None and self.abandoned is None:
                    self._tick()
                    for task in tasks:
                        if task.done():
                            task.result()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TICK_S):
                            await self.changed.wait()
                    self.changed.clear()
            finally:
                self.follower.stop()
                for task in tasks:
                    task.cancel()

    def _tick(self) -> None:
        for ended in self.engine.poll():
            self._on_exit(ended)
        for server in self.servers:
            server.tick()
        self._report()

    async def _follow(self) -> None:
        """Poll the policy store."""
        newest = None
        while True:
            found = await asyncio.to_thread(self.follower.poll)
            if found != newest:
                newest = found
                self.changed.set()
            await asyncio.sleep(self.config.policy.poll_s)

    def _request_republish(self, version: PolicyVersion, why: str) -> None:
        request = RepublishRequest(version=version, why=f"{self.member.name}: {why}")
        try:
            post_request(self.run, request)
        except OSError as error:  # a full disk; the follower asks again
            log.warning("cannot ask for policy version %s again: %s", version, error)

    async def _watch_members(self) -> None:
        """Kill children that hang, take the evaluator over when no node before this one is left,
        and requeue a Slurm job whose first node has died."""
        roster, silence = RosterReader(self.run.roster), SilenceWatch()
        first_since = time.monotonic()
        while True:
            await asyncio.to_thread(self.failover.poll)
            self.abandoned = self.failover.abandoned(self.member.state)
            members = list(roster.read().members.values())
            children = {m.pid: m for m in self.others if m.pid is not None}
            own = [m for m in members if m.node == self.node and m.pid in children]
            for member in own:
                children[member.pid].ready = member.reported
            for member in silence.hung(own):
                why = f"{member.name} has sent no heartbeat for too long"
                self.engine.kill_hung(children[member.pid], why)
            if not comes_first(self.index, roster.members(AgentState)):
                first_since = time.monotonic()
            first_for_s = time.monotonic() - first_since
            if self.evaluates and (self.index == 0 or first_for_s > TAKE_OVER_S):
                self.evaluates = False
                evaluator = self._child(
                    "evaluator",
                    Kind.EVALUATOR,
                    ("-m", "atropos_hpc.rollout.evaluation"),
                    self.config.environment.python,  # all environments have the same: validate
                )
                self.others.append(evaluator)
                self.engine.add(evaluator)
            await asyncio.sleep(LOOK_S)

    def _on_exit(self, ended: Exit) -> None:
        """Apply the restart policy."""
        for server in self.servers:
            if server.managed is ended.managed:
                server.ended()
        managed, life = ended.managed, ended.managed.life
        kind = Kind(managed.kind)
        facts = ExitFacts(ended.code, hung=ended.hung, restarts_left=life.restarts_left)
        event = restart_policy.classify(kind, facts)
        phase = Phase.RUNNING if ended.ready else Phase.STARTING
        action = restart_policy.TABLE[kind, event, phase]
        if action is Action.DROP:
            log.info("%s %s (%s)", managed.name, ended.how, event.label)
            return
        last_lines = process.tail(ended.child.log)
        if action is Action.RESTART:
            pause_s = life.restart(time.monotonic())
            log.warning(
                "%s %s after %.0f s (%s): restarting it in %.0f s%s",
                managed.name,
                ended.how,
                ended.lived_s,
                event.label,
                pause_s,
                f"; the end of its log:\n{last_lines}" if ended.crashed else "",
            )
            return
        log.error("%s: the end of its log:\n%s", managed.name, last_lines)
        how = f"{managed.name} {ended.how} ({event.label}, after {life.restarts} restarts)"
        last_line = last_lines.rpartition("\n")[2]
        self.refused = f"{how}: {self._error_of(ended) or last_line}"

    def _error_of(self, ended: Exit) -> str | None:
        """What a worker or the evaluator has said in its member file about its end."""
        pid, here = ended.child.pid, self.node
        found = (m.error for m in read_members(self.run) if (m.pid, m.node) == (pid, here))
        return next(found, None)

    def _report(self) -> None:
        """Write the member file when something has changed."""
        servers = [server.state() for server in self.servers]
        newest = self.follower.newest
        serving = all(server.version is not None for server in servers)
        self.member.update_if_changed(
            state="serving" if serving else "starting servers",
            servers=servers,
            policy=newest.version if newest else None,
            alarm=self.follower.failure,
            children={m.name: m.pid for m in self.others if m.pid is not None},
            server_peaks=self._server_peaks(),
        )
        waits = (server.wait() for server in self.servers)
        self.member.show_wait(next((wait for wait in waits if wait is not None), None))

    def _server_peaks(self) -> dict[str, int]:
        """Return the peak of each server's processes; looks now and then, in steps of 64 MiB."""
        peaks = self.member.state.server_peaks
        if time.monotonic() < self._peaks_due:
            return peaks
        self._peaks_due = time.monotonic() + PEAKS_S
        found = dict(peaks)
        for server in self.servers:
            if (pid := server.managed.pid) is not None:
                every = (pid, *process.descendants_of(pid))
                held = sum(map(process.peak_memory, every)) >> 26 << 26
                found[server.name] = max(held, peaks.get(server.name, 0))
        return found

    def end(self) -> None:
        self.engine.end_all(self.config.launch.grace_s)
        if self.private is not None:
            self.private.remove()
        self.follower.close()
        self.member.leave(servers=[], error=self.refused)
        self.failover.await_certainty()


def request_all_stacks() -> None:
    """Request the stack traces of all processes on this node: servers, engines, workers."""
    for pid in process.descendants_of(os.getpid()):
        process.request_stacks(pid)


def comes_first(index: int, agents: list[AgentState]) -> bool:
    """Whether no agent of a lower number is alive.

    >>> agents = [AgentState(number=1), AgentState(number=2)]
    >>> comes_first(1, agents), comes_first(2, agents)
    (True, False)
    """
    return all(agent.number >= index for agent in agents)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent. The exit code is REFUSED when a restart would not help."""
    process.die_with_parent()
    process.adopt_orphans()
    parser = argparse.ArgumentParser(description="The node agent of a rollout node.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--index", type=int, default=0, help="this rollout node's number")
    options = parser.parse_args(arguments)
    process.log_to_stderr()
    node = os.environ.get(process.NODE, "local")
    agent = NodeAgent(RunDir(options.run_dir), node, options.index)
    try:
        asyncio.run(process.run_until_signal(agent.work()))
    finally:
        agent.end()
    if agent.abandoned is not None:
        log.error("ending with all processes of this node: %s", agent.abandoned)
    if agent.refused is not None:
        log.error("%s", agent.refused)
        return REFUSED
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
