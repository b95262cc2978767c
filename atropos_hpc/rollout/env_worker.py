"""One environment worker: an Atropos environment that generates and scores groups for a run.

    python -m atropos_hpc.rollout.env_worker --run-dir R --index I --environment KEY
    python -m atropos_hpc.rollout.env_worker --check --target MODULE:CLASS --config '{"field": 1}'

The second form starts nothing. It prints what is wrong with a target and its config as a JSON list
of {"key", "message"}, with keys within the environment's section. Run it in the rollout role's
Python, where the environment can be imported.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from atropos_hpc.config import environment_name
from atropos_hpc.contracts.members import EnvironmentState
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.process import DONE, REFUSED, STOPPED
from atropos_hpc.runtime.run_dir import RunDir

log = logging.getLogger(__name__)


class RateLimit(logging.Filter):
    """Pass a message the first 3 times, and then whenever its count has doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Count by the line that logs."""
        self.seen[record.lineno] += 1
        times = self.seen[record.lineno]
        if times > 3 and times & (times - 1):
            return False
        if times > 3:
            record.msg = f"{record.getMessage()} ({times} times so far)"
            record.args = ()
        return True


def quiet_atropos() -> None:
    """Limit BaseEnv's log: it has its status ten times a second, and every dropped group."""
    logger = logging.getLogger("atroposlib.envs.base")
    logger.setLevel(logging.WARNING)
    logger.addFilter(RateLimit())


def seed_everything(seed: int) -> None:
    """Seed the global generators, differently for each worker."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


async def work(run: RunDir, member: Member, index: int, key: str) -> None:
    """Run the environment at that key until cancelled. Raises TargetError."""
    from atropos_hpc.rollout import env_loader
    from atropos_hpc.rollout.env_adapter import as_member

    config = run.config()
    seed = config.seed * 1000 + index
    seed_everything(seed)
    env_loader.patch_chat_templates()
    quiet_atropos()
    environment, env_config, servers = env_loader.of_run(run, key, seed)
    name = environment_name(key) if config.more_environments else None
    env = as_member(environment)(env_config, servers, member=member, token=run.token(), label=name)
    try:
        member.update(state="registering")
        await env.env_manager()
    finally:
        await env.leave()


def run_member(member: Member, work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a member's work until it is done or SIGTERM, and return the exit code."""
    # A slow import: here, so that the member is visible during it.
    from atropos_hpc.rollout.env_loader import TargetError

    try:
        complete = asyncio.run(process.run_until_signal(work()))
    except TargetError as error:
        for problem in error.problems:
            log.error("%s", problem)
        member.leave(error=str(error))
        return REFUSED
    member.leave(complete=complete)
    return DONE if complete else STOPPED


def main() -> int:
    """Run the worker's process, or the check."""
    process.die_with_parent(signal.SIGKILL)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--index", type=int, default=0, help="this worker's number in the run")
    parser.add_argument(
        "--environment", default="environment", help="the key of its section in the config"
    )
    parser.add_argument(
        "--check", action="store_true", help="check --target and --config, and start nothing"
    )
    parser.add_argument("--target")
    parser.add_argument("--config", type=json.loads, default={}, help="as JSON")
    options = parser.parse_args()
    if options.check:
        from atropos_hpc.rollout.env_loader import check_target

        problems = check_target(options.target, options.config)
        print(json.dumps([asdict(problem) for problem in problems]))
        return DONE

    process.log_to_stderr()
    run = RunDir(options.run_dir)
    member = Member(
        run, EnvironmentState(), os.environ.get("ATROPOS_HPC_NODE", "local"), options.index
    )
    return run_member(member, lambda: work(run, member, options.index, options.environment))


if __name__ == "__main__":
    sys.exit(main())
