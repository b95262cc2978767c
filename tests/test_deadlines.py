"""Deadlines grow with the tokens to generate and the bytes to write."""

import json
from pathlib import Path

import pytest
from manual_clock import Clock

from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.contracts.members import TrainerState
from atropos_hpc.launch.slurm.sbatch_checks import problems
from atropos_hpc.runtime import deadlines
from atropos_hpc.runtime.hang_detection import ProgressWatch
from atropos_hpc.runtime.restart_policy import Action, RunEnding
from atropos_hpc.runtime.sizing import stored_bytes
from bench.parts.published import CONFIGS

MINUTE = 60.0


@pytest.fixture
def large(tmp_path: Path) -> Config:
    """A 32B model with answers of up to 32k tokens."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Qwen/Qwen2.5-32B-Instruct"]))
    config = Config(run_dir="/run")
    config.model.path, config.model.max_length = str(tmp_path), 32768
    return config


def test_an_answer_of_32k_tokens_may_take_20_minutes(large: Config) -> None:
    assert deadlines.request_timeout_s(large.environment, large.model.max_length) > 20 * MINUTE
    assert deadlines.batch_timeout_s(large, large.launch.start_timeout_s) > 20 * MINUTE + 900
    short = Config(run_dir="/run")
    assert deadlines.batch_timeout_s(short, 900.0) == 900.0
    explicit = EnvironmentConf(request_timeout_s=7.0)
    assert deadlines.request_timeout_s(explicit, 32768) == 7.0


def test_a_server_on_a_cpu_may_be_silent_for_as_long_as_a_step_of_its_engine(large: Config) -> None:
    # 57 tokens of a prompt per second were measured with half a billion parameters.
    half_a_billion = large.model.path and Path(large.model.path) / "config.json"
    half_a_billion.write_text(json.dumps(CONFIGS["Qwen/Qwen2.5-0.5B-Instruct"]))
    assert deadlines.engine_step_s(large) > 2 * deadlines.STEP_TOKENS / 57
    large.roles.rollout.gpus_per_node = 1
    assert deadlines.engine_step_s(large) == 0.0


def test_a_step_longer_than_its_timeout_is_no_hang_while_micro_batches_begin() -> None:
    clock = Clock()
    progress = ProgressWatch(start_timeout_s=900, step_timeout_s=1800, clock=clock)
    begun = 0
    while clock.now < 3 * 1800:
        rank = TrainerState(name="r", pid=1, state="training", step=3, micro_batches=begun)
        assert progress.stalled_s([rank]) is None
        clock.now, begun = clock.now + 600, begun + 1
    clock.now += 1800
    assert progress.stalled_s([rank]) == 2400


def test_a_stop_during_a_publish_of_64_gb_waits_for_it_and_for_the_checkpoint(
    large: Config,
) -> None:
    version, checkpoint = stored_bytes(large)
    assert version == pytest.approx(65.5e9, rel=0.01)
    assert checkpoint == pytest.approx(393e9, rel=0.01)
    clock, ending = Clock(), RunEnding(deadlines.save_timeout_s(large))
    ending.request(Action.STOP, clock.now)
    for size in (version, checkpoint, version, checkpoint):  # under way, and the last ones
        clock.now += size / deadlines.storage_rate(large)
        assert not ending.expired(clock.now)
    clock.now += large.launch.save_timeout_s + 1
    assert ending.expired(clock.now)
    assert deadlines.write_timeout_s(large, 1800.0) > checkpoint / 0.25e9
    large.cluster.storage_gb_per_s = 0.125
    assert deadlines.write_timeout_s(large, 1800.0) > checkpoint / 0.125e9


def test_slurm_s_signal_leaves_the_time_that_a_stop_takes(large: Config) -> None:
    large.launch.allocation = "het"
    assert deadlines.signal_s(large) > deadlines.save_timeout_s(large)
    found = [each.message for each in problems(large) if each.key == "launch.signal_s"]
    assert len(found) == 1 and "launch.minutes=60" in found[0]
    large.launch.minutes = 24 * 60
    assert not [each for each in problems(large) if each.key == "launch.signal_s"]


def test_a_small_model_has_the_deadlines_of_the_config() -> None:
    config = Config(run_dir="/run")
    assert deadlines.save_timeout_s(config) == config.launch.save_timeout_s
    assert deadlines.signal_s(config) == config.launch.signal_s
