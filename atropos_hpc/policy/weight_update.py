"""Push a published policy version into one running vLLM server.

start -> update (the server maps and checks the files, and goes on with its requests) -> pause -> finish (it applies them) -> resume.
Requests in flight are frozen between pause and resume, and go on with the new weights (mode "keep"). The server end is `vllm_engine`.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

import aiohttp

from atropos_hpc.contracts.policy import PolicyVersion

log = logging.getLogger(__name__)

WAIT_S = 600.0  # for the longest answers: the reading of all shards from a shared filesystem, requests that end by themselves
PROMPT_S = 60.0  # for those that ask for no work
RESUME_TRIES = 5


class PushError(Exception):
    """A server did not take a version. It still serves the one before, or has ended itself."""


class Stuck(Exception):
    """A server's engine does not answer, or does not resume after a push, though its /health does. It has to be started again."""


async def push(
    session: aiohttp.ClientSession,
    url: str,
    token: str,
    directory: Path,
    version: PolicyVersion,
    mode: str = "keep",
) -> None:
    """Have the server at `url` serve the version that lies in `directory`.

    Args:
        mode: what happens to requests in flight: "keep" freezes them, "wait" lets them end, "abort" returns them cut short.

    Raises:
        PushError: with the server's words, when it refuses the version or does not answer. It has resumed with the version before.
        Stuck: when it gives no answer in time, or does not resume.
    """

    async def post(
        route: str, body: dict[str, Any] | None = None, wait_s: float = PROMPT_S, **query: str
    ) -> None:
        timeout = aiohttp.ClientTimeout(total=wait_s, sock_connect=10)
        # A server closes the connection after some of its failures; the next request must not be lost in it.
        headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
        try:
            async with session.post(
                url + route, json=body, params=query, headers=headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    text = (await response.text())[:1000]
                    raise PushError(
                        f"version {version} to {url}: {route} answered {response.status}: {text}"
                    )
        except TimeoutError as error:
            if isinstance(error, aiohttp.ClientError):  # it was not even connected
                raise PushError(f"version {version} to {url}: {route}: {error!r}") from error
            raise Stuck(
                f"version {version} to {url}: no answer to {route} for {wait_s:.0f} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise PushError(f"version {version} to {url}: {route}: {error!r}") from error

    async def start() -> None:
        try:
            await post("/start_weight_update")
        except PushError:
            # Most likely a pusher died between start and finish, and its session is still open. A refused update closes it.
            try:
                await post("/update_weights", {"update_info": {"directory": "", "version": ""}})
            except PushError:
                pass
            await post("/start_weight_update")

    async def resume() -> None:
        for tried in range(1, RESUME_TRIES + 1):
            try:
                return await post("/resume")
            except PushError as error:
                log.warning("%s (attempt %d of %d)", error, tried, RESUME_TRIES)
                await asyncio.sleep(0.2 * tried)
        raise Stuck(
            f"{url} was paused for version {version} and does not resume: it has to be started again"
        )

    await start()
    await post(
        "/update_weights",
        {"update_info": {"directory": str(directory), "version": str(version)}},
        WAIT_S,
    )
    try:
        await post("/pause", wait_s=WAIT_S if mode == "wait" else PROMPT_S, mode=mode)
        await post("/finish_weight_update", {"weight_version": str(version)}, WAIT_S)
    finally:
        await resume()
