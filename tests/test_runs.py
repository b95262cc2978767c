"""Whole runs of the real command, with real vLLM, verl and an Atropos environment.

Killed processes are restarted, and the runs end with success. The base model is made once per
machine and cached; every run takes a few steps only.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from config_parts import composed
from prompt_coverage import FEW_PROBLEMS, assert_prompts_are_covered, history
from run_files import activity, evaluations, scalars
from run_parts import Started

from atropos_hpc.contracts.metrics import RestartMark, StepMetrics, Tracked
from atropos_hpc.contracts.status import RunStatus
from atropos_hpc.launch import base_model
from atropos_hpc.observe import samples, status
from atropos_hpc.observe.samples import Selection
from atropos_hpc.observe.trackers import newest_in_events, wandb_steps
from atropos_hpc.policy.manifest import read_manifest
from atropos_hpc.resources import HOME
from atropos_hpc.runtime.run_dir import read_json, read_records

pytestmark = [pytest.mark.verl, pytest.mark.run, pytest.mark.timeout(900)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(steps: int, *overrides: str) -> Started:
        started.append(Started(tmp_path, steps, *overrides))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            each.process.send_signal(signal.SIGTERM)
            each.end(60)


def assert_complete(started: Started, steps: int) -> None:
    assert started.end() == 0, started.story()
    assert started.steps() == list(range(1, steps + 1))
    summary = read_json(started.run.summary)
    assert summary["outcome"] == "finish" and summary["steps"] == steps
    started.assert_nothing_is_left()


def assert_the_records_are_complete(started: Started, killed: str) -> None:
    """Check what users read afterwards: the status, the report, the samples."""
    found = status.read_status(started.run.path)
    assert (
        found.state == "complete"
        and found.step == found.steps
        and (found.trained_tokens_per_s or 0) > 0
    )
    assert {shown.member.kind for shown in found.members} >= {
        "supervisor",
        "trajectories",
        "trainer",
        "agent",
        "environment",
    }
    restarted = [line.name for line in activity(started.run) if isinstance(line, RestartMark)]
    assert killed in restarted
    subprocess.run(
        [sys.executable, "-m", "atropos_hpc.cli", "report", str(started.run.path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    page = (started.run.path / "report" / "report.html").read_text()
    assert f"<td>{killed}</td>" in page and (started.run.path / "report" / "timeline.png").exists()
    rollouts = samples.read(started.run, Selection(last=1 << 20))
    once = {(each.step, each.group, each.index) for each in rollouts}
    assert len(once) == len(rollouts), "a step's rollouts are there twice"
    assert {each.step for each in rollouts} == set(range(1, found.steps + 1))
    first = rollouts[-1]
    assert first.prompt is not None and re.search(r"\d\d\+\d\d=$", first.prompt)
    assert first.step == 1 and first.policy_versions == (0, 0)
    lines = read_records(started.run.metrics, StepMetrics)
    assert any("env/environment/train/percent_correct" in line.scalars for line in lines)


# Who is killed after which step, and whose log tells of it.
VICTIMS = {
    2: ("environment-0", "agent-0"),
    4: ("trajectories", "supervisor"),
    6: ("server-0-0", "agent-0"),
    8: ("trainer", "supervisor"),
    11: ("agent", "supervisor"),
}


def test_killed_members_come_back_one_after_another(start: Callable[..., Started]) -> None:
    """One run for all of them, since each start of vLLM takes long; its trackers show one run."""
    trackers = ("wandb.mode=offline", "tensorboard=true", "mlflow.enabled=true")
    started = start(14, *trackers, "trackio.enabled=true", "export.every=6", FEW_PROBLEMS)
    for step, (victim, noted_in) in VICTIMS.items():
        started.step(step)
        before = started.log(noted_in).count("was killed by SIGKILL")
        os.kill(started.pid(victim), signal.SIGKILL)
        started.until(
            f"the end of {victim} in the log of {noted_in}",
            lambda log=noted_in, n=before: started.log(log).count("was killed by SIGKILL") > n,
        )
    assert_complete(started, 14)
    for victim, noted_in in VICTIMS.values():
        kind, log = victim.partition("-")[0], started.log(noted_in)
        assert re.search(rf"{kind}\S* was killed by SIGKILL", log), log
    assert "resuming from checkpoint" in started.log("trainer-0")
    assert read_json(started.run.summary)["restarts"] == 3  # by the supervisor
    assert_prompts_are_covered(started.run, epochs=3)
    assert_the_records_are_complete(started, "trainer-trainer0-0")
    assert_the_trackers_show_one_run(started)


def assert_the_trackers_show_one_run(started: Started) -> None:
    """W&B has a directory per start of the learner, all of them with the id of the run.

    All trackers were given each step once, and have it.
    """
    runs = list((started.run.path / "wandb").glob("offline-run-*"))
    ids = {path.name.rpartition("-")[2] for path in runs}
    assert len(runs) == 2 and ids == {read_json(started.run.run_json)["id"]}
    assert f"wandb sync {started.run.path}/wandb/offline-run-*" in started.output.read_text()
    lines = read_records(started.run.tracked, Tracked)
    assert [line.step for line in lines if line.kind == "step"] == list(range(1, 15))
    numbers = [number for path in runs for number in wandb_steps(next(path.glob("*.wandb")))]
    assert sorted(numbers) == list(range(len(lines)))
    assert newest_in_events(started.run.path / "tensorboard")["step"] == 14
    for database in ("mlflow/mlflow.db", "trackio/atropos_hpc.db"):
        assert (started.run.path / database).exists()
    assert " lines; the next start delivers them" not in started.log("trainer-0")
    assert (started.run.exports / "step-14" / "README.md").exists()


def test_a_run_whose_rollouts_all_fail_ends_with_their_error_on_the_last_line(
    start: Callable[..., Started],
) -> None:
    limits = ("rollout.give_up_after_groups=8", "rollout.give_up_after_s=1")
    started = start(2, "model.max_length=6", *limits)  # the length of every prompt
    assert started.end() == 1
    error = read_json(started.run.summary)["error"]
    for text in ("environment (atropos_hpc.environments.arithmetic:", "model.max_length=6"):
        assert text in error
    *_, last_line = started.output.read_text().splitlines()
    assert last_line.endswith(f"the run failed: {error}")
    found = status.read_status(started.run.path)
    assert isinstance(found, RunStatus)
    assert (found.state, found.error) == ("failed", error)
    started.assert_nothing_is_left()


def test_a_run_resumes_after_its_supervisor_was_killed_and_after_ctrl_c(
    start: Callable[..., Started],
) -> None:
    """By the same command and by `resume`. One run for both, since each start takes long."""
    started = start(16, FEW_PROBLEMS)
    same_command = started.command
    started.until("a server's start", lambda: started.log("server-0-0"))
    code, error = tried(same_command)
    assert code == 2 and f"pid {started.process.pid}" in error and "is in use by" in error
    started.step(4)
    started.process.kill()
    started.process.wait()
    started.assert_nothing_is_left()
    durable = read_json(started.run.checkpoints / "latest.json")["step"]
    assert 3 <= durable <= len(started.steps()) < 16 and durable % 3 == 0

    started.process = started.start()
    resumed = f"starts at step {durable}"
    started.until("the resume", lambda: resumed in started.log("trainer-0"))
    started.step(durable + 2)
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 75, started.story()
    started.assert_nothing_is_left()
    stopped_at = len(started.steps())
    assert read_json(started.run.checkpoints / "latest.json")["step"] == stopped_at
    assert status.read_status(started.run.path).state == "stopped"

    started.command = [sys.executable, "-m", "atropos_hpc.cli", "resume", str(started.run.path)]
    started.process = started.start()
    assert_complete(started, 16)
    assert_prompts_are_covered(started.run, epochs=4)
    code, error = tried(same_command)  # there is nothing left to do
    assert code == 0 and "complete already" in error


def tried(command: list[str]) -> tuple[int, str]:
    """Run a command that starts no run; return its exit code and error output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_term_ends_everything_also_while_servers_start(start: Callable[..., Started]) -> None:
    started = start(6)
    started.until("a server's start", lambda: started.log("server-0-0"))
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == 75, started.story()
    started.assert_nothing_is_left()


