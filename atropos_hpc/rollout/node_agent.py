"""The node agent: the one process per rollout node.

It starts the node's vLLM servers, environment workers and (on the first node) the evaluator; starts again what has ended; follows
the policy store and pushes each new version into every server; and tells the rendezvous which server serves which version. A server
is listed only while it serves a published version, so nobody is ever sent to one that still has older weights than it should.

    python -m atropos_hpc.rollout.node_agent --run-dir DIR --index I
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from atropos_hpc.config import (
    environments,
)
from atropos_hpc.contracts.members import AgentState, RepublishRequest, ServerState, Wait
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.policy.follower import Follower, LoadableVersion
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.policy.weight_update import PushError, Stuck, push
from atropos_hpc.rollout.leader_failover import LeaderWatch
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member, RosterReader, post_request
from atropos_hpc.runtime.network import free_port, own_host
from atropos_hpc.runtime.process import DONE, REFUSED, STOPPED, backoff
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.supervision import DUMP_S, Silence

log = logging.getLogger(__name__)

TICK_S = 0.1
HEALTH_TIMEOUT_S = 5.0
HEALTH_EVERY_S = 5.0
ENGINE = (
    "/is_sleeping"  # vLLM passes this on to its engine; /health answers although the engine hangs
)
UNHEALTHY_S = (
    60.0  # a server that was up and has not answered for this long is ended, and started again
)
TAKE_OVER_S = 60.0  # nodes start at different times
HEALTHY_S = 300.0  # a child that has run this long, or while a newer policy came, has got on: its restarts are counted anew


@dataclass
class Kept:
    """A child that is kept running."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    child: process.Child | None = None
    restarts: int = 0
    due: float = 0.0
    policy: LoadableVersion | None = None  # the newest version when it was started
    finished: bool = False  # ended with success: not started again


@dataclass
class Server(Kept):
    """A vLLM server: in `url` while the process lives, in the roster once `serves` is set."""

    url: str = ""
    up: bool = False
    answered: float = 0.0  # when it last answered /health, monotonic
    serves: LoadableVersion | None = None
    updating: "asyncio.Task[None] | None" = None
    watching: "asyncio.Task[None] | None" = None


