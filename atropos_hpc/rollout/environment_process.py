"""What the processes that run environments share: how they begin, and how they end.

It imports neither Atropos nor an environment, which takes seconds: a member file is written first.
"""

import asyncio
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from atropos_hpc.config import Config, environments
from atropos_hpc.config_rollout import OWN_ENVIRONMENTS
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.runtime import process
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.process import DONE, GAVE_UP, REFUSED, STOPPED

log = logging.getLogger(__name__)

CRASHED = 1  # exit code of a member that an exception ended: it is restarted


class TargetError(Exception):
    """The environment cannot be used as configured.

    `problems` have keys within the environment's section.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


class GaveUp(Exception):
    """Every rollout of this worker fails; the message says why."""


class EnvironmentFailed(Exception):
    """An environment's setup or get_next_item raised; the message says which, what and where."""


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
    """Limit BaseEnv's log: it has its status ten times a second, and every dropped group. What it
    logs on the root logger is logged by rollout_failures, too, with the cause."""
    logger = logging.getLogger("atroposlib.envs.base")
    logger.setLevel(logging.WARNING)
    logger.addFilter(RateLimit())
    logging.getLogger().addFilter(lambda record: "atroposlib/envs/base.py" not in record.pathname)


def seed_everything(seed: int) -> None:
    """Seed the global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def leave_out_torch(config: Config, *keys: str) -> None:
    """Have no library import torch, if these environments are this package's: they need none.

    transformers imports it for any tokenizer: half of a worker's start, and 330 MiB. Call this
    before transformers is imported.
    """
    chosen = environments(config)
    own = all(chosen[key].target.startswith(OWN_ENVIRONMENTS) for key in keys)
    if own and not config.model.trust_remote_code and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing


def run_member(member: Member[Any], work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a member's work until it is done or SIGTERM, and return the exit code.

    Whatever else ends it is in the member file, as `error`.
    """
    try:
        complete = asyncio.run(process.run_until_signal(work()))
    except TargetError as error:
        for problem in error.problems:
            log.error("%s", problem)
        member.leave(error=str(error))
        return REFUSED
    except GaveUp as error:
        log.error("%s", error)
        member.leave(error=str(error))
        return GAVE_UP
    except (Exception, SystemExit) as error:
        log.exception("ending")
        name = getattr(member.state, "environment", "") or member.name
        own = isinstance(error, EnvironmentFailed)
        member.leave(error=str(error) if own else f"{name}: {describe_error(error)}")
        return CRASHED
    member.leave(complete=complete)
    return DONE if complete else STOPPED
