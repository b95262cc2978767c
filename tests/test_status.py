"""`atropos-hpc status` on run directories in every state.

The whole command runs on directories made here; tests/test_runs.py does the same on real ones.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import in_process
import msgspec
import psutil
import pytest
from run_files import append_step

from atropos_hpc.contracts.members import (
    AgentState,
    AttemptRecord,
    EnvironmentState,
    ServerState,
    TrainerState,
    Wait,
)
from atropos_hpc.contracts.metrics import (
    Evaluation,
    StepMetrics,
    SweepPoint,
    evaluation_metrics,
)
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.observe import history, report, status, status_view
from atropos_hpc.observe.summary import summarize
from atropos_hpc.runtime.membership import DEAD_S, Member
from atropos_hpc.runtime.run_dir import (
    RunDir,
    append_record,
    last_records,
    write_json,
    write_struct,
)

COMMAND = [sys.executable, "-m", "atropos_hpc.cli"]


def made(path: Path, trained: int = 7, steps: int = 10, **holder: Any) -> RunDir:
    """Make a run directory as the members of a run would have written it."""
    run = RunDir(path)
    run.create()
    attempt = run.new_attempt()
    write_json(run.run_json, {"id": "x", "config": {"trainer": {"steps": steps}}})
    if holder:
        write_json(
            run.holder, {"host": socket.gethostname(), "job": None, "since": time.time(), **holder}
        )
    phases = {"wait": 1.0, "update": 0.5, "checkpoint": 0.25}
    prompts = {"epoch": 1, "drawn": 90, "outstanding": 8, "returned": 2, "no_signal": 5}
    drawn = {f"prompts/environment/{name}": float(count) for name, count in prompts.items()}
    perf = {"perf/throughput_per_gpu": 12.5, "perf/rollout/throughput_per_gpu": 33.5}
    perf |= {"perf/mfu": 0.41, "perf/peak_memory_gib": 63.5}
    scalars = {"kl_reference": 0.01, "tokens": 100, **drawn, **perf}
    for step in range(1, trained + 1):
        append_step(run, step, 2.0, phases, **{"reward/mean": 0.1 * step}, **scalars)
    (attempt / "trainer-0.log").write_text(
        "2026-01-01 10:00:00,123 W atropos_hpc.learner: something is odd\nother text\n"
    )
    return run


def ended(outcome: str) -> AttemptRecord:
    return AttemptRecord(started=0.0, ended=1.0, outcome=outcome, events=[])


def shown(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(in_process.command("status", run.path, "--json").stdout)
    return found


def test_evaluations_of_steps_that_are_trained_again_are_not_shown(tmp_path: Path) -> None:
    """The run was at step 9, and has resumed at a checkpoint before the seventh."""
    run = made(tmp_path, trained=7)
    for version, accuracy in ((0, 0.25), (8, 0.75), (4, 0.5)):
        append_record(run.evaluations, Evaluation(version, accuracy))
    assert shown(run)["evaluation"]["version"] == 4
    (row,) = (report.point_status(point, {}) for point in report.find_points(run.path))
    assert row.accuracy == history.read(run.path).accuracy == 0.5
    assert [each.version for each in summarize(run).evaluations] == [0, 4]
    append_step(run, 8, 2.0, {})
    assert shown(run)["evaluation"]["version"] == 8
    assert history.read(run.path).points("accuracy") == {0: 0.25, 4: 0.5, 8: 0.75}


def test_a_running_run_shows_progress_waits_and_warnings(tmp_path: Path) -> None:
    run = made(tmp_path, pid=os.getpid())
    append_record(run.evaluations, Evaluation(4, 0.5, {"eval/environment/strict_accuracy": 0.25}))
    servers = [
        ServerState(name="server-0-0", version=PolicyVersion(version=6, attempt=1)),
        ServerState(name="server-0-1"),
    ]
    agent = Member(
        run, AgentState(servers=servers, server_peaks={"server-0-0": 3 << 30}), "rollout0"
    )
    trainer = Member(run, TrainerState(step=7, state="training"), "trainer0")
    trainer.show_wait(Wait("batch 7", "the trajectory server", time.time()))
    found = shown(run)
    drawn = in_process.command("status", run.path, "--once").stdout
    assert (found["state"], found["step"], found["steps"]) == ("running", 7, 10)
    assert found["eta_s"] == pytest.approx(6) and found["trained_tokens_per_s"] == pytest.approx(50)
    assert found["time_shares"] == {
        "wait": 0.5,
        "update": 0.25,
        "checkpoint": 0.125,
        "other": 0.125,
    }
    assert (
        found["evaluation"]
        == {"version": 4, "accuracy": 0.5, "sequences": 0, "metrics": {"strict_accuracy": 0.25}}
        and found["versions"]["served"] == 6
    )
    assert [(wait["member"], wait["what"]) for wait in found["waits"]] == [
        ("trainer-trainer0-0", "batch 7")
    ]
    assert found["warnings"] == [
        {
            "time": "2026-01-01 10:00:00",
            "log": "trainer-0.log",
            "level": "W",
            "message": "atropos_hpc.learner: something is odd",
        }
    ]
    for said in (
        "running",
        "step 7 of 10",
        "6 s left",
        "0.500 at version 4    strict_accuracy 0.25",
        "1 of 2 servers serve, 3.0 GiB peak of a server",
        "something is odd",
        "epoch 1, 90 drawn, 8 outstanding, 2 to be drawn again, 5 without signal",
        "per GPU 12.5 and 33.5",
        "MFU of the update 0.41    peak memory 63.5 GiB",
    ):
        assert said in drawn, drawn
    agent.leave()
    trainer.leave()


def test_the_last_steps_are_drawn_as_sparklines_but_not_in_json(tmp_path: Path) -> None:
    run = made(tmp_path, trained=3, pid=os.getpid())
    append_step(run, 4, 9.0, {}, **{"reward/mean": 0.1})
    drawn = in_process.command("status", run.path, "--once").stdout
    assert " 0.1    ▁▄█▁ " in drawn and " 9    ▁▁▁█ " in drawn
    as_json = in_process.command("status", run.path, "--json").stdout
    assert not set(status_view.BARS) & set(as_json)
    assert json.loads(as_json)["recent"]["step_s"] == [2.0, 2.0, 2.0, 9.0]


def test_a_terminal_without_unicode_gets_question_marks(tmp_path: Path) -> None:
    run = made(tmp_path, trained=3)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "status", str(run.path), "--once"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "???" in done.stdout, done.stderr


def test_a_run_without_processes_is_lost_and_says_how_to_resume(tmp_path: Path) -> None:
    died = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    run = made(tmp_path, pid=int(died.stdout))
    member = Member(run, TrainerState(state="training"), "trainer0")
    member._stop.set()  # as KILL would: no word of goodbye
    write_json(run.checkpoints / "latest.json", {"step": 5, "directory": "step-5-0"})
    assert shown(run)["state"] == "lost" and [m["state"] for m in shown(run)["members"]] == ["gone"]
    drawn = in_process.command("status", tmp_path, "--once").stdout
    drawn = " ".join(drawn.split())  # a long path wraps the line
    assert f"atropos-hpc resume {tmp_path}" in drawn and "from step 5" in drawn


def test_another_process_with_the_number_of_the_run_s_does_not_hold_it(tmp_path: Path) -> None:
    began = psutil.Process().create_time()
    assert shown(made(tmp_path / "of it", pid=os.getpid(), since=began + 5))["state"] == "running"
    assert shown(made(tmp_path / "of one", pid=os.getpid(), since=began - 600))["state"] == "lost"


@pytest.mark.parametrize(("silent_s", "state"), [(0.0, "running"), (DEAD_S + 5, "lost")])
def test_a_run_on_another_host_is_judged_by_the_age_of_its_roster(
    tmp_path: Path, silent_s: float, state: str
) -> None:
    run = made(tmp_path, pid=1, host="elsewhere")
    os.utime(run.roster, (time.time() - silent_s,) * 2)
    assert shown(run)["state"] == state


@pytest.mark.parametrize(
    ("outcome", "state"), [("stop", "stopped"), ("fail", "failed"), ("requeue", "requeued")]
)
def test_an_ended_run_shows_its_outcome(tmp_path: Path, outcome: str, state: str) -> None:
    run = made(tmp_path)
    write_struct(run.logs / "attempt.json", ended(outcome))
    assert shown(run)["state"] == state
    write_json(run.done, {"version": 10})
    assert shown(run)["state"] == "complete"


def test_a_run_without_a_step_is_starting(tmp_path: Path) -> None:
    run = made(tmp_path, trained=0, pid=os.getpid())
    run.run_json.unlink()  # it comes once the base model is made
    found = shown(run)
    assert (found["state"], found["step"], found["eta_s"], found["time_shares"]) == (
        "starting",
        0,
        None,
        {},
    )


def test_a_sweep_has_a_line_for_each_point(tmp_path: Path) -> None:
    rows = []
    for num in range(3):
        made(tmp_path / str(num), trained=num * 5)
        rows.append(SweepPoint(num, [f"seed={num}"], str(tmp_path / str(num)), steps=10))
    write_struct(tmp_path / "jobs.json", rows)
    write_json(RunDir(tmp_path / "2").done, {"version": 10})
    drawn = in_process.command("status", tmp_path, "--once").stdout
    lines = [line.split() for line in drawn.splitlines() if "seed=" in line]
    assert [line[:3] for line in lines] == [
        ["0", "lost", "0/10"],
        ["1", "lost", "5/10"],
        ["2", "complete", "10/10"],
    ]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is empty"),
        (
            lambda path: (path.mkdir(), (path / "notes.txt").write_text("")),
            "holds no jobs.json and no run.json",
        ),
        (lambda path: path.write_text(""), "is a file"),
    ],
)
@pytest.mark.parametrize("command", ["status", "report"])
def test_other_directories_are_refused(tmp_path: Path, make: Any, says: str, command: str) -> None:
    make(tmp_path / "it")
    done = in_process.command(command, tmp_path / "it")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_of_many_members_only_those_in_trouble_are_shown(tmp_path: Path) -> None:
    run = made(tmp_path, pid=os.getpid())
    now = time.time()
    for index in range(200):
        node = f"rollout{index}"
        state = EnvironmentState(
            name=f"environment-{node}-0",
            node=node,
            host=f"n{index}",
            state="generating",
            started=now - 50,
        )
        write_struct(run.members / f"{state.name}.json", state, durable=False)
    os.utime(run.members / "environment-rollout117-0.json", (now - 300,) * 2)
    from rich.console import Console

    terminal = Console(width=160, record=True, file=open(os.devnull, "w"))
    terminal.print(status_view.draw(status.read_status(tmp_path)))
    text = terminal.export_text()
    assert (
        "environment x 200" in text
        and "199 generating, 1 silent" in text
        and "environment-rollout117-0" in text
    )
    assert "environment-rollout116-0" not in text


def test_the_live_screen_ends_with_ctrl_c(tmp_path: Path) -> None:
    import pty

    made(tmp_path, pid=os.getpid())
    leader, follower = pty.openpty()
    live = subprocess.Popen(
        [*COMMAND, "status", str(tmp_path)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        close_fds=True,
    )
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 60
    while b"held-out accuracy" not in seen and time.monotonic() < deadline:
        seen += os.read(leader, 4096)
    live.send_signal(signal.SIGINT)
    assert live.wait(30) == 130 and b"held-out accuracy" in seen and b"Traceback" not in seen
    os.close(leader)


@pytest.mark.parametrize("length", [0, 1, 5, 5000])
def test_the_last_records_of_files_of_any_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [StepMetrics(n, n, 0, 0.0, 1.0, {"x" * (n % 300): 1.0}, {}) for n in range(length)]
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines) + b'{"torn')
    assert last_records(path, StepMetrics, 5) == lines[-5:]
    assert last_records(tmp_path / "none", StepMetrics, 5) == []


def test_lines_of_another_layout_are_refused_by_name(tmp_path: Path) -> None:
    run = made(tmp_path)
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "reward/mean": 0.5}\n')
    done = in_process.command("status", tmp_path)
    assert done.returncode == 2 and "no StepMetrics" in done.stderr
    assert str(run.metrics) in done.stderr and len(done.stderr.splitlines()) == 1


def test_login_commands_import_nothing_heavy(tmp_path: Path) -> None:
    """bench/status.py allows half a second of CPU, which leaves no time for Hydra or a role."""
    made(tmp_path)
    probe = (
        "import sys\nfrom atropos_hpc import cli\ncli.main(['status', sys.argv[1], '--once'])\n"
        "heavy = {'torch', 'ray', 'verl', 'vllm', 'hydra', 'matplotlib', 'numpy', 'submitit'}\n"
        "heavy = (heavy | {'aiohttp', 'jinja2'}) & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path)], check=True, stdout=subprocess.DEVNULL
    )


def test_one_slow_step_does_not_change_the_estimated_end(tmp_path: Path) -> None:
    seconds = {3: 100.0}
    lines = [StepMetrics(n, n, 0, 0.0, seconds.get(n, 1.0), {}, {}) for n in range(1, 6)]
    assert (
        report.eta(lines, 15) == pytest.approx(10)
        and report.eta([], 15) is None
        and report.eta(lines, None) is None
    )


def test_the_waits_of_a_resumed_attempt_for_its_servers_are_no_part_of_the_pace(
    tmp_path: Path,
) -> None:
    run = made(tmp_path, trained=3)
    for step, seconds in ((4, 300.0), (5, 2.0), (6, 2.0)):
        scalars: dict[str, float | None] = {"tokens": 100.0}
        append_record(run.metrics, StepMetrics(step, step, 1, 0.0, seconds, {}, scalars))
    found = shown(run)
    assert found["seconds_per_step"] == 2.0 and found["trained_tokens_per_s"] == 50.0


def test_metrics_of_an_evaluation_are_those_of_the_first_environment() -> None:
    metrics: dict[str, float | None] = {
        "eval/percent_correct": 0.5,
        "eval/environment/length_mean": 10.0,
        "eval/letters/length_mean": 99.0,
        "letters/eval/percent_correct": 0.9,
    }
    found = evaluation_metrics(Evaluation(4, 0.5, metrics))
    assert found == {"percent_correct": 0.5, "length_mean": 10.0}
