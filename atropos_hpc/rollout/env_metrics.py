"""What an environment logs for training, taken from Atropos' `wandb_log`.

BaseEnv's loop calls `wandb_log` about once per optimizer step. The numbers go to the trajectory
server, and from there into the run's own metrics; a worker never opens a W&B run.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

import msgspec
from atroposlib.envs.base import BaseEnv

from atropos_hpc.contracts.metrics import ONLY_ENVIRONMENT, EnvironmentMetrics, finite_numbers
from atropos_hpc.runtime.http import HttpClient, Request
from atropos_hpc.runtime.membership import Member

log = logging.getLogger(__name__)

ROUTE = "/environment-metrics"
RATE_S = 10.0
SEND_PATIENCE_S = 5.0  # metrics that do not arrive in time are dropped


class Rate:
    """The growth of a count per second, over the last RATE_S."""

    def __init__(self) -> None:
        self._counts = deque([(time.monotonic(), 0)])

    def after(self, now: float, count: int) -> float:
        """Return the rate, where the count is this now."""
        self._counts.append((now, count))
        while len(self._counts) > 2 and now - self._counts[1][0] > RATE_S:
            self._counts.popleft()
        since, before = self._counts[0]
        return round((count - before) / (now - since), 1)


class LoggedEnvironment(BaseEnv):
    """Comes after an environment in the MRO of a worker's class: it is the environment's `super()`.

    The worker's class provides the attributes below.
    """

    http: HttpClient
    member: Member[Any]
    label: str | None
    quota: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._not_numbers: set[str] = set()  # metrics that were reported as dropped
        self._metrics_sends: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()  # in turn: records keep the order of the calls

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Complete the metrics as BaseEnv does, and send the numbers among them."""
        metrics = {} if wandb_metrics is None else wandb_metrics
        await super().wandb_log(metrics)  # adds its own to the dict
        values = finite_numbers(metrics)
        if dropped := sorted(metrics.keys() - values.keys() - self._not_numbers):
            self._not_numbers.update(dropped)
            log.info("not logged, because they are no finite numbers: %s", ", ".join(dropped))
        if values and self.quota is not None:  # Atropos' own server has no such route
            task = asyncio.create_task(self._send_metrics(values))
            self._metrics_sends.add(task)
            task.add_done_callback(self._metrics_sends.discard)

    async def create_rollout_table(self, wandb_metrics: dict[str, Any]) -> dict[str, Any]:
        """Make no table: all rollouts are in the run's rollouts/ directory."""
        return wandb_metrics

    async def _send_metrics(self, values: dict[str, float]) -> None:
        message = EnvironmentMetrics(self.label or ONLY_ENVIRONMENT, self.member.name, values)
        request = Request("POST", ROUTE, msgspec.json.encode(message))
        try:
            async with self._sending:
                answer = await self.http.send(request, patience_s=SEND_PATIENCE_S)
        except TimeoutError as error:
            log.warning("an environment's metrics were dropped: %s", error)
            return
        if answer.status >= 400:
            text = bytes(answer.body[:200]).decode(errors="replace")
            log.warning("an environment's metrics were refused with %d: %s", answer.status, text)
