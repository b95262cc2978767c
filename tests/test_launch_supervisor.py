"""The supervisor with real processes: small programs that end as the real ones do."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atropos_hpc.config import Config, LaunchConf
from atropos_hpc.contracts.members import AnyMember, EnvironmentState, LossReason
from atropos_hpc.contracts.metrics import StepMetrics
from atropos_hpc.launch.steps import Step
from atropos_hpc.launch.supervisor import Supervisor
from atropos_hpc.launch.sweep_point import Point
from atropos_hpc.runtime import slurm
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.process import ProcessSpec
from atropos_hpc.runtime.restart_policy import Action
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_json, write_json
from atropos_hpc.runtime.slurm import SlurmError

LAUNCH = LaunchConf(restarts=0, backoff_s=0.01, save_timeout_s=2.0, grace_s=0.5)
QUICK = Config(run_dir="", launch=LAUNCH)
FOR_EVER = "import time; time.sleep(600)"
SAVES = """
import os, pathlib, sys, time
while not pathlib.Path({requests!r}, "stop.json").exists():
    time.sleep(0.05)
pathlib.Path({saved!r}).touch()
sys.exit(75)
"""


def step(kind: str, *programs: str) -> Step:
    processes = (
        ProcessSpec(f"{kind}-{i}", (sys.executable, "-c", each), {"ATROPOS_HPC_NODE": kind})
        for i, each in enumerate(programs)
    )
    return Step(kind, kind, tuple(processes))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    run.new_attempt()
    return run


def no_watch(_members: dict[str, AnyMember]) -> None:
    return None


def supervise(
    run: RunDir,
    *steps: Step,
    watch: Callable[[dict[str, AnyMember]], Action | None] = no_watch,
) -> Action:
    return Supervisor(run, QUICK, list(steps), watch).supervise()


def test_the_learner_saves_before_a_run_fails_for_want_of_rollout_nodes(
    run: RunDir, tmp_path: Path
) -> None:
    learner = SAVES.format(requests=str(run.requests), saved=str(tmp_path / "saved"))
    assert (
        supervise(run, step("agent", "import sys; sys.exit(1)"), step("trainer", learner))
        is Action.FAIL
    )
    assert (tmp_path / "saved").exists()


SAYS = """
import sys
from pathlib import Path
from atropos_hpc.contracts.members import {kind}
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.run_dir import RunDir
Member(RunDir(Path({run!r})), {kind}({fields}), {node!r}).leave(error={error!r})
sys.exit({code})
"""


def test_a_run_that_fails_fails_with_the_error_of_the_member_for_which_it_fails(
    run: RunDir,
) -> None:
    error = "environment-0 gave up: environment (my_env.py:E): ValueError: bad (my_env.py:7)"
    agent = SAYS.format(
        kind="AgentState", fields="", run=str(run.path), node="agent", error=error, code=2
    )
    supervisor = Supervisor(run, QUICK, [step("agent", agent), step("trainer", FOR_EVER)], no_watch)
    assert supervisor.supervise() is Action.FAIL
    assert supervisor.error == error
    assert read_json(run.members / "supervisor-trainer0-0.json")["error"] == error


def test_a_learner_that_waits_in_vain_fails_with_what_the_environments_lost(run: RunDir) -> None:
    reason = LossReason(kind="equal_scores", count=812, text="all scores of the group are equal")
    worker = EnvironmentState(environment="environment (my_env.py:E)", unsent=900, reasons=[reason])
    member = Member(run, worker, "agent")
    trainer = SAYS.format(
        kind="TrainerState", fields="", run=str(run.path), node="n", error="no batch 0", code=70
    )
    supervisor = Supervisor(run, QUICK, [step("trainer", trainer)], no_watch)
    assert supervisor.supervise() is Action.FAIL
    member.leave()
    assert supervisor.error is not None
    for text in ("no batch 0", "environment (my_env.py:E)", "812 times", reason.text):
        assert text in supervisor.error


def test_a_learner_that_does_not_save_in_time_is_ended(run: RunDir) -> None:
    assert (
        supervise(run, step("agent", "import sys; sys.exit(2)"), step("trainer", FOR_EVER))
        is Action.FAIL
    )


def test_a_rank_that_stays_when_the_others_have_left_does_not_hold_the_run(run: RunDir) -> None:
    write_json(run.done, {"version": 1})
    assert supervise(run, step("trainer", "pass", FOR_EVER)) is Action.FINISH


def test_a_run_directory_that_is_away_for_a_moment_ends_nothing(run: RunDir) -> None:
    program = (
        f"import time; time.sleep(3); open({str(run.done)!r}, 'w').write('{{\"version\": 1}}')"
    )
    started, away = time.monotonic(), run.members.with_name("away")

    def watch(_members: dict[str, AnyMember]) -> None:
        if not away.exists() and time.monotonic() - started < 1:
            run.members.rename(away)

    def back() -> None:
        time.sleep(1.5)
        shutil.rmtree(run.members, ignore_errors=True)
        away.rename(run.members)

    thread = threading.Thread(target=back)
    thread.start()
    assert supervise(run, step("trainer", program), watch=watch) is Action.FINISH
    thread.join()
    assert read_json(run.members / "supervisor-trainer0-0.json")["outcome"] == "finish"


def test_what_slurm_is_asked_for_is_tried_until_the_controller_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([SlurmError("scontrol: Unable to contact slurm controller"), "42"])

    def submit() -> str:
        if isinstance(answer := next(answers), SlurmError):
            raise answer
        return answer

    assert slurm.retry(submit, pause_s=0.01) == "42" and "Unable to contact" in caplog.text

    def refused() -> None:
        raise SlurmError("scontrol: Requested operation is presently disabled")

    with pytest.raises(SlurmError, match="disabled"):
        slurm.retry(refused, timeout_s=0.05, pause_s=0.01)


def test_a_requeue_that_fails_in_submitits_handler_is_told_as_slurms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "run_command", lambda *_: "JobId=7 JobState=RUNNING Restarts=0")

    def handler(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["scontrol", "requeue", "7"])

    previous = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(SlurmError, match="requeue"):
            Point(0, [], Config(), tmp_path).requeue()
        monkeypatch.setattr(
            slurm, "run_command", lambda *_: "JobId=7 JobState=COMPLETING Restarts=1"
        )
        Point(0, [], Config(), tmp_path).requeue()  # Slurm was quicker
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_only_steps_that_were_never_made_are_progress_of_a_learner(run: RunDir) -> None:
    steps = [step("trainer", FOR_EVER), step("agent", FOR_EVER)]
    engine = Supervisor(run, QUICK, steps, no_watch).engine
    trainer, agent = (managed.life for managed in engine.processes)

    def crash(*made: int) -> None:
        for life in (trainer, agent):
            life.start(0.0, engine.progress())
        for number in made:
            append_record(run.metrics, StepMetrics(number, number, 0, 0.0, 0.0, {}, {}))
        for life in (trainer, agent):
            life.end(3600.0, engine.progress())
            life.restart(3600.0)

    crash(1, 2)
    assert (trainer.restarts, agent.restarts) == (1, 1)
    run.metrics.write_bytes(b"")  # the next start makes them again
    crash(1, 2)
    crash()
    assert (trainer.restarts, agent.restarts) == (3, 1)
    crash(3)
    assert trainer.restarts == 1
