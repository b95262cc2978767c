"""Which sockets a live run listens on, and whether they ask for the run's token."""

import contextlib
import http.client
import itertools
import json
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import psutil

from atropos_hpc.contracts.members import AgentState, TrajectoriesState
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.trajectories.http_body import BodyLimits
from atropos_hpc.trajectories.server import application

OPEN = {"/health"}
UNDOCUMENTED = {
    "/",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/metrics",
    "/static/",
    "/v1/realtime",
    "/health/",
    "/health/../pause",
    "/none",
}
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS")


class Listener(NamedTuple):
    """A listening TCP socket. `command` is the command line of the process that listens."""

    address: str
    port: int
    pid: int
    command: str


def family(root: int) -> list[psutil.Process]:
    """A process and its descendants."""
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def listening(root: int) -> list[Listener]:
    """All TCP sockets on which a process and its descendants listen."""
    found = set()
    for process in family(root):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(Listener(*connection.laddr, process.pid, command))
    return sorted(found)


def answer(server: Listener, method: str, path: str, token: str | None = None) -> tuple[int, bytes]:
    """(status, body) of one request. Raises OSError or HTTPException where HTTP is not spoken."""
    connection = http.client.HTTPConnection(server.address, server.port, timeout=10)
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def http_servers(run: RunDir) -> dict[Listener, set[str]]:
    """The run's HTTP servers with every path that they know."""
    token, roster = run.token(), RosterReader(run.roster)
    (trajectories,) = roster.members(TrajectoriesState)
    routes = application(MagicMock(), token, BodyLimits(0), Path()).router.resources()
    found = {_listener(trajectories.url or ""): {resource.canonical for resource in routes}}
    for agent in roster.members(AgentState):
        for server in agent.servers:
            if server.version is not None:
                listener = _listener(server.url)
                schema = json.loads(answer(listener, "GET", "/openapi.json", token)[1])
                found[listener] = set(schema["paths"]) | UNDOCUMENTED
    return found


def _listener(url: str) -> Listener:
    parts = urlsplit(url)
    return Listener(parts.hostname or "", parts.port or 0, 0, "")


def wrongly_open(run: RunDir) -> list[str]:
    """Every request without a token, or with a wrong one, that a server of the run accepted."""
    found = []
    for server, paths in http_servers(run).items():
        for path in sorted(paths - OPEN):
            for method, token in itertools.product(METHODS, (None, "", "wrong", run.token()[:-1])):
                plain = path.replace("{", "").replace("}", "")
                status, body = answer(server, method, plain, token)
                if status not in (401, 403):
                    where = f"{server.address}:{server.port}"
                    found.append(f"{method} {path} at {where}: {status} {body[:80]!r}")
    return found


def processes_showing(root: int, token: str) -> list[str]:
    """Processes whose command line or environment contains the token."""
    found = []
    for process in family(root):
        with contextlib.suppress(psutil.Error):
            if token in " ".join(process.cmdline()):
                found.append(f"command line of {process.pid}")
            if token in " ".join(process.environ().values()):
                found.append(f"environment of {process.pid}")
    return found
