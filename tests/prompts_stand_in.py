"""Both roles of a run whose prompts are real and whose model is not, for tests of lost nodes.

The trajectory server, the node agents and the environment workers are the real ones. An agent has a
stub of a vLLM server, which samples at random. The learner leases batches from the real server,
trains nothing, and acknowledges what its checkpoints hold."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import slurm_stand_in

STEP_S = 0.2


def learner(path: Path) -> int:
    from atropos_hpc.contracts.members import StopRequest, TrainerState
    from atropos_hpc.contracts.metrics import StepMetrics
    from atropos_hpc.environments.addition import VOCABULARY
    from atropos_hpc.learner.main import register
    from atropos_hpc.runtime import process
    from atropos_hpc.runtime.membership import Member, RosterReader, pending_request
    from atropos_hpc.runtime.run_dir import RunDir, append_record, read_json, write_json
    from atropos_hpc.trajectories.client import TrajectoryClient

    run, terms = RunDir(path), []  # type: tuple[RunDir, list[int]]
    for asked_by in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(asked_by, lambda number, _: terms.append(number))
    config, rank = run.config(), int(os.environ["RANK"])
    step = read_json(run.checkpoints / "latest.json").get("step", 0)
    state = TrainerState(rank=rank, step=step, step_id=os.environ["ATROPOS_HPC_STEP"])
    member = Member(run, state, os.environ["ATROPOS_HPC_NODE"], rank)
    print(f"rank {rank} starts at step {step}", flush=True)

    def stopped() -> bool:
        return bool(terms) or pending_request(run, StopRequest) is not None

    def save() -> None:
        write_json(run.checkpoints / "latest.json", {"step": step, "directory": f"step-{step}-0"})
        if step:
            client.ack(step - 1)

    if rank:  # the other ranks of a real learner lease nothing of their own here
        while not stopped() and not run.done.exists():
            time.sleep(STEP_S)
        member.leave()
        return process.STOPPED if stopped() else process.DONE
    client = TrajectoryClient(RosterReader(run.roster).trajectory_server, run.token(), 60.0)
    register(run, config, client, len(VOCABULARY), step)
    while step < config.trainer.steps and not stopped():
        if client.lease(step, 0, 1, 0, step, wait_s=1.0) is None:
            continue
        time.sleep(STEP_S)
        step += 1
        line = StepMetrics(step, step, run.attempt(), time.time(), STEP_S, {}, {})
        append_record(run.metrics, line)
        if step % config.trainer.checkpoint_every == 0:
            save()
    save()
    if step == config.trainer.steps:
        write_json(run.done, {"version": step})
    member.leave()
    return process.DONE if step == config.trainer.steps else process.STOPPED


def agent(path: Path, index: int) -> int:
    from atropos_hpc.contracts.members import ServerState
    from atropos_hpc.contracts.policy import PolicyVersion
    from atropos_hpc.environments.addition import EOS, VOCABULARY
    from atropos_hpc.rollout.node_agent import NodeAgent
    from atropos_hpc.rollout.trial import Generation, StubServer, VersionSpan
    from atropos_hpc.runtime import process
    from atropos_hpc.runtime.run_dir import RunDir

    version = PolicyVersion(version=0, attempt=1)

    class Stub(StubServer):
        def _sample(self, *arguments: object) -> Generation:
            answer = super()._sample(*arguments)
            answer.weight_versions = [VersionSpan(str(version), 0, len(answer.token_ids))]
            return answer

    class Agent(NodeAgent):
        url = ""

        def _report(self) -> None:
            servers = [ServerState(name=f"server-{index}-0", url=self.url, version=version)]
            self.member.update_if_changed(state="serving", servers=servers)

    process.die_with_parent()
    process.adopt_orphans()
    process.log_to_stderr()
    node = Agent(RunDir(path), os.environ[process.NODE], index)
    longest, node.config.rollout.servers = node.config.model.max_length, 0

    async def work() -> None:
        async with Stub(len(VOCABULARY), VOCABULARY.index(EOS), longest) as stub:
            node.url = stub.url
            await node.work()

    try:
        asyncio.run(process.run_until_signal(work()))
    finally:
        node.end()
    return process.STOPPED


def main(words: list[str]) -> int:
    if words[0] == "-c" or "--check" in words:
        return slurm_stand_in.main(words)
    options = dict(zip(words[2::2], words[3::2], strict=True))
    if words[1] == "atropos_hpc.learner":
        return learner(Path(options["--run-dir"]))
    return agent(Path(options["--run-dir"]), int(options["--index"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