class Agent:
    """One rollout node. Built from its own sections of the config."""

    def __init__(self, run: RunDir, node: str, index: int) -> None:
        config = run.config()
        self.run, self.node, self.index = run, node, index
        self.rollout, self.policy, self.launch = config.rollout, config.policy, config.launch
        self.host = own_host(config.cluster.host)
        evaluation = config.evaluation
        self.token = run.token()
        self.servers = [
            Server(f"server-{index}-{i}", "atropos_hpc.rollout.vllm_server")
            for i in range(self.rollout.servers)
        ]
        workers = [
            key
            for key, environment in environments(config).items()
            for _ in range(environment.workers)
        ]
        self.others = [
            Kept(
                f"environment-{number}",
                "atropos_hpc.rollout.env_worker",
                ("--index", str(number), "--environment", key),
            )
            for number, key in enumerate(workers, index * len(workers))
        ]
        self.evaluates = bool(
            evaluation.before or evaluation.after or evaluation.every
        )  # somebody has to
        self.leader = LeaderWatch(run)
        self.member = Member(run, AgentState(number=index), node)
        self.follower = Follower(
            PolicyStore(run.policy), Path(self.policy.cache), self.member.name, self.complain
        )
        self.refused: str | None = None
        self.news = asyncio.Event()  # a version that the servers do not have yet
        self.waits: Wait | None = None

    async def work(self) -> None:
        """Until cancelled, or until a child says that starting it again is no use (`refused` then says why)."""
        process.tasks_on_request(ask_all_for_stacks)
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        ) as self.http:
            following, watching = (
                asyncio.create_task(self.follow()),
                asyncio.create_task(self.watch_others()),
            )
            try:
                while self.refused is None:
                    for kept in [*self.servers, *self.others]:
                        self.keep(kept)
                    for server in self.servers:
                        self.serve(server)
                    self.report()
                    for task in (following, watching):
                        if task.done():
                            task.result()
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self.news.wait(), TICK_S)
                    self.news.clear()
            finally:
                self.follower.stop()
                following.cancel()
                watching.cancel()

    async def follow(self) -> None:
        """Look for new versions at the store's interval."""
        newest = None
        while True:
            found = await asyncio.to_thread(self.follower.poll)
            if found != newest:
                newest = found
                self.news.set()
            await asyncio.sleep(self.policy.poll_s)

    def complain(self, version: PolicyVersion, why: str) -> None:
        """Ask the learner to publish a version again."""
        request = RepublishRequest(version=version, why=f"{self.member.name}: {why}")
        try:
            post_request(self.run, request)
        except OSError as error:  # a full disk: it is complained again
            log.warning("cannot ask for policy version %s again: %s", version, error)

    async def watch_others(self) -> None:
        """Take the evaluator over when no node before this one is left; have a Slurm job started again when its first node dies; end
        children that hang.
        """
        roster, since, silence = RosterReader(self.run.roster), time.monotonic(), Silence()
        while True:
            await asyncio.to_thread(self.leader.look)
            members = roster.read().members.values()
            children = {
                kept.child.pid: kept.child for kept in self.others if kept.child is not None
            }
            for member in silence.hung(
                m for m in members if m.node == self.node and m.pid in children
            ):
                log.error(
                    "%s has given no sign for too long: it tells its stacks in its log, and is ended",
                    member.name,
                )
                process.request_stacks(member.pid)
                await asyncio.sleep(DUMP_S)
                children[member.pid].signal(signal.SIGKILL)
            if not comes_first(self.index, roster.members(AgentState)):
                since = time.monotonic()
            if self.evaluates and (self.index == 0 or time.monotonic() - since > TAKE_OVER_S):
                self.evaluates = False
                self.others.append(Kept("evaluator", "atropos_hpc.rollout.evaluation"))
            await asyncio.sleep(1.0)

    # --- children

    def keep(self, kept: Kept) -> None:
        """Start what is due, notice what has ended, and decide whether to start it again."""
        if kept.finished:
            return
        if kept.child is None:
            if time.monotonic() >= kept.due:
                self.start(kept)
            return
        code = kept.child.poll()
        if code is None:
            return
        process.end([kept.child], 0.0)
        process.end_orphans(
            other.child for other in [*self.servers, *self.others] if other.child is not None
        )
        lived, kept.child = time.monotonic() - kept.child.started, None
        if isinstance(kept, Server):
            kept.up, kept.serves = False, None
        if code == DONE and not isinstance(kept, Server):
            kept.finished = True
            log.info("%s has done its work", kept.name)
            return
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        if lived > HEALTHY_S or (kept.policy is not None and self.follower.newest != kept.policy):
            kept.restarts = 0
        end_of_log = process.tail(self.run.logs / f"{kept.name}.log")
        if code == REFUSED or kept.restarts >= self.launch.restarts:
            self.refused = f"{kept.name} {how}, and is not started again after {kept.restarts} restarts; the end of its log:\n{end_of_log}"
            return
        pause = backoff(self.launch.backoff_s, kept.restarts)
        log.warning(
            "%s %s after %.0f s: started again in %.0f s%s",
            kept.name,
            how,
            lived,
            pause,
            f"; the end of its log:\n{end_of_log}" if code > 0 and code != STOPPED else "",
        )
        kept.restarts += 1
        kept.due = time.monotonic() + pause

    def start(self, kept: Kept) -> None:
        """Start a child in this role's Python, its log beside the others."""
        arguments = [*kept.arguments]
        if isinstance(kept, Server):
            port = free_port(self.host)
            kept.url = f"http://{self.host}:{port}"
            arguments += ["--port", str(port)]
        command = [sys.executable, "-m", kept.module, "--run-dir", str(self.run.path), *arguments]
        kept.policy = self.follower.newest
        kept.child = process.start(kept.name, command, self.run.logs / f"{kept.name}.log")
        log.info("started %s, pid %d", kept.name, kept.child.pid)

    # --- servers

    def serve(self, server: Server) -> None:
        """Watch a live server, and bring it to the newest version; each in a task of its own."""
        if server.child is None:
            return
        now = time.monotonic()
        idle = server.watching is None or server.watching.done()
        if idle and (not server.up or now - server.answered > HEALTH_EVERY_S):
            server.watching = asyncio.create_task(self.watch(server))
        newest = self.follower.newest
        if (
            server.up
            and newest is not None
            and server.serves != newest
            and (server.updating is None or server.updating.done())
        ):
            server.updating = asyncio.create_task(self.update(server, newest))

    async def watch(self, server: Server) -> None:
        """Ask for its health. One that does not come up, or does not answer any more, is ended; `keep` then starts it again."""
        child = server.child
        assert child is not None
        try:
            updating = (
                server.updating is not None and not server.updating.done()
            )  # that has deadlines of its own
            path = ENGINE if server.up and not updating else "/health"
            async with self.http.get(
                server.url + path, headers={"Authorization": f"Bearer {self.token}"}
            ) as answer:
                if answer.status == 200 or (
                    path == ENGINE and answer.status < 500
                ):  # it may be without that route, but it answers
                    if not server.up:
                        log.info(
                            "%s is up at %s after %.0f s",
                            server.name,
                            server.url,
                            time.monotonic() - child.started,
                        )
                    server.up, server.answered = True, time.monotonic()
                    return
        except (TimeoutError, aiohttp.ClientError, OSError):
            pass
        silent = time.monotonic() - (server.answered if server.up else child.started)
        if silent > (UNHEALTHY_S if server.up else self.launch.start_timeout_s):
            await self.end_stuck(server.name, child, f"has not answered for {silent:.0f} s")
        await asyncio.sleep(0.5)

    async def end_stuck(self, name: str, child: process.Child, how: str) -> None:
        """End a server that is of no use any more; `keep` then starts it again."""
        log.error("%s %s: it tells its stacks in its log, and is ended", name, how)
        for pid in (child.pid, *process.descendants_of(child.pid)):
            process.request_stacks(pid)
        await asyncio.sleep(DUMP_S)
        child.signal(signal.SIGKILL)

    async def update(self, server: Server, version: LoadableVersion) -> None:
        """One push. A server that refuses keeps what it serves, and is asked again."""
        child = server.child
        try:
            await push(
                self.http,
                server.url,
                self.token,
                version.directory,
                version.version,
                self.policy.update_mode,
            )
        except Stuck as error:
            if child is not None and server.child is child:
                await self.end_stuck(server.name, child, f"is stuck: {error}")
            return
        except PushError as error:
            if self.follower.newest != version:
                return  # the node has a newer one, and let this one's copy go
            log.error(
                "%s did not take a policy version, and keeps what it serves: %s", server.name, error
            )
            await asyncio.sleep(1.0)
            return
        if server.child is child:  # else it was restarted meanwhile, without these weights
            server.serves = version
            self.report()

    def report(self) -> None:
        """Tell the rendezvous, when something has changed."""
        servers = [
            ServerState(
                name=s.name,
                url=s.url,
                version=s.serves.version.version if s.serves else None,
                pid=s.child.pid if s.child else None,
            )
            for s in self.servers
        ]
        newest = self.follower.newest.version.version if self.follower.newest else None
        children = {kept.name: kept.child.pid for kept in self.others if kept.child is not None}
        self.note_wait()
        state: dict[str, Any] = {
            "waiting": self.waits,
            "state": "serving" if all(s.version is not None for s in servers) else "starting servers",
            "servers": servers, "policy": newest, "bad_policy": self.follower.failure, "children": children,
        }  # fmt: skip
        self.member.update_if_changed(**state)

    def note_wait(self) -> None:
        """The first server that serves nothing yet, and what for."""
        lacking = next((server for server in self.servers if server.serves is None), None)
        if lacking is None:
            self.waits = None
            return
        if not lacking.up:
            what, whom = "its start", lacking.name
        elif self.follower.newest is None:
            what, whom = "the first policy version", "the learner"
        else:
            what, whom = f"it to take policy version {self.follower.newest.version}", lacking.name
        if self.waits is None or (self.waits.what, self.waits.from_whom) != (what, whom):
            self.waits = Wait(what, whom, time.time())

    def end(self, **state: Any) -> None:
        """End every child; nothing of this node's stays behind."""
        process.end(
            (kept.child for kept in [*self.servers, *self.others] if kept.child is not None),
            self.launch.grace_s,
        )
        while process.end_orphans([]):
            pass
        self.follower.close()
        self.member.leave(servers=[], **state)
        self.leader.last_look()


def ask_all_for_stacks() -> None:
    """All on this node: the servers with their engines, the workers, the evaluator."""
    for pid in process.descendants_of(os.getpid()):
        process.request_stacks(pid)


def comes_first(index: int, agents: list[AgentState]) -> bool:
    """Is no agent of a lower number alive?

    >>> agents = [AgentState(number=1), AgentState(number=2)]
    >>> comes_first(1, agents), comes_first(2, agents)
    (True, False)
    """
    return all(agent.number >= index for agent in agents)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent; the exit code is 2 when restarting it would be no use."""
    process.die_with_parent(signal.SIGTERM)
    process.adopt_orphans()
    parser = argparse.ArgumentParser(description="The node agent of a rollout node.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--index", type=int, default=0, help="this rollout node's number")
    options = parser.parse_args(arguments)
    process.log_to_stderr()
    agent = Agent(
        RunDir(options.run_dir), os.environ.get("ATROPOS_HPC_NODE", "local"), options.index
    )
    try:
        asyncio.run(process.until_asked(agent.work()))
    finally:
        agent.end()
    if agent.refused is not None:
        log.error("%s", agent.refused)
        return REFUSED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