def test_two_of_everything_strictly_on_policy_with_evaluations(
    start: Callable[..., Started],
) -> None:
    two = ["roles.trainer.ranks_per_node=2", "rollout.servers=2", "environment.workers=2"]
    evaluated = [
        "evaluation.before=true",
        "evaluation.after=true",
        "environment.config.eval_problems=100",
    ]
    started = start(4, "staleness.max=0", *two, *evaluated)
    assert_complete(started, 4)
    for name in ("trainer-1", "server-0-1", "environment-1"):
        assert started.log(name)
    assert sum(line["stale_sequences"] for line in scalars(started.run)) == 0
    lines = evaluations(started.run)
    assert [line.version for line in lines] == [0, 4]
    assert all(
        line.served == (line.version, line.version)
        and 0 <= line.accuracy <= 1
        and line.sequences == 100
        for line in lines
    )
    summary = read_json(started.run.summary)
    assert (
        summary["accuracy_before"] == lines[0].accuracy
        and summary["accuracy_after"] == lines[1].accuracy
    )
    assert summary["stale_sequences"] == 0


def test_versions_travel_as_deltas_and_a_killed_server_gets_the_newest(
    start: Callable[..., Started],
) -> None:
    """In float32, so small a learning rate changes one per cent of the weights per step."""
    small_steps = ["trainer.learning_rate=1e-10", "staleness.max=0", "rollout.servers=2"]
    started = start(8, "policy.sync=delta", "policy.anchor_every=4", "policy.keep=6", *small_steps)
    started.step(3)
    os.kill(started.pid("server-0-1"), signal.SIGKILL)
    assert_complete(started, 8)
    assert sum(line["stale_sequences"] for line in scalars(started.run)) == 0
    kinds = {
        path.parent.name: read_manifest(path.parent).kind
        for path in started.run.policy.glob("*-*/manifest.json")
    }
    assert (
        kinds["8-1"] == kinds["4-1"] == "full"
        and kinds["7-1"] == kinds["6-1"] == kinds["5-1"] == "delta"
    )
    assert "cannot use policy version" not in started.log("agent-0")


