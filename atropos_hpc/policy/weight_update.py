"""Update one running vLLM server to a published policy version.

Full weights:

    /start_weight_update, /update_weights   the server maps and checks the files; generation goes on
    /pause                                  running requests are frozen, and keep their KV cache
    /finish_weight_update                   the workers apply the weights
    /resume                                 running requests continue under the new version

A LoRA adapter is megabytes. vLLM serves it beside the unchanged base model: the workers check its
files; /pause, load or replace the adapter, name its version, /resume. The server side of both is
`vllm_engine`.

What is refused before the pause leaves the previous version in every worker. A failure after it may
leave workers, or the weights and their label, at different versions: the server stays paused, and
has to be restarted.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from atropos_hpc.contracts.policy import ADAPTER_NAME, PolicyVersion
from atropos_hpc.contracts.vllm_admin import (
    AdapterCall,
    Body,
    FinishWeightUpdate,
    LoadLoraAdapter,
    UpdateWeights,
    UpdateWeightVersion,
    VersionFiles,
)
from atropos_hpc.runtime.deadlines import HINT

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0  # of a version of a small model, from a shared filesystem
ADMIN_TIMEOUT_S = 60.0  # requests that need no work from the engine, which may be in a step
RESUME_TRIES = 5


class PushError(Exception):
    """A server refused a version, or could not be reached. It still serves the previous one."""


class Stuck(Exception):
    """A server has to be restarted: it does not answer or resume, or may serve half a version."""


@dataclass(frozen=True)
class UpdateOptions:
    """How a server takes a version.

    mode: what happens to running requests: "keep" freezes them, "wait" lets them finish, "abort"
        returns them truncated.
    keep_kv: whether running requests and the prefix cache keep keys and values that older versions
        computed. Otherwise the server drops its cache and prefills every running request again.
    adapter: the version is a LoRA adapter.
    verified: this node has compared the version's hashes with its manifest; the server's workers do
        not do so again.
    longest_request_s: how long a running request may take, for mode "wait".
    load_rate: bytes/s that a server reads at least.
    step_s: how long a step of the engine may take, for whose end every request to it waits.
    """

    mode: str = "keep"
    keep_kv: bool = True
    adapter: bool = False
    verified: bool = False
    longest_request_s: float = 600.0
    load_rate: float = 0.1e9
    step_s: float = 0.0


async def push(
    session: aiohttp.ClientSession,
    url: str,
    token: str,
    directory: Path,
    version: PolicyVersion,
    options: UpdateOptions | None = None,
) -> None:
    """Have the server at `url` serve the version in `directory`.

    Raises:
        PushError: the server refused the version or could not be reached; it has resumed with the
            previous version. The message holds the server's answer.
        Stuck: the server did not answer in time, does not resume, or failed to apply the version.
    """
    options = options or UpdateOptions()
    server = _Server(session, url, token, version, ADMIN_TIMEOUT_S + options.step_s)
    try:
        size = sum(path.stat().st_size for path in directory.glob("*"))
    except OSError as error:  # the node has removed this version, because it has a newer one
        raise PushError(f"version {version} to {url}: {error}") from error
    load_s = LOAD_TIMEOUT_S + size / options.load_rate
    files = VersionFiles(str(directory), str(version), options.verified)
    if options.adapter:
        await server.post("/collective_rpc", AdapterCall("check_policy_adapter", files), load_s)
    else:
        await server.start()
        await server.post("/update_weights", UpdateWeights(files), load_s)
    timeout_s = server.timeout_s + (options.longest_request_s if options.mode == "wait" else 0)
    clear = "false" if options.keep_kv else "true"
    try:
        await server.post("/pause", timeout_s=timeout_s, mode=options.mode, clear_cache=clear)
    except PushError:
        await server.resume()
        raise
    try:
        if options.adapter:
            await server.load_adapter(files)
        else:
            await server.post("/finish_weight_update", FinishWeightUpdate(str(version)), load_s)
    except PushError as error:
        raise Stuck(f"{error}; it may hold half of the version") from error
    await server.resume()


@dataclass
class _Server:
    """The administrative routes of one server, for one version."""

    session: aiohttp.ClientSession
    url: str
    token: str
    version: PolicyVersion
    timeout_s: float  # of requests that need no more of the engine than the end of its step

    async def post(
        self,
        route: str,
        body: Body | None = None,
        timeout_s: float | None = None,
        accept: str | None = None,
        **query: str,
    ) -> None:
        """POST; any status but 200 is a PushError, unless the answer contains `accept`."""
        what = f"version {self.version} to {self.url}"
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        # A server closes the connection after some failures; no further request may use it.
        headers = {"Authorization": f"Bearer {self.token}", "Connection": "close"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = msgspec.json.encode(body), "application/json"
        try:
            async with self.session.post(
                self.url + route, data=data, params=query, headers=headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    text = (await response.text())[:1000]
                    if accept is not None and accept in text:
                        return
                    raise PushError(f"{what}: {route} answered {response.status}: {text}")
        except TimeoutError as error:
            if isinstance(error, aiohttp.ClientError):  # the connection itself timed out
                raise PushError(f"{what}: {route}: {error!r}") from error
            hint = f"; {HINT}" if timeout_s >= LOAD_TIMEOUT_S else ""
            raise Stuck(f"{what}: no answer to {route} within {timeout_s:.0f} s{hint}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PushError(f"{what}: {route}: {error!r}") from error

    async def start(self) -> None:
        """Begin an update session."""
        try:
            await self.post("/start_weight_update")
        except PushError:
            # A pusher that died between start and finish leaves its session open. A refused update
            # closes it.
            try:
                await self.post("/update_weights", UpdateWeights(VersionFiles()))
            except PushError:
                pass
            await self.post("/start_weight_update")

    async def load_adapter(self, files: VersionFiles) -> None:
        """Replace the adapter in every worker; register it with the API server the first time."""
        load = AdapterCall("load_policy_adapter", files)
        await self.post("/collective_rpc", load, LOAD_TIMEOUT_S)
        register = LoadLoraAdapter(ADAPTER_NAME, files.directory)
        await self.post("/v1/load_lora_adapter", register, accept="already been loaded")
        await self.post("/update_weight_version", UpdateWeightVersion(files.version))

    async def resume(self) -> None:
        """Resume generation, retrying. Raises Stuck."""
        for attempt in range(1, RESUME_TRIES + 1):
            try:
                return await self.post("/resume")
            except PushError as error:
                log.warning("%s (attempt %d of %d)", error, attempt, RESUME_TRIES)
                await asyncio.sleep(0.2 * attempt)
        raise Stuck(
            f"{self.url} was paused for version {self.version} and does not resume; it has to be"
            " restarted"
        )
