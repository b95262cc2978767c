"""Export every `export.every` steps to RUN/exports, in a process beside the learner.

    python -m atropos_hpc.learner.periodic_export --run-dir R --step N

Rank 0 starts it when a due step has become durable, and does not wait for it. The process has the
lowest priority, sees no GPU, is the first that the kernel ends when memory is short, and leaves
space on the disk for the next checkpoint. When it fails, its error is in its log, and the run goes
on. It keeps the newest `export.keep` exports, and writes their model cards anew: the evaluation of
a version comes after its export.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from atropos_hpc.config import ExportConf
from atropos_hpc.learner.checkpoint_files import find
from atropos_hpc.observe.model_card import model_card
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, numbered, write_file

log = logging.getLogger(__name__)

TIMEOUT_S = 1800.0  # for one export of a small model
END_S = 5.0


class PeriodicExport:
    """The exports of one start of the learner, on rank 0."""

    def __init__(self, run: RunDir, conf: ExportConf, timeout_s: float) -> None:
        self.run, self.conf, self.timeout_s = run, conf, timeout_s
        self._child: process.Child | None = None
        self._step, self._deadline = -1, 0.0  # of the newest export that was started

    def durable(self, step: int | None) -> None:
        """Start an export if a step that has become durable is due. Does not wait."""
        running = self._is_running()
        if step is None or not self.conf.every or step % self.conf.every:
            return
        if running:
            log.warning("step %d is not exported: step %d is still under way", step, self._step)
        else:
            self._start(step)

    def last_done(self, step: int) -> bool:
        """Export the run's last step; tell whether that has ended, well or not. To be polled."""
        if self._is_running():
            return False
        if not self.conf.every or self._step == step:
            return True
        return not self._start(step)

    def close(self) -> None:
        """End an export that is under way."""
        if self._child is not None:
            process.end([self._child], END_S)

    def _start(self, step: int) -> bool:
        module = "atropos_hpc.learner.periodic_export"
        command = [sys.executable, "-m", module, "--run-dir", str(self.run.path)]
        self._step, self._deadline = step, time.monotonic() + self.timeout_s
        try:
            self._child = process.start(
                "export",
                [*command, "--step", str(step)],
                self.run.logs / "export.log",
                {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            log.warning("step %d is not exported: %s", step, error)
        return self._child is not None

    def _is_running(self) -> bool:
        if self._child is None:
            return False
        code = self._child.poll()
        if code is None and time.monotonic() < self._deadline:
            return True
        process.end([self._child], END_S)
        if code:
            reason = process.tail(self._child.log, 1)
            log.warning("step %d is not exported: code %d, %s", self._step, code, reason)
        elif code is None:
            log.warning("step %d is not exported: it took %.0f s", self._step, self.timeout_s)
        self._child = None
        return False


def export_step(run: RunDir, step: int, keep: int) -> None:
    """Export a checkpoint, and remove exports beyond the newest `keep`.

    Raises what `export.export` raises.
    """
    _, manifest = find(run.checkpoints, step)
    from atropos_hpc.learner.export import export  # imports torch

    run.exports.mkdir(exist_ok=True)
    for left in run.exports.glob(".step-*"):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    out = run.exports / f"step-{step}"
    shutil.rmtree(out, ignore_errors=True)  # of an abandoned branch of the run
    export(run, out, step, spare_bytes=sum(file.bytes for file in manifest.files))
    exports = numbered(run.exports, "step-")
    newest = sorted(exports)[-keep:]
    for number, path in exports.items():
        if number in newest:
            write_file(path / "README.md", model_card(run, number).encode(), durable=False)
        else:
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    process.die_with_parent()
    process.log_to_stderr()
    os.nice(19)
    Path("/proc/self/oom_score_adj").write_text("1000")
    parser = argparse.ArgumentParser(description="Export a step of a run to RUN/exports.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", type=int, required=True)
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    try:
        export_step(run, arguments.step, run.config().export.keep)
    except Exception as error:  # the last line of the log is what the learner shows
        log.exception("the export has failed")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
