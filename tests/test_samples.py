"""Samples of the policy: chosen from real groups, decoded with the model's tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.metrics import Sample
from atropos_hpc.observe import samples
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.runtime.run_dir import RunDir, read_records, write_json

pytestmark = pytest.mark.verl  # the tokenizer is made with transformers

PROMPT = "12+34="


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    from atropos_hpc.environments.make_base import make_tokenizer

    run = RunDir(tmp_path / "run")
    run.create()
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_json(
        run.run_json,
        {
            "id": "x",
            "config": {"model": {"path": str(tmp_path / "model")}, "trainer": {"steps": 500}},
        },
    )
    return run


def group(model: Path, answers: dict[str, float]) -> Group:
    """Return the answers to one prompt, with their scores."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.encode(PROMPT)
    sequences = [(prompt, tokenizer.encode(answer, add_special_tokens=False)) for answer in answers]
    lengths = np.array([len(start) + len(end) for start, end in sequences], np.uint32)
    tokens = np.array([token for start, end in sequences for token in (*start, *end)], np.int32)
    trained = np.array(
        [flag for start, end in sequences for flag in [False] * len(start) + [True] * len(end)]
    )
    versions = {"policy_versions": [[4, 5]] * len(answers)}
    return Group(
        lengths, np.array(list(answers.values())), tokens, trained, generation_params=versions
    )


def test_the_best_and_the_worst_of_a_group_are_sampled_at_due_versions(
    run: RunDir, tmp_path: Path
) -> None:
    metrics = MetricsWriter(run, [], resume_at=0)
    one = group(tmp_path / "model", {"640": 1.0, "641": 0.0, "649": 0.5})
    for version in range(12):
        metrics.sample(version, 500, [one])
    assert [(sample.version, sample.score) for sample in read_records(run.samples, Sample)] == [
        (0, 1.0),
        (0, 0.0),
        (5, 1.0),
        (5, 0.0),
        (10, 1.0),
        (10, 0.0),
    ]
    found = samples.read(run, version=5, last=5)
    assert [str(sample.completion).strip() for sample in found] == ["640", "641"] and PROMPT in str(
        found[0].prompt
    )
    again = MetricsWriter(run, [], resume_at=10)  # version 10 is trained on again
    assert {sample.version for sample in read_records(run.samples, Sample)} == {0, 5, 10}
    again.write(11, {}, StepTimes(1.0, {}))
    assert {sample.version for sample in read_records(run.samples, Sample)} == {0, 5}


def test_the_command_shows_samples_and_reports_when_there_are_none(
    run: RunDir, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "atropos_hpc.cli", "samples", str(run.path)]
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert nothing.returncode == 1 and "has no samples yet" in nothing.stderr
    MetricsWriter(run, [], resume_at=0).sample(0, 500, [group(tmp_path / "model", {"640": 1.0})])
    assert "640" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert shown[0]["score"] == 1.0 and shown[0]["policy_versions"] == [4, 5]


def test_without_a_tokenizer_the_token_ids_are_shown(run: RunDir, tmp_path: Path) -> None:
    MetricsWriter(run, [], resume_at=0).sample(0, 1, [group(tmp_path / "model", {"640": 1.0})])
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert all(isinstance(token, int) for token in samples.read(run, None, 1)[0].completion)


def test_commands_refuse_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for command in ("samples", "logs", "stop", "resume"):
        done = subprocess.run(
            [sys.executable, "-m", "atropos_hpc.cli", command, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and "is not a run's directory" in done.stderr, (
            command,
            done.stderr,
        )
