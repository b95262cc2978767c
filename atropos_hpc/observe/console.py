"""The live view of a run: a progress bar on a terminal, plain lines elsewhere; the run's log."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from atropos_hpc.contracts.members import AnyMember
from atropos_hpc.contracts.metrics import Evaluation, StepMetrics, Summary
from atropos_hpc.observe.terminal import column, terminal
from atropos_hpc.runtime import masking, process
from atropos_hpc.runtime.run_dir import RunDir, last_records, read_records

LOOK_S = 0.5
RECENT = 10  # evaluations that a look reads
PLAIN_INTERVAL_S = 10.0  # between plain progress lines
METRICS = (
    ("reward", "reward/mean", ".3f"),
    ("kl", "kl_reference", ".4f"),
    ("stale", "off_policy/staleness_mean", ".2f"),
)
OUTCOMES: dict[str, str] = {
    "finish": "complete",
    "stop": "stopped; the same command with this run_dir resumes it",
    "fail": "failed",
    "requeue": "saved; Slurm starts it again",
}
SUMMARY_ROWS = "accuracy_before accuracy_after steps sequences tokens wall_s restarts"


class Console:
    def __init__(self, run: RunDir, steps: int) -> None:
        self.run, self.steps = run, steps
        self.terminal = terminal(stderr=True)
        self.progress = Progress(
            column("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            column("{task.fields[metrics]}"),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=steps, metrics="")
        self._alarms: dict[str, str] = {}  # by member
        self._next_look, self._next_plain, self._last_plain = 0.0, 0.0, ""
        self._evaluated = {line.version for line in read_records(run.evaluations, Evaluation)}

    @contextmanager
    def logging_to(self, path: Path) -> Iterator[None]:
        """Log to `path` and to the terminal, and show progress, inside this block."""
        to_file = logging.FileHandler(path)
        to_file.setFormatter(logging.Formatter(process.LOG_FORMAT))
        to_terminal: logging.Handler = RichHandler(console=self.terminal, show_path=False)
        if not self.terminal.is_terminal:
            to_terminal = logging.StreamHandler()
            plain = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
            to_terminal.setFormatter(plain)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.INFO)
        for handler in (to_file, to_terminal):
            handler.addFilter(masking.MaskingFilter())
            root.addHandler(handler)
        try:
            with self.progress:
                yield
        finally:
            root.setLevel(level)
            for handler in (to_file, to_terminal):
                root.removeHandler(handler)
                handler.close()

    def show(self, members: Mapping[str, AnyMember]) -> None:
        """Update the view, at most once per LOOK_S."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        self._log_evaluations()
        self._log_alarms(members)
        if lines := last_records(self.run.metrics, StepMetrics, 1):
            last = lines[0]
            values = [(label, last.get(name), form) for label, name, form in METRICS]
            shown = [
                f"{label} {value:{form}}" for label, value, form in values if value is not None
            ]
            metrics = "  ".join([*shown, f"s/step {last.step_s:.2f}"])
            self.progress.update(
                self.task, description="training", completed=last.step, metrics=metrics
            )
            self._log_plain(f"step {last.step}/{self.steps}  {metrics}")
        else:
            self._log_plain(_starting(members))

    def _log_alarms(self, members: Mapping[str, AnyMember]) -> None:
        """Log what keeps failing in a member while the others wait for it, when that changes."""
        log = logging.getLogger("atropos_hpc.alarm")
        alarms = {name: member.alarm for name, member in members.items() if member.alarm}
        for name, alarm in alarms.items():
            if self._alarms.get(name) != alarm:
                log.error("%s: %s", name, alarm)
        for name in self._alarms.keys() - alarms.keys():
            log.info("%s: resolved", name)
        self._alarms = alarms

    def _log_evaluations(self) -> None:
        log = logging.getLogger("atropos_hpc.evaluation")
        for line in last_records(self.run.evaluations, Evaluation, RECENT):
            if line.version not in self._evaluated:
                self._evaluated.add(line.version)
                result = line.error or "no accuracy"
                if line.accuracy is not None:
                    result = f"{line.accuracy:.3f} on {line.sequences} held-out problems"
                log.info("policy version %d: accuracy %s", line.version, result)

    def _log_plain(self, line: str) -> None:
        """Log a progress line every few seconds where there is no terminal to draw on."""
        now = time.monotonic()
        if self.terminal.is_terminal or line == self._last_plain or now < self._next_plain:
            return
        self._next_plain, self._last_plain = now + PLAIN_INTERVAL_S, line
        logging.getLogger("atropos_hpc.progress").info(line)

    def end(self, outcome: str, summary: Summary) -> None:
        """Print how the run ended."""
        self._log_evaluations()
        table = Table(title=f"run {OUTCOMES[outcome]}", show_header=False)
        for name in SUMMARY_ROWS.split():
            value = getattr(summary, name)
            form = ".3f" if isinstance(value, float) else ","
            table.add_row(name, "-" if value is None else format(value, form))
        self.terminal.print(table)


def _starting(members: Mapping[str, AnyMember]) -> str:
    """Describe the members and what they wait for, before the first step."""
    states = []
    for member in members.values():
        if member.kind in ("trainer", "agent", "trajectories", "evaluator"):
            wait = f" (waits for {member.waiting.what})" if member.waiting else ""
            states.append(f"{member.name} {member.state}{wait}")
    return "starting: " + ("; ".join(states) or "processes")
