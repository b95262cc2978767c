"""vLLM's command line, and the token check in front of its routes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import make_run

from atropos_hpc.config import ModelConf, RolloutConf
from atropos_hpc.rollout.vllm_api import version_flags
from atropos_hpc.rollout.vllm_server import arguments, variables
from atropos_hpc.runtime.token_check import RUN_DIR, TokenGuard


def test_arguments_follow_the_config() -> None:
    rollout = RolloutConf(
        tensor_parallel=4,
        memory_utilization=0.8,
        max_sequences=64,
        arguments=["--max-num-batched-tokens", "8192"],
    )
    line = arguments(
        rollout, ModelConf(path="models/a", max_length=4096), "127.0.0.1", 8123, seed=7
    )
    for flag, value in {
        "--model": "models/a",
        "--port": "8123",
        "--tensor-parallel-size": "4",
        "--gpu-memory-utilization": "0.8",
        "--seed": "7",
        "--max-model-len": "4096",
        "--max-num-seqs": "64",
        "--dtype": "bfloat16",
        "--weight-transfer-config": '{"backend": "disk"}',
        "--middleware": "atropos_hpc.runtime.token_check.TokenGuard",
    }.items():
        assert line[line.index(flag) + 1] == value
    assert set(version_flags()) <= set(line)
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--trust-remote-code"} & set(line)
    assert line[-2:] == ["--max-num-batched-tokens", "8192"]  # the user's have the last word


def test_a_server_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.path"):
        arguments(RolloutConf(), ModelConf(path=None), "127.0.0.1", 1, seed=0)


def test_variables_of_the_config_have_the_last_word(tmp_path: Path) -> None:
    conf = RolloutConf(variables={"VLLM_NO_USAGE_STATS": "0", "X": "y"})
    assert variables(conf, ModelConf(path=str(tmp_path))) == {
        "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "0", "X": "y",
    }  # fmt: skip
    assert "HF_HUB_OFFLINE" not in variables(conf, ModelConf(path="name/on-the-hub"))


def ask(
    guard: TokenGuard, path: str, authorization: str | None, kind: str = "http"
) -> list[dict[str, Any]]:
    """What the guard sends for one request."""
    sent: list[dict[str, Any]] = []
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing more to receive")

    asyncio.run(guard({"type": kind, "path": path, "headers": headers}, receive, send))
    return sent


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenGuard:
    run = make_run(tmp_path / "run")
    monkeypatch.setenv(RUN_DIR, str(run.path))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "served"})

    return TokenGuard(app)


@pytest.mark.parametrize(
    "path",
    ["/pause", "/v1/models", "/metrics", "/", "/health/", "/health/../pause", "/invocations"],
)
def test_nothing_is_open_but_health(guard: TokenGuard, path: str, tmp_path: Path) -> None:
    token = (tmp_path / "run" / "secret").read_text()
    assert ask(guard, path, f"Bearer {token}") == [{"type": "served"}]
    for wrong in (None, "", "Bearer ", "Bearer x", token, f"Bearer {token}x", f"Basic {token}"):
        assert ask(guard, path, wrong)[0]["status"] == 401
    assert ask(guard, path, None, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_health_is_open(guard: TokenGuard) -> None:
    assert ask(guard, "/health", None) == [{"type": "served"}]
