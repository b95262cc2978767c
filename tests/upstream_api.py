"""Pytest plugin that runs Atropos' published API tests against this trajectory server.

Use it with `-p upstream_api` in the rollout environment. Those tests start
`python -m atroposlib.cli.run_api` on localhost:8000 and send requests without a token. The plugin
starts a trajectory server of a new run on a free port instead, and sends every request to
localhost:8000 there, with that run's token.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests
from trajectory_parts import make_run, member

from atropos_hpc.runtime.run_dir import RunDir

ORIGIN = "http://localhost:8000"
_run: RunDir | None = None
_popen, _request = subprocess.Popen, requests.Session.request


def popen(command: Any, *args: Any, **kwargs: Any) -> "subprocess.Popen[Any]":
    global _run
    if isinstance(command, list) and "atroposlib.cli.run_api" in command:
        _run = make_run(
            Path(tempfile.mkdtemp(prefix="upstream-api-")) / "run", max_body_bytes=64 << 20
        )
        command = [
            sys.executable,
            "-m",
            "atropos_hpc.trajectories.server",
            "--run-dir",
            str(_run.path),
        ]
        kwargs |= {"stdout": (_run.path / "server.log").open("ab"), "stderr": subprocess.STDOUT}
    return _popen(command, *args, **kwargs)


def request(session: requests.Session, method: str, url: str, **kwargs: Any) -> requests.Response:
    if not url.startswith(ORIGIN):
        return _request(session, method, url, **kwargs)
    here = member(_run).get("url") if _run is not None else None
    if _run is None or here is None:
        raise requests.exceptions.ConnectionError("no trajectory server yet")
    kwargs["headers"] = {**(kwargs.get("headers") or {}), "Authorization": f"Bearer {_run.token()}"}
    return _request(session, method, here + url.removeprefix(ORIGIN), **kwargs)


def pytest_configure() -> None:
    subprocess.Popen = popen  # type: ignore[assignment, misc]
    requests.Session.request = request  # type: ignore[method-assign, assignment]
