"""The HTTP client of the run's trajectory server, for workers and the learner, with retry.

After a crash the server is restarted, perhaps on another port: each attempt asks for its URL anew,
carries the run's token, and backs off exponentially between attempts.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

log = logging.getLogger(__name__)

PATIENCE_S = 3600.0  # by then the supervisor has given up a run without trajectory server
ANSWER_S = 60.0  # for one answer, beyond what the server was asked to wait
CONNECT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
JSON = "application/json"


@dataclass(frozen=True)
class Request:
    """An idempotent request."""

    method: str
    path: str  # with its query
    body: bytes | None = None
    content_type: str = JSON
    wait_s: float = 0.0  # that the server is asked to wait before it answers
    retry_500: bool = True  # 500 is retried, as are the statuses above and 429


@dataclass(frozen=True)
class Answer:
    """A response that ends the retries."""

    status: int
    body: bytearray  # writable, so that arrays can be mapped onto it
    url: str


class HttpClient:
    """A connection pool to the trajectory server. Belongs to one event loop.

    `find_url` returns where the server is, None while it is in no roster. `show` is called with a
    description when a request has to be retried, and with None when it was answered.
    """

    def __init__(
        self,
        find_url: Callable[[], str | None],
        token: str,
        patience_s: float = PATIENCE_S,
        show: Callable[[str | None], None] = lambda what: None,
    ) -> None:
        self.find_url, self.patience_s, self.show = find_url, patience_s, show
        self.outages = 0  # how often the server became unreachable; it may have been restarted
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None
        self._unreachable = self._shown = False

    async def send(self, request: Request, patience_s: float | None = None) -> Answer:
        """Send a request, retrying while the server is unreachable or overloaded.

        Raises TimeoutError after `patience_s` seconds without an answer; with 0 there is one
        attempt.
        """
        patience_s = self.patience_s if patience_s is None else patience_s
        began, pause, what = time.monotonic(), FIRST_PAUSE_S, f"{request.method} {request.path}"
        while True:
            url = self.find_url()
            failure = "no trajectory server is in the roster"
            if url is not None:
                try:
                    answer = await self._attempt(url, request)
                    self._reached()
                    if answer.status < 500 and answer.status != 429:
                        return answer
                    if answer.status == 500 and not request.retry_500:
                        return answer
                    text = bytes(answer.body[:200]).decode(errors="replace")
                    failure = f"status {answer.status}: {text}"
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    failure = f"{type(error).__name__}: {error}"
                    self.outages += not self._unreachable
                    self._unreachable = True
            waited = max(0.0, time.monotonic() - began - request.wait_s)
            where = f"trajectory server {url or '(none listens)'}"
            if waited >= patience_s:
                raise TimeoutError(
                    f"{where} did not answer {what} for {waited:.0f} s; last error: {failure}"
                )
            self._show_retry(what)
            log.warning("%s: retrying %s, for %.0f s: %s", where, what, waited, failure)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _attempt(self, url: str, request: Request) -> Answer:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession()
        timeout = aiohttp.ClientTimeout(total=request.wait_s + ANSWER_S, sock_connect=CONNECT_S)
        async with self._session.request(
            request.method,
            url.rstrip("/") + request.path,
            data=request.body,
            headers={"Content-Type": request.content_type, **self._headers},
            timeout=timeout,
        ) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
            return Answer(response.status, body, url)

    def _reached(self) -> None:
        self._unreachable = False
        if self._shown:
            self._shown = False
            self.show(None)

    def _show_retry(self, what: str) -> None:
        if not self._shown:
            self._shown = True
            self.show(f"an answer to {what}")

    async def close(self) -> None:
        """Close the connections."""
        if self._session:
            await self._session.close()
