"""GSM8K end to end on one GPU that learner and server share, and the recovery from a killed server.

With a real model and GSM8K's files: GPU_STEPS steps of 256 sequences, and an evaluation of held-
out problems before and after. Without a GPU: the demo's model and task, a few steps. In the
middle, the server's processes get SIGKILL; `recovery s` is the time until a server that serves a
policy version is in the roster again. The run has to complete.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from atropos_hpc.contracts.members import AgentState, ServerState
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import RosterReader
from atropos_hpc.runtime.run_dir import RunDir
from bench.gpu import parts

GPU_STEPS = int(os.environ.get("ATROPOS_HPC_GPU_STEPS", "10"))
CPU_STEPS = 60  # the run has to outlast the server's restart
KILL_AT = 4
PATIENCE_S = 420.0


def overrides(options: Any, run_dir: Path, gpu: bool) -> list[str]:
    """The command line of the run."""
    common = [f"run_dir={run_dir}", f"roles.rollout.python={options.rollout_python}", "seed=0"]
    if not gpu or options.model is None:
        return [
            *common,
            f"trainer.steps={CPU_STEPS}",
            "evaluation.before=false",
            "evaluation.after=false",
        ]
    return [
        *common,
        "experiment=gsm8k_one_gpu",
        f"model.path={options.model}",
        f"environment.config.train_path={options.data / 'train.jsonl'}",
        f"environment.config.test_path={options.data / 'test.jsonl'}",
        f"trainer.steps={GPU_STEPS}",
        "rollout.enforce_eager=true",
        "environment.config.dataset=null",
        "launch.check_versions=false",
    ]


def serving(run_dir: Path) -> list[ServerState]:
    """The servers in the roster that serve a version."""
    agents = RosterReader(RunDir(run_dir).roster).members(AgentState)
    return [server for agent in agents for server in agent.servers if server.version is not None]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    found = [orjson.loads(line) for line in lines if line.endswith(b"}")]
    return [
        {**line, **line["scalars"], "time/step": line["step_s"]}
        | {f"time/{name}": seconds for name, seconds in line["phases"].items()}
        for line in found
    ]


def kill_server(run_dir: Path) -> float:
    """SIGKILL to a server and its engine; seconds until a server serves again."""
    victim = serving(run_dir)[0]
    assert victim.pid is not None
    for pid in [victim.pid, *process.descendants_of(victim.pid)]:
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    parts.wait_until(
        lambda: not any(s.pid == victim.pid for s in serving(run_dir)),
        60,
        "the dead server's removal from the roster",
    )
    parts.wait_until(lambda: serving(run_dir), PATIENCE_S, "a replaced server's return")
    return time.monotonic() - start


def main() -> None:
    options, gpu = parts.options(__doc__), parts.has_gpu()
    run_dir = options.logs / "run"
    total = GPU_STEPS if gpu and options.model is not None else CPU_STEPS
    command = [sys.executable, "-m", "atropos_hpc.train", *overrides(options, run_dir, gpu)]
    begin = time.monotonic()
    child = subprocess.Popen(command)
    recovery, memory = None, 0.0
    try:
        kill_at = KILL_AT if total > KILL_AT else 1
        deadline = begin + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            memory = max(memory, parts.device_memory_used())
            if recovery is None and len(steps(run_dir)) >= kill_at:
                recovery = kill_server(run_dir)
            time.sleep(1.0)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
    done = steps(run_dir)
    calm = [line for line in done[2:] if line["step"] not in range(kill_at, kill_at + 4)] or done
    middle = {
        name: statistics.median(line[name] for line in calm if name in line)
        for name in (
            "time/step",
            "time/wait",
            "time/log_probs",
            "time/update",
            "time/publish",
            "tokens",
        )
        if any(name in line for line in calm)
    }
    accuracies = [line["accuracy"] for line in evaluations(run_dir)]
    row = {
        "what": f"run: {len(done)} of {total} steps, exit code {child.returncode}",
        **middle,
        "reward first": done[0]["reward/mean"] if done else 0.0,
        "reward last": statistics.mean(line["reward/mean"] for line in done[-5:]) if done else 0.0,
        "mismatch of log-probs, mean nats": statistics.median(
            line.get("off_policy/abs_log_ratio_mean", 0.0) for line in done
        )
        if done
        else 0.0,
        "accuracy before and after": accuracies,
        "recovery s": recovery,
        "peak device memory GiB": memory,
        "wall s": time.monotonic() - begin,
    }
    row["ok"] = child.returncode == 0 and len(done) == total and recovery is not None
    parts.save_rows(options.out, [row])
    print(json.dumps(row), flush=True)
    sys.exit(0 if row["ok"] else 1)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return [
            orjson.loads(line) for line in (run_dir / "evaluations.jsonl").read_bytes().splitlines()
        ]
    except OSError:
        return []


if __name__ == "__main__":
    main()
