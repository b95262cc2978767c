"""A stand-in for both roles' Python, for tests of what happens around a run.

It understands the command lines that the supervisor and the checks use, without a model or a
server. Its learner has steps of a fifth of a second, taken while an agent is alive, and keeps the
contracts that matter outside it: metrics.jsonl, checkpoints/latest.json, done.json, the stop
request, TERM and USR2, exit codes. tests/test_stand_in.py compares it with the real roles."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEP_S = 0.2
SILENT_S, ASK_S = 8.0, 3.0  # a third of the real agent's: the cluster notices a dead node in 10 s


def learner(path: Path) -> int:
    import msgspec

    from atropos_hpc.contracts.members import AgentState, StopRequest, TrainerState
    from atropos_hpc.contracts.metrics import StepMetrics
    from atropos_hpc.runtime.membership import Member, RosterReader, pending_request
    from atropos_hpc.runtime.run_dir import (
        RunDir,
        append_record,
        read_json,
        read_records,
        write_file,
        write_json,
    )

    run, terms = RunDir(path), []  # type: tuple[RunDir, list[int]]
    for asked_by in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(asked_by, lambda number, _: terms.append(number))
    if run.config().trainer.steps == 77:
        raise RuntimeError("trainer.steps=77 is more than this stand-in takes")
    conf, rank = run.config().trainer, int(os.environ["RANK"])
    step = read_json(run.checkpoints / "latest.json").get("step", 0)
    state = TrainerState(rank=rank, step=step, step_id=os.environ["ATROPOS_HPC_STEP"])
    member = Member(run, state, os.environ["ATROPOS_HPC_NODE"], rank)
    roster = RosterReader(run.roster)
    variables = os.environ
    local = f"{variables['LOCAL_RANK']} of {variables['LOCAL_WORLD_SIZE']}"
    where = f"rank {rank} of {variables['WORLD_SIZE']} ({local}) at {variables['ATROPOS_HPC_HOST']}"
    print(f"{where} starts at step {step}", flush=True)
    if run.config().roles.trainer.gpus_per_node:
        from atropos_hpc.runtime import devices

        local_rank = int(variables["LOCAL_RANK"])
        devices.keep_own_instance(variables, local_rank)
        visible = devices.visible_devices(variables, 0)
        own = visible[devices.local_device(local_rank, len(visible))]
        print(f"rank {rank} on {variables['SLURMD_NODENAME']} uses GPUs {own}", flush=True)
    if rank == 0:
        write_file(
            run.metrics,
            b"".join(
                msgspec.json.encode(line) + b"\n"
                for line in read_records(run.metrics, StepMetrics)
                if line.step <= step
            ),
        )
    while step < conf.steps:
        time.sleep(STEP_S)
        if terms or pending_request(run, StopRequest) is not None:
            print(f"rank {rank} saves at step {step}", flush=True)
            if rank == 0:
                time.sleep(0.5)
                write_json(
                    run.checkpoints / "latest.json", {"step": step, "directory": f"step-{step}-0"}
                )
            member.leave()
            return 75
        if rank == 0 and roster.members(AgentState):
            step += 1
            scalars = {"reward/mean": step / conf.steps}
            line = StepMetrics(step, step, run.attempt(), time.time(), STEP_S, {}, scalars)
            append_record(run.metrics, line)
            if step % conf.checkpoint_every == 0:
                write_json(
                    run.checkpoints / "latest.json", {"step": step, "directory": f"step-{step}-0"}
                )
        elif rank:
            step = max((line.step for line in read_records(run.metrics, StepMetrics)), default=0)
    if rank == 0:
        write_json(run.checkpoints / "latest.json", {"step": step, "directory": f"step-{step}-0"})
        write_json(run.done, {"version": step})
    member.leave()
    return 0


def agent(path: Path, index: str) -> int:
    from atropos_hpc.contracts.members import AgentState
    from atropos_hpc.rollout.leader_failover import LeaderFailover
    from atropos_hpc.runtime.membership import Member
    from atropos_hpc.runtime.run_dir import RunDir

    terms: list[int] = []
    for asked_by in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(asked_by, lambda number, _: terms.append(number))
    logging.basicConfig(level=logging.INFO)
    run = RunDir(path)
    member = Member(run, AgentState(), os.environ["ATROPOS_HPC_NODE"])
    watch = LeaderFailover(run, silent_s=SILENT_S, ask_s=ASK_S)
    print(
        f"agent {index} on {os.environ.get('SLURMD_NODENAME')} at {os.environ['ATROPOS_HPC_HOST']}",
        flush=True,
    )
    show_server_gpus(run)
    while not terms and not watch.abandoned(member.state):
        time.sleep(0.2)
        watch.poll()
    member.leave()
    watch.await_certainty()
    return 75


def show_server_gpus(run: Any) -> None:
    """Start a process for each vLLM server, with its variables, which prints its GPUs."""
    if not (config := run.config()).roles.rollout.gpus_per_node:
        return
    from atropos_hpc.rollout.managed_server import own_hardware

    for i in range(config.rollout.servers):
        told = f'echo "server {i} on $SLURMD_NODENAME uses GPUs $CUDA_VISIBLE_DEVICES"'
        variables = {**os.environ, **own_hardware(config, i)}
        subprocess.run(["sh", "-c", told], env=variables, check=True)


def main(words: list[str]) -> int:
    if words[0] == "-c" or "--check" in words:  # the checks before a run
        print("null" if "AutoConfig" in words[1] else "[]")  # a model's limit; problems
        return 0
    options: dict[str, Any] = dict(zip(words[2::2], words[3::2], strict=True))
    if words[1] == "atropos_hpc.learner":
        return learner(Path(options["--run-dir"]))
    return agent(Path(options["--run-dir"]), options["--index"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