def test_upstreams_own_server_does_too(start: Callable[..., Started]) -> None:
    started = start(2, "trajectories.server=atropos")
    assert_complete(started, 2)


def test_gsm8k_s_sample_through_the_code_that_reads_the_real_data_set(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    """With an untrained model: every answer is wrong, so this tests the data path, not learning."""
    import torch

    from atropos_hpc.environments.make_base import make_model, make_tokenizer

    torch.manual_seed(0)
    model = make_model(0)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    started = start(
        2,
        "environment=gsm8k",
        "environment.config.dataset=null",
        "environment.config.max_tokens=16",
        "+environment.config.ensure_scores_are_not_same=false",
        "environment.group_size=4",
        "algorithm.batch_size=16",
        f"model.path={tmp_path / 'model'}",
        "model.max_length=1024",
    )
    assert_complete(started, 2)
    assert all(
        line["reward/mean"] == 0 and line["trained_tokens"] > 0 for line in scalars(started.run)
    )


@pytest.fixture
def demo_model(tmp_path: Path) -> str:
    """The override that names the demo's model. Chosen by `make`, other environments refuse it."""
    conf = composed().model
    return f"model.path={base_model.ensure(conf, sys.executable, tmp_path / 'make_base.log')}"


def test_several_environments_share_a_run(start: Callable[..., Started], demo_model: str) -> None:
    """With different group sizes, and a minimum share for the environment with the smaller weight.

    The second environment has nothing to evaluate.
    """
    target = f"target: {HOME / 'tests' / 'kinds_env.py'}:KindsEnv"
    other = f"{target}, weight: 0.25, min_batch_allocation: 0.25, group_size: 4"
    started = start(
        6,
        demo_model,
        f"+more_environments={{kinds: {{{other}}}}}",
        "algorithm.batch_size=128",
        "evaluation.after=true",
        "environment.config.eval_problems=100",
    )
    assert_complete(started, 6)
    lines = scalars(started.run)
    assert all(line["sequences/environment"] + line["sequences/kinds"] == 128 for line in lines)
    for line in lines[
        3:
    ]:  # by then the second has registered too, and what was generated without it is used up
        assert (
            line["sequences/kinds"] >= 32
            and line["reward/kinds/mean"] == 0.5
            and 0 < line["reward/environment/mean"] < 1
        )
    (evaluated,) = evaluations(started.run)
    assert 0 < evaluated.accuracy < 1 and evaluated.error.startswith(
        "more_environments.kinds: LookupError"
    )


def test_an_environment_of_the_users_own_runs_unmodified(
    start: Callable[..., Started], demo_model: str
) -> None:
    """It uses every generation API, over several turns with untrained tool tokens in between.

    Three of its kinds sample with top_p, min_p or top_k, which the learner has to replay.
    """
    target = HOME / "tests" / "kinds_env.py"
    started = start(
        2,
        demo_model,
        "environment=atropos",
        f"environment.target={target}:KindsEnv",
        "algorithm.batch_size=80",
        "trainer.checkpoint_every=1",
    )
    assert_complete(started, 2)
    for line in scalars(started.run):
        assert 0 < line["trained_tokens"] < line["tokens"] and line["biased_sequences"] == 0
        # Of the tokens that the learner's own version sampled; later batches may have none.
        assert line.get("off_policy/same_version/mean_ratio", 1) == pytest.approx(1, abs=0.005)
    assert "off_policy/same_version/mean_ratio" in scalars(started.run)[0]
    restricted = [g for g in history(started.run).groups.values() if g.support is not None]
    assert {g.generation_params["kind"] for g in restricted} == {"managed", "tokens", "turns"}
    assert list(started.run.path.glob("environments/env_checkpoints/environment.*/step-[12].json"))
