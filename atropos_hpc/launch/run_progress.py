"""A run's progress, without which the restarts of its processes are limited."""

import logging

from atropos_hpc.contracts.checkpoint import LatestCheckpoint
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.runtime.run_dir import RunDir, Unreadable, last_records, read_struct

log = logging.getLogger(__name__)


class RunProgress:
    """The newest durable step, and the newest step that was ever made.

    Steps that are made again after a restart are no progress, so a learner that always fails at the
    same step reaches the limit however long its steps take.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._durable: int | None = None
        self._made = 0

    def read(self) -> tuple[int | None, int]:
        try:
            latest = read_struct(self.run.checkpoints / "latest.json", LatestCheckpoint)
            made = last_records(self.run.metrics, StepMetrics, 1)
        except Unreadable as error:
            log.warning("%s; counting no progress", error)
        else:
            self._durable = latest.step if latest else None
            self._made = max([self._made, *(line.step for line in made)])
        return self._durable, self._made
