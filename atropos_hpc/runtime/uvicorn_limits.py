"""A time limit on half-sent requests to uvicorn, which serves vLLM's API and Atropos' own.

uvicorn (0.30 to 0.54) waits for the rest of a request's headers for ever, and everybody who reaches
the port can send half of them. The file that touches uvicorn's internals.
"""

from typing import Any

import uvicorn.protocols.http.auto as auto

IDLE_S = 60.0


def limit_half_sent_requests(idle_s: float = IDLE_S) -> None:
    """Have uvicorn close connections on which no request is answered for `idle_s` seconds."""
    base: Any = auto.AutoHTTPProtocol

    class Limited(base):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.idle_check = self.loop.call_later(idle_s, self.close_if_idle, self.cycle)

        def connection_lost(self, exc: Exception | None) -> None:
            self.idle_check.cancel()
            super().connection_lost(exc)

        def close_if_idle(self, before: Any) -> None:
            answered = self.cycle is None or self.cycle.response_complete
            if answered and self.cycle is before:
                self.transport.close()
            else:
                self.idle_check = self.loop.call_later(idle_s, self.close_if_idle, self.cycle)

    auto.AutoHTTPProtocol = Limited  # type: ignore[misc]
