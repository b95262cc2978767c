"""What a person sees while a run goes on: a progress line on a terminal, plain lines elsewhere; and the supervisor's log."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from atropos_hpc.contracts.members import AnyMember
from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir

PLAIN_S = 10.0  # between plain progress lines
FIGURES = (
    ("reward", "reward", ".3f"),
    ("kl", "kl_reference", ".4f"),
    ("stale", "staleness_mean", ".2f"),
    ("s/step", "time/step", ".2f"),
)


class Tail:
    """New whole lines of a growing JSON-lines file. Starts over when the file was replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._at:
                    self._at = 0
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rpartition(b"\n")[0]
        self._at += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines() if line]


class Console:
    """The live view of one run."""

    def __init__(self, run: RunDir, steps: int) -> None:
        self.steps = steps
        self.terminal = Terminal(stderr=True)
        self.metrics, self.evaluations = Tail(run.metrics), Tail(run.evaluations)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[figures]}"))  # fmt: skip
        self.progress = Progress(
            *columns, console=self.terminal, disable=not self.terminal.is_terminal
        )
        self.task = self.progress.add_task("starting", total=steps, figures="")
        self._plain_at, self._said = 0.0, ""

    @contextmanager
    def logging_to(self, path: Path) -> Iterator[None]:
        """Send the log to `path` and to the terminal, and show progress, inside this block."""
        to_file = logging.FileHandler(path)
        to_file.setFormatter(logging.Formatter(process.LOG_FORMAT))
        on_screen = (
            RichHandler(console=self.terminal, show_path=False)
            if self.terminal.is_terminal
            else logging.StreamHandler()
        )
        if not self.terminal.is_terminal:
            on_screen.setFormatter(
                logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
            )
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.INFO)
        for handler in (to_file, on_screen):
            root.addHandler(handler)
        try:
            with self.progress:
                yield
        finally:
            root.setLevel(level)
            for handler in (to_file, on_screen):
                root.removeHandler(handler)
                handler.close()

    def show(self, members: dict[str, AnyMember]) -> None:
        """Bring the view up to date."""
        for line in self.evaluations.read():
            accuracy = line.get("accuracy")
            said = (
                f"{accuracy:.3f} on {line['sequences']} held-out problems"
                if accuracy is not None
                else line.get("error", "no accuracy")
            )
            logging.getLogger("atropos_hpc.evaluation").info(
                "policy version %d: accuracy %s", line["version"], said
            )
        lines = self.metrics.read()
        if lines:
            last = lines[-1]
            figures = "  ".join(
                f"{name} {last[key]:{form}}" for name, key, form in FIGURES if key in last
            )
            self.progress.update(
                self.task, description="training", completed=last["step"], figures=figures
            )
            self._plain(f"step {last['step']}/{self.steps}  {figures}")
        elif not self.progress.tasks[0].completed:
            self._plain(_starting(members))

    def _plain(self, line: str) -> None:
        """A line now and then, where there is no terminal to draw on."""
        if self.terminal.is_terminal or line == self._said or time.monotonic() < self._plain_at:
            return
        self._plain_at, self._said = time.monotonic() + PLAIN_S, line
        logging.getLogger("atropos_hpc.progress").info(line)

    def end(self, outcome: str, summary: dict[str, Any]) -> None:
        """The last word: what came of the run."""
        words = {"finish": "complete", "stop": "stopped; the same command with this run_dir resumes it", "fail": "failed",
                 "requeue": "saved; Slurm starts it again"}  # fmt: skip
        table = Table(title=f"run {words[outcome]}", show_header=False)
        for key in (
            "accuracy_before",
            "accuracy_after",
            "steps",
            "sequences",
            "tokens",
            "wall_s",
            "restarts",
        ):
            value = summary.get(key)
            table.add_row(
                key,
                "-"
                if value is None
                else f"{value:.3f}"
                if isinstance(value, float)
                else f"{value:,}",
            )
        self.terminal.print(table)


def _starting(members: dict[str, AnyMember]) -> str:
    """Who is there and what they wait for, before the first step."""
    states = []
    for member in members.values():
        if member.kind in ("trainer", "agent", "trajectories", "evaluator"):
            waits = f" (waits for {member.waiting.what})" if member.waiting else ""
            states.append(f"{member.name} {member.state}{waits}")
    return "starting: " + ("; ".join(states) or "processes")
