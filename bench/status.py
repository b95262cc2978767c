"""Measure `atropos-hpc status --once` on a long run: 100,000 steps, 500 members with logs.

CPU time of the whole command, interpreter included, against that of the same command on a run of
100 steps and 5 members."""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from atropos_hpc.contracts.members import AgentState, AnyMember, EnvironmentState, ServerState, Wait
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.runtime.run_dir import RunDir, write_json, write_struct
from bench.result import Result

ROUNDS = 7
KINDS = ("agent", "environment")
# As long a line as the learner's.
SCALARS: dict[str, float | None] = {f"scalar_{n}": 0.123456789 * n for n in range(36)}
SCALARS |= {"reward/mean": 0.5, "tokens": 1e5}


def made(path: Path, steps: int, members: int) -> Path:
    """Make a run directory as it looks in the middle of training."""
    run = RunDir(path)
    run.create()
    attempt = run.new_attempt()
    write_json(run.run_json, {"id": "x", "config": {"trainer": {"steps": 2 * steps}}})
    now = time.time()
    write_json(run.holder, {"host": "elsewhere", "pid": 1, "job": None})
    with run.metrics.open("wb") as file:
        for step in range(1, steps + 1):
            ended = now - 2 * (steps - step)
            line = StepMetrics(step, step, 0, ended, 2.0, {"wait": 1.0}, SCALARS)
            file.write(msgspec.json.encode(line) + b"\n")
    for index in range(members):
        kind = KINDS[index % 2]
        name = f"{kind}-rollout{index // 2}-0"
        about = {"name": name, "node": f"rollout{index // 2}", "host": f"n{index // 2}", "pid": 1}
        wait = Wait("quota", "the learner", now - 30) if index % 9 == 0 else None
        common = {**about, "started": now - 1e5, "state": "generating", "waiting": wait}
        state: AnyMember = EnvironmentState(**common, in_flight=32, sent=12345, tokens_per_s=100.0)
        if kind == "agent":
            servers = [
                ServerState(
                    name=f"server-{index}-{n}",
                    url="http://127.0.0.1:1",
                    version=PolicyVersion(version=steps, attempt=1),
                )
                for n in range(8)
            ]
            state = AgentState(**common, servers=servers)
        write_struct(run.members / f"{name}.json", state, durable=False)
        line = "2026-01-01 10:00:00,000 I atropos_hpc.rollout: " + "nothing unusual " * 3 + "\n"
        (attempt / f"{name}.log").write_text(
            line * 400 + "2026-01-01 10:00:00,000 W atropos_hpc.rollout: something is odd\n"
        )
    return path


def cpu_s(run: Path) -> float:
    """User and system time of one `status --once`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "atropos_hpc.cli", "status", str(run), "--once"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> Result:
    with tempfile.TemporaryDirectory() as scratch:
        large, small = (
            made(Path(scratch) / "large", 100_000, 500),
            made(Path(scratch) / "small", 100, 5),
        )
        megabytes = (large / "metrics.jsonl").stat().st_size / 1e6
        rows = [{"large, CPU-s": cpu_s(large), "small, CPU-s": cpu_s(small)} for _ in range(ROUNDS)]
    result = Result(
        list(rows),
        details={"steps": 100_000, "members": 500, "metrics.jsonl, MB": round(megabytes, 1)},
    )
    result.at_most(
        "status --once on 100,000 steps and 500 members, CPU-s, median",
        statistics.median(r["large, CPU-s"] for r in rows),
        0.5,
    )
    return result
