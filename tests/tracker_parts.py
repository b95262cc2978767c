"""One attempt of a run that reports to all trackers, in a process of its own.

    python tests/tracker_parts.py DIR FIRST LAST [EVALUATION...] [ENDING] [--kill]

makes the steps FIRST to LAST, after an evaluation of each given version. ENDING is COMPLETE without
another one. With --kill the process kills itself then: all steps but the last were logged to each
tracker, and written by some.
"""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.metrics import Evaluation, Rollout, Tracked
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.observe.trackers import Ending, open_later
from atropos_hpc.runtime.process import log_to_stderr
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records
from atropos_hpc.runtime.waiting import wait_for


def main(directory: str, first: str, last: str, *others: str) -> None:
    log_to_stderr()
    run = RunDir(Path(directory))
    run.new_attempt()
    resume_at = int(first) - 1
    writer = MetricsWriter(run, open_later(run, run.config()), resume_at)
    for version in (each for each in others if each.isdecimal()):
        append_record(run.evaluations, Evaluation(int(version), int(version) / 8, EVALUATED))
    for step in range(int(first), int(last) + 1):
        if "--kill" in others and step == int(last):
            logged = partial(all_logged, writer._feed._followers, run)
            wait_for("all lines", "the trackers", logged, 120.0)
        rows = [
            Rollout(step, "e", 0, 0, 1.0, [5], [(0, 1)], prompt="1+1", completion=f"two {step}")
        ]
        writer.sample(step, 10, lambda rows=rows: rows)
        writer.write(step, {"reward/mean": step + run.attempt() / 8}, StepTimes(1.5, {}))
    if "--kill" in others:
        os.kill(os.getpid(), signal.SIGKILL)
    writer.close(next((each for each in Ending if each.name in others), Ending.COMPLETE))


def all_logged(followers: Sequence[Any], run: RunDir) -> bool:
    newest = read_records(run.tracked, Tracked)[-1].number
    return all(follower.delivered == newest for follower in followers)


EVALUATED = {"eval/e/pass@4": 0.5}
if __name__ == "__main__":
    main(*sys.argv[1:])
