"""One environment worker: an Atropos environment that generates and scores groups for a run.

    python -m atropos_hpc.rollout.env_worker --run-dir R --index I --environment KEY
    python -m atropos_hpc.rollout.env_worker --check < run.json

The second form prints what is wrong with the target and config of `environment` as a JSON list of
{"key", "message"}, with keys within the environment's section. With --trial it also rolls a group
out against a stub of the servers. Run it in the rollout role's Python, where the environment can be
imported. The config comes by stdin, because everybody on the machine can read a command line.
"""

import argparse
import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from atropos_hpc.config import environment_name, environments
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.members import EnvironmentState, Wait
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.rollout.environment_process import (
    EnvironmentFailed,
    GaveUp,
    leave_out_torch,
    quiet_atropos,
    run_member,
    seed_everything,
)
from atropos_hpc.runtime import process
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.process import DONE, STUCK
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.stall_watch import StallWatch

log = logging.getLogger(__name__)

MAIN_LOOP = "a turn of the worker's main loop, or get_next_item(),"
STALL_PART = 0.5  # of the learner's timeout: what blocks the main loop for longer is killed


async def work(run: RunDir, member: Member[EnvironmentState], index: int, key: str) -> None:
    """Run the environment at that key until cancelled. Raises TargetError and GaveUp."""
    from atropos_hpc.rollout import env_loader
    from atropos_hpc.rollout.env_adapter import as_member
    from atropos_hpc.rollout.prompt_draws import Drawer, attempt_of
    from atropos_hpc.rollout.rollout_failures import Losses, Patience, files_of

    config = run.config()
    own_seed = seed = config.seed * 1000 + index
    if config.trajectories.server == "durable":
        seed = config.seed  # a draw's number names the same prompt in every worker
    name = f"{key} ({environments(config)[key].target})"
    member.update(environment=name)
    with StallWatch(
        lambda why: end_stalled(member, f"{name}: {why}"),
        excused=lambda: waits_for_server(member.state.waiting),
    ) as stall:
        seed_everything(seed)
        env_loader.patch_atropos()
        quiet_atropos()
        stall.expect("the import", config.launch.start_timeout_s)
        environment, env_config, servers = env_loader.of_run(run, key, seed)
        stall.files = files_of(environment)
        limits = config.rollout
        patience, short = None, environment_name(key)
        if limits.give_up_after_groups is not None:
            patience = Patience(limits.give_up_after_groups, limits.give_up_after_s)
        env = as_member(environment)(
            env_config,
            servers,
            member=member,
            token=run.token(),
            losses=Losses(name, patience, stall.files),
            drawer=Drawer(
                short, member.name, attempt_of(run), short if config.more_environments else None
            ),
        )
        seed_everything(own_seed)  # of what the rollouts draw
        turn_s = STALL_PART * min(config.launch.start_timeout_s, config.launch.step_timeout_s)
        env.on_turn = lambda: stall.expect(MAIN_LOOP, turn_s)
        try:
            member.update(state="registering")
            stall.expect("the environment's setup()", config.launch.start_timeout_s)
            await env.env_manager()
        except GaveUp:
            raise
        except Exception as error:
            raise EnvironmentFailed(f"{name}: {describe_error(error, stall.files)}") from error
        finally:
            stall.stop()
            await env.leave()
            member.update_if_changed(**env.losses.state())


def waits_for_server(wait: Wait | None) -> bool:
    """Whether a worker waits for what is not the environment's fault."""
    return wait is not None and wait.from_whom in ("the trajectory server", "the learner")


def end_stalled(member: Member[Any], error: str) -> None:
    """End this process, which no longer gets on; the supervision decides what follows."""
    log.error("%s", error)
    faulthandler.dump_traceback(sys.stderr)
    member.leave(error=error)
    os._exit(STUCK)


def check(options: argparse.Namespace) -> NoReturn:
    """Check an environment, print the problems, and end this process, whatever it has started."""
    info = sys.stdin.buffer.read()
    config = msgspec.json.decode(info, type=RunInfo).config
    leave_out_torch(config, "environment")
    from atropos_hpc.rollout.env_loader import check_target, patch_chat_templates
    from atropos_hpc.rollout.trial import try_out

    conf = config.environment

    def end(*problems: Problem) -> NoReturn:
        print("\n" + msgspec.json.encode(problems).decode(), flush=True)
        os._exit(DONE)

    def end_failed(why: str) -> None:
        skip = f"{options.environment}.trial_timeout_s=0 skips the trial"
        end(Problem("target", f"{conf.target}: {why} ({skip})"))

    stall = StallWatch(end_failed)
    stall.expect("the import", options.timeout_s)
    problems = check_target(conf.target, conf.config)
    if problems or not options.trial:
        end(*problems)
    patch_chat_templates()
    quiet_atropos()
    wrong = try_out(info, lambda what: stall.expect(what, options.timeout_s))
    if wrong is not None and wrong.key == "target":
        end_failed(f"a trial rollout failed: {wrong.message}")
    end(*([wrong] if wrong else []))


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
        "--check",
        action="store_true",
        help="check the environment of the run.json on stdin, and start no worker",
    )
    parser.add_argument(
        "--trial", action="store_true", help="with --check: try the environment out, too"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=float("inf"), help="with --check: of each part"
    )
    options = parser.parse_args()
    if options.check:
        check(options)

    process.log_to_stderr()
    run = RunDir(options.run_dir)
    leave_out_torch(run.config(), options.environment)
    node = os.environ.get(process.NODE, "local")
    member = Member(run, EnvironmentState(), node, options.index)
    return run_member(member, lambda: work(run, member, options.index, options.environment))


if __name__ == "__main__":
    sys.exit(main())
