"""HTTP to the run's trajectory server: where it is now, the run's token, and patience while it is away."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson
from isal import igzip

log = logging.getLogger(__name__)

PATIENCE_S = (
    3600.0  # a run whose trajectory server stays away longer has been given up by its supervisor
)
ONE_CALL_S = 60.0
COMPRESS_FROM = 4096  # bytes


class TrajectoryLink:
    """A connection that outlives the server. `find_url` is asked anew for each attempt: the server may come back on another port.

    `show` is told what is waited for, and None when the wait is over.
    """

    def __init__(
        self,
        find_url: Callable[[], str | None],
        token: str,
        show: Callable[[str | None], None] = lambda what: None,
    ) -> None:
        self.find_url, self.show = find_url, show
        self.patience_s = PATIENCE_S
        self.losses = 0  # how often the server went away; after each it may have forgotten us
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None
        self._away = self._shown = False

    async def call(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        retry_500: bool = True,
        once: bool = False,
    ) -> tuple[int, Any]:
        """(status, parsed body). Waits while the server is unreachable or out of order; raises TimeoutError after `patience_s`.

        `retry_500=False` gives a 500 back, for routes where it has a meaning. `once` makes one attempt only.
        """
        since, pause = time.monotonic(), 0.2
        body, headers = (None, {}) if payload is None else await asyncio.to_thread(encode, payload)
        while True:
            url = self.find_url()
            if url is None:
                failure = "it is not in the roster"
            else:
                try:
                    status, text = await self._request(
                        method, url.rstrip("/") + path, body, headers
                    )
                    if self._shown:
                        self._shown = False
                        self.show(None)
                    self._away = False
                    if status < 500 and status != 429:
                        return status, json.loads(text or "null")
                    if status == 500 and not retry_500:
                        return status, text
                    failure = f"{url} answered {status}: {text[:200]}"
                except (TimeoutError, aiohttp.ClientError, OSError) as error:
                    failure = f"{url}: {error!r}"
                    self.losses += not self._away
                    self._away = True
            waited = time.monotonic() - since
            if once or waited > self.patience_s:
                raise TimeoutError(
                    f"trajectory server: {method} {path} without an answer for {waited:.0f} s; last: {failure}"
                )
            if not self._shown:
                self._shown = True
                self.show(f"an answer to {method} {path}")
            log.warning(
                "waiting for the trajectory server, %s %s, %.0f s: %s",
                method,
                path,
                waited,
                failure,
            )
            await asyncio.sleep(pause)
            pause = min(pause * 1.6, 5.0)

    async def _request(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str]:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=ONE_CALL_S, sock_connect=5)
            )
        async with self._session.request(
            method, url, data=body, headers=headers | self._headers
        ) as response:
            return response.status, await response.text()

    async def close(self) -> None:
        if self._session:
            await self._session.close()


def encode(payload: Any) -> tuple[bytes, dict[str, str]]:
    """(JSON, headers); gzipped when large. numpy's numbers and arrays become plain ones, NaN becomes null."""
    body = orjson.dumps(
        payload, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    )
    headers = {"Content-Type": "application/json"}
    if len(body) < COMPRESS_FROM:
        return body, headers
    return igzip.compress(body, compresslevel=1), headers | {"Content-Encoding": "gzip"}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, and arrays that are not contiguous
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return str(value)
