"""The token check of every HTTP server of a run: `authorized`, and the same as ASGI middleware.

vLLM loads the middleware by name. Its own --api-key leaves the administrative routes open: whoever
reaches the port could generate, pause, or replace weights.
"""

import base64
import binascii
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from atropos_hpc.runtime.run_dir import RunDir

# Tells the middleware its run: vLLM constructs it without arguments.
RUN_DIR = "ATROPOS_HPC_RUN_DIR"
OPEN = {"/health"}
REFUSING = (401, 403)  # answers to a token that is not the server's

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def authorized(header: str, token: str) -> bool:
    """Return whether an Authorization header carries the token.

    It may be a bearer token, or the password of Basic authorization: Atropos environments can put
    user:password@ into their rollout_server_url.
    """
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    # aiohttp decodes bytes that are not UTF-8 to surrogates
    given = credentials.strip().encode(errors="surrogateescape")
    return hmac.compare_digest(given, token.encode())


class TokenGuard:
    """Answer 401 to requests without the run's token, except for /health."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str | None = None
    ) -> None:
        self.app = app
        self._token = token or RunDir(Path(os.environ[RUN_DIR])).token()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        open_route = kind == "http" and scope["path"] in OPEN
        if kind == "lifespan" or open_route or self._allowed(scope):
            await self.app(scope, receive, send)
        elif kind == "http":
            how = "Authorization: Bearer <content of the run's secret file>"
            body = json.dumps({"detail": f"this run's token is needed: {how}"})
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return authorized(given.decode("latin-1"), self._token)
