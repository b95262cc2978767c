"""What of a live run listens, and whom it lets in."""

import contextlib
import http.client
import itertools
import json
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple
from unittest.mock import create_autospec
from urllib.parse import urlsplit

from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.trajectories.server import application
from atropos_hpc.trajectories.service import Service

LISTENS = "0A"
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


class Door(NamedTuple):
    """A listening TCP socket. `command` is of the process that listens."""

    address: str
    port: int
    pid: int
    command: str


def doors(root: int) -> list[Door]:
    """All TCP sockets on which a process and its descendants listen."""
    listening = {}
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS:
                address, _, port = local.partition(":")
                listening[inode] = (_address(address), int(port, 16))
    found = []
    for pid in (root, *process.descendants_of(root)):
        command = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
        with contextlib.suppress(FileNotFoundError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    inode = (
                        str(Path(f"/proc/{pid}/fd/{fd}").readlink())
                        .removeprefix("socket:[")
                        .removesuffix("]")
                    )
                    if inode in listening:
                        found.append(Door(*listening[inode], pid, command))
    return sorted(set(found))


def _address(text: str) -> str:
    words = bytes.fromhex(text)
    packed = b"".join(struct.pack(">I", word) for (word,) in struct.iter_unpack("<I", words))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def answer(door: Door, method: str, path: str, token: str | None = None) -> tuple[int, bytes]:
    """(status, body) of one request. Raises OSError or HTTPException where HTTP is not spoken."""
    connection = http.client.HTTPConnection(door.address, door.port, timeout=10)
    try:
        connection.request(
            method, path, headers={} if token is None else {"Authorization": f"Bearer {token}"}
        )
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def http_doors(run: RunDir) -> dict[Door, set[str]]:
    """The run's HTTP servers with every path that they know, by their own word."""
    token, members = run.token(), read_json(run.roster)["members"].values()
    trajectories = next(m["url"] for m in members if m["kind"] == "trajectories" and m["alive"])
    ours = {
        resource.canonical
        for resource in application(create_autospec(Service), token, 0).router.resources()
    }
    found = {_door(trajectories): ours}
    for server in (
        server
        for m in members
        if m["kind"] == "agent"
        for server in m["servers"]
        if server["version"] is not None
    ):
        door = _door(server["url"])
        found[door] = (
            set(json.loads(answer(door, "GET", "/openapi.json", token)[1])["paths"]) | UNDOCUMENTED
        )
    return found


def _door(url: str) -> Door:
    parts = urlsplit(url)
    return Door(parts.hostname or "", parts.port or 0, 0, "")


def wrongly_open(run: RunDir) -> list[str]:
    """Every request without the run's token, or with a wrong one, that a server of the run did not refuse."""
    found = []
    for door, paths in http_doors(run).items():
        for path in sorted(paths - OPEN):
            for method, token in itertools.product(METHODS, (None, "", "wrong", run.token()[:-1])):
                status, body = answer(door, method, path.replace("{", "").replace("}", ""), token)
                if status not in (401, 403):
                    found.append(
                        f"{method} {path} at {door.address}:{door.port}: {status} {body[:80]!r}"
                    )
    return found


def tellers(root: int, token: str) -> list[str]:
    """Processes in whose command line or environment the token stands."""
    found = []
    for pid in (root, *process.descendants_of(root)):
        for part in ("cmdline", "environ"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if token.encode() in Path(f"/proc/{pid}/{part}").read_bytes():
                    found.append(f"{part} of {pid}")
    return found
