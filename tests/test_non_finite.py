"""Numbers that are not finite, or would overflow: refused at the border, never written as JSON."""

import json
import math
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from trajectory_parts import group

from atropos_hpc import schema
from atropos_hpc.config import Config
from atropos_hpc.contracts.group import MAX_MAGNITUDE, encode_group
from atropos_hpc.contracts.metrics import finite_numbers
from atropos_hpc.contracts.run_info import RunInfo
from atropos_hpc.contracts.scored_group import RequestError, ScoredGroup
from atropos_hpc.learner.skipped_steps import NothingLearned, SkippedSteps
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.runtime.run_dir import RunDir, write_struct
from atropos_hpc.validate import problems

NOT_FINITE = (math.nan, math.inf, -math.inf)
NUMERIC = [name for name, field in schema.fields(Config) if "float" in str(field.type)]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", NUMERIC)
def test_non_finite_values_of_every_float_key_are_refused(name: str, value: float) -> None:
    section: Any = (config := Config())
    *path, last = name.split(".")
    for part in path:
        section = getattr(section, part)
    is_map = isinstance(getattr(section, last), dict)
    setattr(section, last, {"inner": value} if is_map else value)
    assert (name, f"must be a finite number, not {value}") in [
        (problem.key, problem.message.replace("{'inner': ", "").rstrip("}"))
        for problem in problems(config)
    ]


def test_non_finite_values_deep_in_a_map_are_refused() -> None:
    config = Config()
    config.environment.config = {"a": [{"b": math.inf}]}
    assert "environment.config" in {problem.key for problem in problems(config)}


@pytest.mark.parametrize("value", [*NOT_FINITE, 1e39, -1e39, 1e200, 2 * MAX_MAGNITUDE])
@pytest.mark.parametrize("field", ["scores", "advantages", "inference_logprobs", "ref_logprobs"])
def test_rewards_and_log_probs_that_overflow_float32_are_refused_by_field(
    field: str, value: float
) -> None:
    sent = group(1)
    rows = [list(map(float, row)) for row in sent["tokens"]]
    changed: Any = sent["scores"] if field == "scores" else rows
    if field == "scores":
        changed[0] = value
    else:
        changed[0][-1] = value
    with pytest.raises(RequestError, match=field):
        encode_group(ScoredGroup.from_python({**sent, field: changed}))


def test_the_largest_reward_that_is_allowed_leaves_sums_of_squares_in_float32() -> None:
    encode_group(ScoredGroup.from_python({**group(1), "scores": [MAX_MAGNITUDE] * 4}))
    assert 1e9 * MAX_MAGNITUDE**2 < 3.4e38


def test_metrics_that_are_not_finite_are_null_in_every_json(run: RunDir) -> None:
    run.new_attempt()
    write_struct(run.run_json, RunInfo(Config(run_dir=str(run.path)), id="x"))
    writer = MetricsWriter(run, {}, resume_at=0)
    writer.write(1, {"reward/mean": math.nan, "loss": math.inf, "tokens": 1.0}, StepTimes(1.0, {}))
    command = [sys.executable, "-m", "atropos_hpc.cli", "status", str(run.path), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in (run.metrics.read_text(), shown):
        msgspec.json.decode(text)  # strict: NaN and Infinity are no JSON
        assert json.loads(text) and '"reward/mean":null' in text.replace(" ", "")


@pytest.mark.verl
def test_numbers_of_numpy_and_torch_are_metrics_and_larger_arrays_are_not() -> None:
    import torch

    metrics = {"a": torch.tensor(1.5), "b": torch.tensor([2.0]), "c": torch.ones(2)}
    more = {"d": np.float32(3.0), "e": np.ones(1), "f": np.ones(2), "g": torch.tensor(math.nan)}
    assert finite_numbers({**metrics, **more}) == {"a": 1.5, "b": 2.0, "d": 3.0, "e": 1.0}


def test_steps_that_are_skipped_in_a_row_end_the_run() -> None:
    skipped = SkippedSteps(limit=3)
    for norm in (math.nan, math.inf, 1.0, math.nan, math.nan):
        skipped.count(norm)
        skipped.check(5)
    assert skipped.count(math.inf) == 3
    with pytest.raises(NothingLearned, match=r"last 3 steps, up to step 7.*max_skipped_steps"):
        skipped.check(7)
