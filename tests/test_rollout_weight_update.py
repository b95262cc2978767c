"""What a server is left with when an update of its weights fails at some point."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from rollout_parts import FakeServer, good

from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.policy.weight_update import PushError, Stuck, UpdateOptions, push

CHECK, LOAD = "check_policy_adapter", "load_policy_adapter"


def pushed(directory: Path, failing: str | None = None, adapter: bool = False) -> list[str]:
    """Push to a server that fails at a step; return the steps, and how the push ended."""
    steps: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        step = request.path
        if step == "/collective_rpc":
            step = (await request.json())["method"]
        steps.append(step)
        return web.json_response({}, status=500 if step == failing else 200)

    async def main() -> None:
        async with FakeServer(good) as server, aiohttp.ClientSession() as session:
            server.routes = dict.fromkeys(ROUTES, answer)
            version, options = PolicyVersion(version=1, attempt=1), UpdateOptions(adapter=adapter)
            await push(session, server.url, "token", directory, version, options)

    try:
        asyncio.run(main())
    except (PushError, Stuck) as error:
        steps.append(type(error).__name__)
    return steps


ROUTES = (
    *("/start_weight_update", "/update_weights", "/finish_weight_update", "/pause", "/resume"),
    *("/collective_rpc", "/v1/load_lora_adapter", "/update_weight_version"),
)
FULL = ["/start_weight_update", "/update_weights", "/pause", "/finish_weight_update", "/resume"]
ADAPTER = [CHECK, "/pause", LOAD, "/v1/load_lora_adapter", "/update_weight_version", "/resume"]


@pytest.mark.parametrize("steps", [FULL, ADAPTER], ids=["full", "adapter"])
def test_what_fails_before_the_pause_is_refused_and_what_fails_later_ends_the_server(
    tmp_path: Path, steps: list[str]
) -> None:
    adapter = steps is ADAPTER
    assert pushed(tmp_path, adapter=adapter) == steps
    pause = steps.index("/pause")
    for at, step in enumerate(steps[:-1]):
        if step == "/start_weight_update":  # which is tried again
            continue
        end = (
            ["Stuck"] if at > pause else ["/resume", "PushError"] if at == pause else ["PushError"]
        )
        assert pushed(tmp_path, step, adapter) == steps[: at + 1] + end


def test_a_version_of_which_a_file_vanishes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("removed")
    assert pushed(tmp_path) == ["PushError"]
