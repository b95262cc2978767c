"""The HTTP client of the run's trajectory server, for workers and the learner, with retry.

After a crash the server is restarted, perhaps on another port: each attempt asks for its URL anew,
carries the run's token, and backs off exponentially between attempts.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from atropos_hpc.runtime.waiting import ShowsWait, Waiting

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
    retry_500: bool = True  # 500 is retried, as are the statuses above, 408 and 429


@dataclass(frozen=True)
class Answer:
    """A response that ends the retries."""

    status: int
    body: bytearray  # writable, so that arrays can be mapped onto it
    url: str


class HttpClient:
    """A connection pool to the trajectory server. Belongs to one event loop.

    `find_url` returns where the server is, None while it is in no roster. Requests that have to be
    retried are shown in the member file of `member`.
    """

    def __init__(
        self,
        find_url: Callable[[], str | None],
        token: str,
        patience_s: float = PATIENCE_S,
        member: ShowsWait | None = None,
    ) -> None:
        self.find_url, self.patience_s, self.member = find_url, patience_s, member
        self.outages = 0  # how often the server became unreachable; it may have been restarted
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None
        self._unreachable = False

    async def send(self, request: Request, patience_s: float | None = None) -> Answer:
        """Send a request, retrying while the server is unreachable or overloaded.

        Raises TimeoutError after `patience_s` seconds without an answer; with 0 there is one
        attempt.
        """
        patience_s = self.patience_s if patience_s is None else patience_s
        what, pause = f"an answer to {request.method} {request.path}", FIRST_PAUSE_S
        limit = patience_s + request.wait_s
        with Waiting(what, "the trajectory server", limit, self.member) as waiting:
            while True:
                url = self.find_url()
                failure = "it is not in the roster"
                if url is not None:
                    try:
                        answer = await self._attempt(url, request)
                        self._unreachable = False
                        if not _is_retried(answer.status, request):
                            return answer
                        text = bytes(answer.body[:200]).decode(errors="replace")
                        failure = f"{url}: status {answer.status}: {text}"
                    except (aiohttp.ClientError, OSError, TimeoutError) as error:
                        failure = f"{url}: {type(error).__name__}: {error}"
                        self.outages += not self._unreachable
                        self._unreachable = True
                if waiting.expired or patience_s == 0:
                    raise waiting.timeout(failure)
                waiting.check()
                log.warning("retrying %s after %.0f s: %s", what, waiting.elapsed, failure)
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

    async def close(self) -> None:
        if self._session:
            await self._session.close()


def _is_retried(status: int, request: Request) -> bool:
    if status == 500:
        return request.retry_500
    return status > 500 or status in (408, 429)
