"""No deadline ends a generation of 20 minutes on its way. The clock is set by the test."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest
from rollout_parts import list_servers, make_run

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from stub_vllm import StubVllm  # noqa: E402

from atropos_hpc.environments.make_base import make_tokenizer  # noqa: E402
from atropos_hpc.rollout import env_loader  # noqa: E402
from atropos_hpc.rollout.evaluation import Evaluator  # noqa: E402
from atropos_hpc.rollout.server_pool import pool_of  # noqa: E402
from atropos_hpc.rollout.vllm_client import VllmServer  # noqa: E402

TOKENS, CHUNKS, MINUTE = 32000, 20, 60.0


class SlowVllm(StubVllm):
    """Sends a part of an answer of 32,000 tokens per minute; a minute passes at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(policy=lambda _: 5, chunk=TOKENS // CHUNKS)
        self.passed_s, now = 0.0, time.monotonic
        # asyncio, and with it every timer of the client and its connections, reads this clock
        monkeypatch.setattr(time, "monotonic", lambda: now() + self.passed_s)

    async def _send(self, response: Any, event: dict[str, Any]) -> None:
        self.passed_s += MINUTE
        await asyncio.sleep(0.01)  # for timers that are due
        await super()._send(response, event)


@pytest.mark.parametrize(("timeout_s", "complete"), [(None, True), (600.0, False)])
def test_an_answer_that_takes_20_minutes_arrives_unless_the_config_says_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float | None, complete: bool
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    environment = {"target": "atropos_hpc.environments.arithmetic:ArithmeticEnv"}
    run = make_run(
        tmp_path / "run",
        model={"path": str(tmp_path / "model"), "max_length": 32768},
        environment={**environment, "request_timeout_s": timeout_s},
    )

    async def main() -> None:
        _, _, (config,) = env_loader.of_run(run, "environment", seed=0)
        async with SlowVllm(monkeypatch) as stub:
            list_servers(run, {stub.url: 1})
            request = VllmServer(config).completion(prompt="1+1=", max_tokens=TOKENS)
            if complete:
                (choice,) = (await request).choices
                assert choice.finish_reason == "length" and len(stub.requests) == 1
                assert stub.generated == TOKENS and stub.passed_s == CHUNKS * MINUTE
            else:
                with pytest.raises(TimeoutError, match="within 600 s"):
                    await request
            await pool_of(run.path).close()

    asyncio.run(main())


def test_requests_of_an_evaluation_may_queue_as_long_as_it_may_take(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    run = make_run(
        tmp_path / "run",
        model={"path": str(tmp_path / "model")},
        environment={"target": "atropos_hpc.environments.arithmetic:ArithmeticEnv"},
        evaluation={"timeout_s": 7200.0},
    )
    env = Evaluator(run, cast(Any, None)).build()["environment"]
    assert [server.config.timeout for server in env.server.servers] == [7200]
