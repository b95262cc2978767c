"""The learner as a process with a real trajectory server: same groups, same weights.

That holds whether it is stopped, killed, or runs undisturbed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from learner_run_parts import (
    GROUPS,
    STEPS,
    ended,
    group,
    learn,
    new_run,
    post,
    trajectory_server,
    weights,
)
from run_files import scalars, step_metrics

from atropos_hpc.contracts.members import StopRequest
from atropos_hpc.policy.store import PolicyStore
from atropos_hpc.runtime import process
from atropos_hpc.runtime.membership import post_request
from atropos_hpc.runtime.run_dir import RunDir, read_json
from atropos_hpc.runtime.waiting import wait_for

pytestmark = pytest.mark.verl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic task's model and tokenizer, untrained."""
    import torch

    from atropos_hpc.environments.make_base import make_model, make_tokenizer

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_model(0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = new_run(tmp_path_factory.mktemp("uninterrupted"), model)
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(STEPS * GROUPS)])
        assert ended(run, learn(run)) == [0], process.tail(run.logs / "trainer-0.log", 40)
    return run


def test_every_step_is_trained_published_measured_and_acknowledged(uninterrupted: RunDir) -> None:
    run = uninterrupted
    lines = step_metrics(run)
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    for key in (
        "reward/mean",
        "kl_reference",
        "entropy",
        "grad_norm",
        "clip_fraction",
        "off_policy/staleness_mean",
        "length_mean",
    ):
        assert all(key in line.scalars for line in lines), key
    for phase in ("wait", "update", "publish"):
        assert all(line.phases[phase] >= 0 for line in lines), phase
    assert all(line.scalars["perf/throughput"] > 0 and line.step_s > 0 for line in lines)
    assert lines[0].scalars["kl_reference"] == 0 and lines[-1].scalars["kl_reference"] > 0
    assert weights(run)[0] == STEPS and read_json(run.done) == {"version": STEPS}
    assert read_json(run.checkpoints / "latest.json")["step"] == STEPS


def test_three_and_three_steps_give_the_weights_of_six(
    uninterrupted: RunDir, model: Path, tmp_path: Path
) -> None:
    run = new_run(tmp_path, model)
    track(run)
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(3 * GROUPS)])
        first = learn(run)
        wait_for("step 3", "the learner", lambda: len(step_metrics(run)) == 3, 120)
        post_request(run, StopRequest())
        assert ended(run, first) == [75]
        assert tracked_status(run) == "KILLED"
        assert read_json(run.checkpoints / "latest.json")["step"] == 3
        (run.requests / "stop.json").unlink()
        post(url, run.token(), [group(seed) for seed in range(3 * GROUPS, STEPS * GROUPS)])
        assert ended(run, learn(run)) == [0]
        assert tracked_status(run) == "FINISHED"
        run.done.unlink()  # as if it had ended just before
        assert ended(run, learn(run)) == [0]
    saved = [path.name for path in run.checkpoints.glob(f"step-{STEPS}-*")]
    assert saved == [f"step-{STEPS}-0"], "what was resumed from is not written again"
    assert weights(run) == weights(uninterrupted)
    same = [
        (line.step, line.scalars["loss"], line.scalars["grad_norm"])
        for line in step_metrics(uninterrupted)
    ]
    assert [
        (line.step, line.scalars["loss"], line.scalars["grad_norm"]) for line in step_metrics(run)
    ] == same


def track(run: RunDir) -> None:
    """Have the learner report to MLflow."""
    info = run.info()
    assert info is not None
    info.config.mlflow.enabled = True
    run.write_info(info)


