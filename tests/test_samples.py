"""Rollouts: written with their text by the learner, bounded, resumed, filtered and sorted."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atropos_hpc.contracts.group import Group
from atropos_hpc.contracts.metrics import (
    EnvironmentMetrics,
    Evaluation,
    Rollout,
    StepMetrics,
    Tracked,
)
from atropos_hpc.observe import samples
from atropos_hpc.observe.metrics import MetricsWriter, StepTimes
from atropos_hpc.observe.rollouts import Advantages, Part, RolloutWriter, files, read_file
from atropos_hpc.observe.samples import Selection
from atropos_hpc.observe.trackers import Ending
from atropos_hpc.runtime.run_dir import RunDir, append_record, read_records, write_json

pytestmark = pytest.mark.verl  # the tokenizer is made with transformers

PROMPT = "12+34="
ALL = 10**9  # bytes
WHOLE = Part()


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


def group(model: Path, answers: dict[str, float], **params: Any) -> Group:
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
    params |= {"policy_versions": [[4, 5]] * len(answers)}
    return Group(
        lengths, np.array(list(answers.values())), tokens, trained, generation_params=params
    )


def advantages(groups: Sequence[Group]) -> Advantages:
    """Return an advantage for every trained token: the score of its sequence."""
    trained = [int(flags.sum()) for each in groups for flags in _flags(each)]
    scores = [score for each in groups for score in each.scores]
    return Advantages(
        np.repeat(np.float32(scores), trained),
        np.ones(sum(trained), bool),
        np.array(trained, np.int64),
        np.ones(len(trained), bool),
    )


def _flags(one: Group) -> list[Any]:
    return np.split(one.trained, np.cumsum(one.lengths)[:-1])


def write(
    run: RunDir,
    steps: Sequence[int],
    groups: Sequence[Group],
    max_bytes: int = ALL,
    part: Part = WHOLE,
) -> None:
    """Write the groups at these steps, as a learner that starts before the first of them."""
    decoder = samples.decoder(str(run.path.parent / "model"))
    writer = RolloutWriter(run.rollouts, part, max_bytes, steps[0] - 1, decoder)
    for step in steps:
        writer.submit(step, groups, advantages(groups))
    writer.close()


def steps_of(run: RunDir) -> list[int]:
    return [each.step for _, _, path in files(run.rollouts) for each in read_file(path)]


def test_every_sequence_is_kept_with_its_text_score_advantage_and_versions(
    run: RunDir, tmp_path: Path
) -> None:
    first = group(tmp_path / "model", {"640": 1.0, "6": 0.0}, environment="sums")
    first.generation_params["finish_reasons"] = ["stop", "length"]
    second = group(tmp_path / "model", {"7": 0.5})
    second.gid = first.gid + 1
    write(run, [1], [first, second])
    found = samples.read(run, Selection(last=9))
    assert [each.score for each in found] == [1.0, 0.0, 0.5]
    best = found[0]
    assert best.prompt is not None and PROMPT in best.prompt and best.completion is not None
    assert best.completion.strip() == "640"
    assert (best.environment, found[2].environment) == ("sums", "environment")
    assert best.advantage == 1.0 and best.advantages is None and best.policy_versions == (4, 5)
    assert [each.finish_reason for each in found] == ["stop", "length", None]
    start, end = best.trained[0]
    assert best.length == end - start == len(best.tokens) - start


def test_token_level_advantages_are_kept_and_a_sequence_outside_the_batch_has_none(
    run: RunDir, tmp_path: Path
) -> None:
    one = group(tmp_path / "model", {"64": 1.0, "65": 0.0})
    count = int(_flags(one)[0].sum())
    values = np.arange(count, dtype=np.float32)
    of_first = Advantages(values, np.ones(count, bool), np.array([count]), np.array([True, False]))
    writer = RolloutWriter(run.rollouts, Part(), ALL, 0, lambda sequences: None)
    writer.submit(1, [one], of_first)
    writer.close()
    first, second = samples.read(run, Selection(last=2))
    assert first.advantages == values.tolist() and first.advantage == values.mean()
    assert second.advantage is None and first.completion is None  # no tokenizer


def test_a_resume_forgets_later_steps_and_what_a_crash_cut_off(run: RunDir, tmp_path: Path) -> None:
    groups = [group(tmp_path / "model", {"640": 1.0})]
    write(run, [1, 2, 3, 4], groups)
    (_, _, path), *_ = files(run.rollouts)
    with path.open("r+b") as file:  # killed in the middle of the last write
        file.truncate(path.stat().st_size - 5)
    assert steps_of(run) == [1, 2, 3]
    write(run, [3], groups)
    assert steps_of(run) == [1, 2, 3]
    write(run, [1, 2, 3], groups, part=Part(1, 2))
    write(run, [2], groups)  # with one part again: part 1 is no more
    assert sorted(steps_of(run)) == [1, 1, 2]


def test_the_oldest_files_are_removed_beyond_the_limit(run: RunDir, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = group(tmp_path / "model", {"640": 1.0})
    one.tokens = np.concatenate([one.tokens[:-1], rng.integers(0, 9, 4000, dtype=np.int32)])
    one.trained = np.concatenate([one.trained[:-1], np.ones(4000, bool)])
    one.lengths = np.array([len(one.tokens)], np.uint32)
    write(run, range(1, 41), [one], max_bytes=20_000)
    kept, size = steps_of(run), sum(path.stat().st_size for _, _, path in files(run.rollouts))
    assert kept == list(range(kept[0], 41)) and kept[0] > 1 and size <= 20_000
    assert len(files(run.rollouts)) > 1
    for step in (1, *kept):
        found = samples.read(run, Selection(step=step))
        assert [each.step for each in found] == [step] * (step in kept)


def test_a_write_that_a_full_disk_cuts_off_costs_its_step_only(run: RunDir, tmp_path: Path) -> None:
    one = group(tmp_path / "model", {"640": 1.0})
    writer = RolloutWriter(run.rollouts, WHOLE, ALL, 0, lambda sequences: None)
    writer.submit(1, [one], advantages([one]))
    while not files(run.rollouts) or steps_of(run) != [1]:
        time.sleep(0.01)
    ((_, _, path),) = files(run.rollouts)
    with path.open("ab") as file:
        file.write(b"half a frame")
    writer.submit(2, [one], advantages([one]))
    writer.close()
    assert steps_of(run) == [1, 2]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), [(9, 1.0), (9, 0.0), (8, 1.0), (8, 0.0), (7, 1.0)]),
        (Selection(score="<0.5", last=2), [(9, 0.0), (8, 0.0)]),
        (Selection(step=3), [(3, 1.0), (3, 0.0)]),
        (Selection(text="65", last=1), [(9, 0.0)]),
        (Selection(environment="other"), []),
        (Selection(sort="score", score=">=1", last=2), [(1, 1.0), (2, 1.0)]),
        (Selection(sort="length", last=1), [(1, 0.0)]),
        (Selection(sort="length", reverse=True, last=1), [(1, 1.0)]),
    ],
)
def test_rollouts_are_filtered_and_sorted(
    run: RunDir, tmp_path: Path, selection: Selection, expected: list[tuple[int, float]]
) -> None:
    write(run, range(1, 10), [group(tmp_path / "model", {"6": 1.0, "659": 0.0})])
    found = samples.read(run, selection)
    assert [(each.step, each.score) for each in found] == expected


def test_the_rollouts_of_all_ranks_are_shown_by_step(run: RunDir, tmp_path: Path) -> None:
    groups = [group(tmp_path / "model", {"640": 1.0})]
    write(run, [1, 2, 3], groups, part=Part(0, 2))
    write(run, [1, 2], groups, part=Part(1, 2))
    assert [each.step for each in samples.read(run, Selection(last=4))] == [3, 2, 2, 1]


def test_the_command_shows_samples_and_reports_when_there_are_none(
    run: RunDir, tmp_path: Path
) -> None:
    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "atropos_hpc.cli", "samples", str(run.path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    nothing = call()
    assert nothing.returncode == 1 and "has no rollouts yet" in nothing.stderr
    write(run, [1], [group(tmp_path / "model", {"640": 1.0})])
    assert "640" in call().stdout
    shown = json.loads(call("--json").stdout)
    assert shown[0]["score"] == 1.0 and shown[0]["policy_versions"] == [4, 5]
    none = call("--score", ">1")
    assert none.returncode == 1 and "no rollouts that match" in none.stderr
    for arguments in (("--score", "much"), ("--text", "("), ("--last", "-1")):
        bad = call(*arguments)
        assert bad.returncode == 2 and arguments[0] in bad.stderr


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.shown: list[Rollout] = []
        self.lines: list[Tracked] = []

    def holds(self, line: Tracked) -> bool:
        return False

    def log(self, line: Tracked, samples: Sequence[Rollout]) -> None:
        self.lines.append(line)
        self.shown += samples

    def close(self, ending: Ending) -> None: ...


def test_trackers_get_the_best_and_the_worst_of_a_group_at_due_steps(run: RunDir) -> None:
    tracker = Recorder()
    metrics = MetricsWriter(run, {"recorder": lambda: tracker}, resume_at=0)
    found = [
        Rollout(0, "environment", 0, i, score, [5], [(0, 1)]) for i, score in enumerate((0.5, 1, 0))
    ]
    for step in range(1, 12):
        metrics.sample(step, 500, lambda: found)
        metrics.write(step, {}, StepTimes(1.0, {}))
    metrics.close(Ending.COMPLETE)
    assert [each.score for each in tracker.shown] == [1, 0] * 3  # steps 1, 6 and 11


def test_what_environments_log_is_averaged_over_workers_into_the_step_s_metrics(
    run: RunDir,
) -> None:
    old = EnvironmentMetrics("sums", "a", {"train/right": 9.0})
    append_record(run.environments, old)  # before this start of the learner
    tracker = Recorder()
    metrics = MetricsWriter(run, {"recorder": lambda: tracker}, resume_at=0)
    times = StepTimes(1.0, {})
    for member, right in (("a", 0.25), ("b", 0.75)):
        values = {"train/right": right}
        append_record(run.environments, EnvironmentMetrics("sums", member, values))
    append_record(run.environments, EnvironmentMetrics("letters", "c", {"turns": 3.0}))
    metrics.write(1, {"reward/mean": 0.5}, times)
    metrics.write(2, {"reward/mean": 0.5}, times)
    first, second = read_records(run.metrics, StepMetrics)
    assert first.scalars == {
        "reward/mean": 0.5,
        "env/sums/train/right": 0.5,
        "env/letters/turns": 3.0,
    }
    assert second.scalars == {"reward/mean": 0.5}
    metrics.close(Ending.COMPLETE)
    shown = [{**line.scalars, "time/step": 1.0} for line in (first, second)]
    assert [line.scalars for line in tracker.lines] == shown


def test_an_evaluation_that_came_after_the_last_step_is_given_to_trackers_once(
    run: RunDir,
) -> None:
    for version in (0, 4, 8):
        append_record(run.evaluations, Evaluation(version, accuracy=0.5))
        metrics = MetricsWriter(run, {"recorder": Recorder}, resume_at=version)
        metrics.close(Ending.COMPLETE)
    assert [line.step for line in read_records(run.tracked, Tracked)] == [0, 4, 8]


def test_commands_refuse_a_directory_that_is_no_run(tmp_path: Path) -> None:
    for command in ("samples", "logs", "stop", "resume"):
        done = subprocess.run(
            [sys.executable, "-m", "atropos_hpc.cli", command, str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and "a run's directory" in done.stderr, (command, done.stderr)


def test_a_completion_cannot_send_escape_sequences_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "a\x1b]0;title\x07 \x9b2J\tb"
    samples.show([Rollout(1, "environment", 0, 0, 1.0, [5], [(0, 1)], prompt="p", completion=text)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x9b" not in shown
    assert "\\x1b]0;title" in shown and "\\x9b2J" in shown
