"""Atropos' own trajectory API as a member of a run, behind the run's token.

    python -m atropos_hpc.trajectories.atropos_compat --run-dir RUN

For comparison with the durable server. It needs atroposlib, so it runs in the rollout environment's Python. Its state is in
memory: a restart loses it.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from atropos_hpc.contracts.members import TrajectoriesState
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.network import own_host
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.trajectories.server import authorized, listen, main, tell_depth, url_of

log = logging.getLogger(__name__)

App = Callable[
    [dict[str, Any], Callable[..., Awaitable[Any]], Callable[..., Awaitable[None]]], Awaitable[None]
]


def behind_token(app: App, token: str) -> App:
    """The ASGI application `app`, for those who have the token; GET /health for all."""

    async def guarded(
        scope: dict[str, Any],
        receive: Callable[..., Awaitable[Any]],
        send: Callable[..., Awaitable[None]],
    ) -> None:
        if scope["type"] != "http" or authorized(
            dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"), token
        ):
            return await app(scope, receive, send)
        healthy = scope["path"] == "/health"
        body = (
            b'{"status":"ok"}'
            if healthy
            else b'{"detail":"this run\'s token is needed: Authorization: Bearer <token>"}'
        )
        await send(
            {
                "type": "http.response.start",
                "status": 200 if healthy else 401,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": body})

    return guarded


async def serve(run: RunDir, node: str) -> None:
    """Be the run's trajectory server until TERM."""
    import uvicorn
    from atroposlib.api.server import app

    host = own_host(run.config().cluster.host)
    listener = listen(run, f"trajectories-{node}-0", host)
    member = Member(run, TrajectoriesState(), node)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda *_: None
        )  # uvicorn ends on them, and then raises them again, for what was set here before
    server = uvicorn.Server(
        uvicorn.Config(
            behind_token(app, run.token()), log_level="warning", log_config=None, access_log=False
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.05)
    if not serving.done():
        url = url_of(listener, host)
        log.info("Atropos' own API listens on %s", url)
        await asyncio.to_thread(member.update, state="serving", url=url)

    def depth() -> dict[str, int]:
        queue = list(getattr(app.state, "queue", []))
        return {
            "queued_groups": len(queue),
            "queued_sequences": sum(len(group["tokens"]) for group in queue),
        }

    await tell_depth(member, depth, serving)
    await asyncio.to_thread(member.leave)
    serving.result()


if __name__ == "__main__":
    main(serve, "Atropos' own trajectory server.")
