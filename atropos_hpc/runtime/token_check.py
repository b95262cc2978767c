"""The token check in front of every route of a vLLM server, as ASGI middleware that vLLM loads by name.

vLLM's own --api-key leaves the administrative routes open: whoever reaches the port could generate, pause, or replace weights.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from atropos_hpc.runtime.run_dir import RunDir

RUN_DIR = "ATROPOS_HPC_RUN_DIR"  # how the middleware, which vLLM builds without arguments, learns of its run
OPEN = {"/health"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class TokenGuard:
    """Answers 401 to what does not carry `Authorization: Bearer <the run's token>`, except /health."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self._expected = b"Bearer " + RunDir(Path(os.environ[RUN_DIR])).token().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "lifespan"
            or (scope["type"] == "http" and scope["path"] in OPEN)
            or self._allowed(scope)
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            body = json.dumps(
                {
                    "error": "this server asks for its run's token: Authorization: Bearer <content of the run's secret file>"
                }
            )
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allowed(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
