"""A run that ends because of its environment: `python ending_stand_in.py DIRECTORY CODE ERROR`.

It is launched as by the real command. Both roles' Python is this file again: the real node agent,
but without vLLM servers; a worker that ends with that exit code and error; and a learner that saves
when it is asked to.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

ENDED = "ENDED"  # JSON: exit code and error of the worker


def launch(directory: Path, code: int, error: str) -> int:
    from atropos_hpc.config import Config, EnvironmentConf, ModelConf
    from atropos_hpc.launch.run import launch

    os.environ[ENDED] = json.dumps([code, error])
    model, python = directory / "model", directory / "python"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    python.chmod(0o755)
    config = Config(run_dir=str(directory / "run"), model=ModelConf(path=str(model)))
    config.environment = EnvironmentConf(target="environment:Env", python=str(python))
    config.launch.restarts, config.evaluation.every = 0, 0
    config.evaluation.before = config.evaluation.after = False
    config.roles.trainer.python = config.roles.rollout.python = str(python)
    return launch(config, directory / "run", requeue=lambda: None, checked=True)


def role(words: list[str]) -> int:
    from atropos_hpc.contracts.members import EnvironmentState, StopRequest
    from atropos_hpc.rollout.node_agent import NodeAgent
    from atropos_hpc.runtime import process
    from atropos_hpc.runtime.membership import Member, pending_request
    from atropos_hpc.runtime.run_dir import RunDir

    process.die_with_parent()
    run, node = RunDir(Path(words[words.index("--run-dir") + 1])), os.environ[process.NODE]
    if words[1] == "atropos_hpc.learner":
        while pending_request(run, StopRequest) is None:
            time.sleep(0.02)
        return process.STOPPED
    if words[1] == "atropos_hpc.rollout.env_worker":
        code, error = json.loads(os.environ[ENDED])
        Member(run, EnvironmentState(), node).leave(error=error)
        return int(code)
    agent = NodeAgent(run, node, 0)
    agent.config.rollout.servers = 0
    asyncio.run(agent.work())
    agent.end()
    return process.REFUSED if agent.refused is not None else process.STOPPED


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(role(words) if words[0] == "-m" else launch(Path(words[0]), int(words[1]), words[2]))
