"""What an environment logs for training reaches the run's file of metrics, under its name."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atroposlib.envs.base import BaseEnv  # noqa: E402
from trajectory_parts import TOKEN  # noqa: E402

from atropos_hpc.contracts.members import EnvironmentState  # noqa: E402
from atropos_hpc.contracts.messages import Quota  # noqa: E402
from atropos_hpc.contracts.metrics import EnvironmentMetrics  # noqa: E402
from atropos_hpc.rollout.env_metrics import LoggedEnvironment  # noqa: E402
from atropos_hpc.runtime.http import HttpClient  # noqa: E402
from atropos_hpc.runtime.membership import Member  # noqa: E402
from atropos_hpc.runtime.run_dir import RunDir, read_records  # noqa: E402
from atropos_hpc.trajectories.http_body import BodyLimits  # noqa: E402
from atropos_hpc.trajectories.server import application, listen, start, url_of  # noqa: E402
from atropos_hpc.trajectories.service import Service, ServiceSettings  # noqa: E402


class Words(BaseEnv):
    """Logs a number and a table, as environments do: its own metrics, then BaseEnv's."""

    async def wandb_log(self, wandb_metrics: Any = None) -> None:
        metrics = {
            **(wandb_metrics or {}),
            "train/right": np.float32(0.25),
            "train/table": object(),
        }
        await super().wandb_log(metrics)

    async def get_next_item(self) -> None: ...

    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...


class Worker(Words, LoggedEnvironment):
    """A worker without servers."""

    def __init__(self, http: HttpClient, member: Member[EnvironmentState]) -> None:
        self._not_numbers: set[str] = set()
        self._metrics_sends: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        self.http, self.member, self.label = http, member, "words"
        self.quota: Quota | None = Quota(0, 0)
        self.config: Any = SimpleNamespace(use_wandb=False)
        self.server: Any = SimpleNamespace(servers=[])
        self.completion_lengths, self.rollouts_for_wandb = [3, 5], [[("text", 1.0)]]
        self.max_token_len = 8
        self.task_duration = self.succeeded_task_duration = self.failed_task_duration = []
        self.mainloop_timings = self.workers_added_list = []


async def logged(run: RunDir, times: int) -> None:
    """Have a worker log against a trajectory server of its own."""
    listener = listen(run, "trajectories-a-0", "127.0.0.1")
    service = Service(run.trajectories, ServiceSettings(segment_bytes=1 << 20))
    runner = await start(
        application(service, TOKEN, BodyLimits(1 << 20), run.environments), listener
    )
    url = url_of(listener, "127.0.0.1")
    http = HttpClient(lambda: url, TOKEN, patience_s=5)
    worker = Worker(http, Member(run, EnvironmentState(), "a"))
    for _ in range(times):
        await worker.wandb_log({})
    while worker._metrics_sends:
        await asyncio.gather(*worker._metrics_sends)
    async with aiohttp.ClientSession() as stranger:  # without the run's token
        refused = await stranger.post(f"{url}/environment-metrics", json={})
        assert refused.status == 401
    await http.close()
    service.end_waits()
    await runner.cleanup()
    await service.close()


def test_the_numbers_that_an_environment_logs_are_kept_and_a_table_is_reported_once(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        asyncio.run(logged(run, times=2))
    first, second = read_records(run.environments, EnvironmentMetrics)
    assert (first.environment, first.member) == ("words", "environment-a-0")
    assert first.values["train/right"] == 0.25
    assert first.values["train/completion_lengths"] == 4.0  # BaseEnv's own
    assert "train/rollouts" not in first.values and first.time > 0
    assert second.values == {"train/right": 0.25}
    dropped = [text for text in caplog.messages if "not logged" in text]
    assert len(dropped) == 1 and "train/table" in dropped[0]


def test_no_w_and_b_run_is_opened_by_a_worker(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker used W&B")

    for name in ("init", "log", "Table"):
        monkeypatch.setattr(wandb, name, never)
    asyncio.run(logged(run, times=1))
    assert len(read_records(run.environments, EnvironmentMetrics)) == 1


def test_metrics_that_do_not_arrive_do_not_stop_an_environment(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("atropos_hpc.rollout.env_metrics.SEND_PATIENCE_S", 0.05)

    async def story() -> None:
        http = HttpClient(lambda: None, TOKEN, patience_s=5)
        worker = Worker(http, Member(run, EnvironmentState(), "a"))
        await worker.wandb_log({})
        await asyncio.gather(*worker._metrics_sends)
        await http.close()

    asyncio.run(story())
    assert "metrics were dropped" in caplog.text
