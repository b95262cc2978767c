"""Connections to the trajectory server: limits on those without the token, quiet protocol errors.

The file that touches aiohttp's server internals (3.9 to 3.14): whoever reaches the port can send
anything before the token check, so nothing may wait for it, keep it, or write it to a log.
"""

import asyncio
import logging
import socket
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from atropos_hpc.contracts.messages import ErrorBody

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections.

    `idle_s`: for the headers of a request, and between two requests; longer than aiohttp's client
    keeps an idle connection. `unauthenticated`: connections that have not sent the token yet; a
    further one closes the oldest, if that had `grace_s` to send it: thousands of workers may
    connect at once.
    """

    idle_s: float = 60.0
    unauthenticated: int = 256
    grace_s: float = 5.0


class Connection(RequestHandler):
    """A connection that counts as unauthenticated until `authenticate`."""

    def __init__(self, site: "LimitedSite", *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.site = site

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        strangers, limits, now = self.site.unauthenticated, self.site.limits, time.monotonic()
        strangers[self] = now
        if len(strangers) > limits.unauthenticated:
            oldest, since = next(iter(strangers.items()))
            if now - since >= limits.grace_s:
                del strangers[oldest]
                oldest.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.site.unauthenticated.pop(self, None)
        super().connection_lost(exc)

    def authenticate(self) -> None:
        """Note that a request on this connection carried the token."""
        self.site.unauthenticated.pop(self, None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer bytes that are not HTTP. The parser's message quotes them, perhaps a token: it is
        neither logged nor answered."""
        if status == 500:
            return super().handle_error(request, status, exc, message)
        log.debug("bytes from %s are not HTTP: %s", request.remote, type(exc).__name__)
        response = web.Response(
            body=msgspec.json.encode(ErrorBody("this is not a valid HTTP request")),
            status=status,
            content_type="application/json",
        )
        response.force_close()
        return response


def authenticate(request: web.Request) -> None:
    """Note that the request's connection has sent the token."""
    if isinstance(request.protocol, Connection):
        request.protocol.authenticate()


class LimitedSite(web.SockSite):
    """Accepts connections of a bound socket, with limits."""

    def __init__(
        self, runner: web.AppRunner, server: socket.socket, limits: ConnectionLimits, backlog: int
    ) -> None:
        super().__init__(runner, server, backlog=backlog)
        self.limits = limits
        self.unauthenticated: dict[Connection, float] = {}  # since when; oldest first

    async def start(self) -> None:
        await web.BaseSite.start(self)
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server is not None, "the runner is set up"
        # aiohttp closes a connection that is idle for so long, also in the middle of headers
        options = {**server._kwargs, "loop": loop, "keepalive_timeout": self.limits.idle_s}
        self._server = await loop.create_server(
            lambda: Connection(self, server, **options), sock=self._sock, backlog=self._backlog
        )