def tracked_status(run: RunDir) -> str:
    """Return what MLflow shows of the run's end."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("atropos_hpc")
    (found,) = client.search_runs([experiment.experiment_id])
    return str(found.info.status)


def kill_after_step_5(run: RunDir, url: str) -> None:
    post(url, run.token(), [group(seed) for seed in range(5 * GROUPS)])
    first = learn(run)
    wait_for("step 5", "the learner", lambda: len(step_metrics(run)) == 5, 120)
    first[0].signal(signal.SIGKILL)
    assert ended(run, first) == [-signal.SIGKILL]


@pytest.mark.parametrize("newest", ["whole", "damaged"])
def test_a_killed_learner_does_its_lost_steps_again_with_the_same_groups(
    uninterrupted: RunDir, model: Path, tmp_path: Path, newest: str
) -> None:
    """Steps are lost since the newest checkpoint, or the one before if that one is damaged."""
    run = new_run(tmp_path, model)
    with trajectory_server(run) as url:
        kill_after_step_5(run, url)
        latest = read_json(run.checkpoints / "latest.json")
        assert latest["step"] == 4
        if newest == "damaged":
            next((run.checkpoints / latest["directory"]).glob("*.distcp")).unlink()
        post(url, run.token(), [group(seed) for seed in range(5 * GROUPS, STEPS * GROUPS)])
        assert ended(run, learn(run)) == [0]
    assert ("resuming from step-2-0, because" in (run.logs / "trainer-0.log").read_text()) == (
        newest == "damaged"
    )
    assert weights(run) == weights(uninterrupted)
    assert [line.step for line in step_metrics(run)] == list(range(1, STEPS + 1))


def test_a_checkpoint_from_before_what_was_acknowledged_ends_the_run_with_the_story(
    uninterrupted: RunDir, model: Path, tmp_path: Path
) -> None:
    run = new_run(tmp_path, model)
    shutil.copytree(
        uninterrupted.trajectories, run.trajectories, dirs_exist_ok=True
    )  # of a run that has done all its steps
    with trajectory_server(run):
        assert ended(run, learn(run)) == [2]
    log = (run.logs / "trainer-0.log").read_text()
    assert "batch 0 was acknowledged" in log and "older than the acknowledged batches" in log


def test_non_finite_gradients_step_after_step_end_the_run(model: Path, tmp_path: Path) -> None:
    """A learning rate that destroys the weights at step 1: every later gradient is NaN."""
    run = new_run(tmp_path, model, learning_rate=1e30, max_skipped_steps=2)
    track(run)
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(STEPS * GROUPS)])
        assert ended(run, learn(run)) == [2]
    log = (run.logs / "trainer-0.log").read_text()
    assert "the gradients of the last 2 steps, up to step 3" in log and "max_skipped_steps" in log
    assert "Traceback" not in log and tracked_status(run) == "FAILED"
    assert [line.scalars["skipped_steps"] for line in step_metrics(run)] == [0, 1, 2]
    assert scalars(run)[2]["grad_norm"] is None, "JSON has no NaN"


def test_a_journal_that_was_cut_while_stopped_is_reported_with_what_is_trained_again(
    uninterrupted: RunDir, model: Path, tmp_path: Path
) -> None:
    """Killed after step 5, with checkpoint 4; the journal then loses its end."""
    run = new_run(tmp_path, model)
    with trajectory_server(run) as url:
        kill_after_step_5(run, url)
    (journal,) = run.trajectories.glob("*.journal")
    os.truncate(journal, journal.stat().st_size // 2)
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(100, 100 + 2 * GROUPS)])
        assert ended(run, learn(run)) == [0]
    log = (run.logs / "trainer-0.log").read_text()
    assert "batches 0 to 4 were trained on and are missing" in log
    assert "before step 4 is in the checkpoint. Steps 5 to 5 are trained again" in log
    assert [line.step for line in step_metrics(run)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("backend", ["verl", "deepspeed"])
def test_two_ranks_take_the_same_steps(
    uninterrupted: RunDir, model: Path, tmp_path: Path, backend: str
) -> None:
    run = new_run(tmp_path, model, ranks=2, backend=backend)
    with trajectory_server(run) as url:
        post(url, run.token(), [group(seed) for seed in range(STEPS * GROUPS)])
        assert ended(run, learn(run, ranks=2)) == [0, 0], process.tail(
            run.logs / "trainer-0.log", 40
        )
    for one, two in zip(scalars(uninterrupted), scalars(run), strict=True):
        assert (
            two["reward/mean"] == one["reward/mean"]
            and two["trained_tokens"] == one["trained_tokens"]
        )
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert weights(run)[0] == STEPS and len(weights(run)[1]) == 2


def exported(run: RunDir, out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "atropos_hpc.cli", "export", str(run.path), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_an_exported_checkpoint_is_the_published_policy(
    uninterrupted: RunDir, model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = exported(uninterrupted, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"directory": str(tmp_path / "out"), "step": STEPS}
    store = PolicyStore(uninterrupted.policy)
    latest = store.latest()
    assert latest is not None
    published = {
        name: tensor
        for path in store.directory(latest).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == published.keys() and all(
        written[name].equal(published[name]) for name in written
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        == AutoTokenizer.from_pretrained(model).get_vocab()
    )

    again = exported(uninterrupted, tmp_path / "out")
    assert again.returncode == 2 and "exists" in again.stderr and "Traceback" not in again.stderr
    missing = exported(uninterrupted, tmp_path / "other", "--step", "3")
    assert (
        missing.returncode == 2
        and "there are: 4, 6" in missing.stderr
        and not (tmp_path / "other").exists()
    )
