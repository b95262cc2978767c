"""A whole run as a child process: what the tests of whole runs and the fault harness share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from run_files import step_metrics

from atropos_hpc.runtime import process
from atropos_hpc.runtime.run_dir import RunDir, read_json

QUICK = [
    "evaluation.every=0",
    "evaluation.before=false",
    "evaluation.after=false",
    "trainer.checkpoint_every=3",
    "launch.backoff_s=0.5",
]


class Started:
    """A run as a child process, in a directory of its own."""

    def __init__(
        self, path: Path, steps: int, *overrides: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.run = RunDir(path / "run")
        self.command = [
            sys.executable,
            "-m",
            "atropos_hpc.train",
            f"run_dir={self.run.path}",
            "experiment=arithmetic_cpu",
            f"trainer.steps={steps}",
            *QUICK,
            *overrides,
        ]
        self.output = path / "output.log"
        self.env = {**os.environ, **(env or {})}
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        with self.output.open("ab") as output:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.output.parent,
                env=self.env,
            )

    def until(self, what: str, look: Callable[[], Any], seconds: float = 420) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := look()):
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.story()}"
            assert time.monotonic() < deadline, f"no {what} after {seconds} s:\n{self.story()}"
            time.sleep(0.1)
        return found

    def step(self, number: int) -> None:
        self.until(f"step {number}", lambda: len(step_metrics(self.run)) >= number)

    def end(self, seconds: float = 420) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the run did not end within {seconds} s:\n{self.story()}"
            ) from None

    def pid(self, name: str) -> int:
        """Of a member or of an agent's child."""
        members = read_json(self.run.roster)["members"].values()
        pids = {m["name"]: m["pid"] for m in members if m["alive"]}
        for agent in (m for m in members if m["kind"] == "agent" and m["alive"]):
            pids |= {server["name"]: server["pid"] for server in agent["servers"]} | agent[
                "children"
            ]
        return next(
            pid for known, pid in pids.items() if known.startswith(name) and pid is not None
        )

    def log(self, name: str) -> str:
        return "".join(
            path.read_text(errors="replace")
            for path in sorted(self.run.path.glob(f"logs/attempt-*/{name}.log"))
        )

    def story(self) -> str:
        logs = [
            f"--- {path.name}\n{process.tail(path, 15)}"
            for path in sorted(self.run.logs.glob("*.log"))
        ]
        return "\n".join([process.tail(self.output, 40), *logs])

    def steps(self) -> list[int]:
        return [line.step for line in step_metrics(self.run)]

    def left(self) -> list[str]:
        """Command lines of processes that still name the run directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                except OSError:
                    continue
                if str(self.run.path) in command:
                    found.append(command)
        return found

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 20
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
