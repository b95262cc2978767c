"""Pacing and stamping, and finding the environment class: what needs atroposlib, but no server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atropos_hpc.config import EvaluationConf  # noqa: E402
from atropos_hpc.rollout.env_adapter import room, stamp  # noqa: E402
from atropos_hpc.rollout.env_loader import check_target  # noqa: E402
from atropos_hpc.rollout.evaluation import next_due, numbers  # noqa: E402
from atropos_hpc.rollout.server_pool import Generation  # noqa: E402
from atropos_hpc.runtime.http import encode  # noqa: E402

ARITHMETIC = "atropos_hpc.environments.arithmetic:ArithmeticEnv"


def groups(**changes: Any) -> int:
    """Room in groups of 8, for batches of 64, with one worker and nothing under way."""
    figures = {
        "served": 0,
        "formed": 0,
        "staleness": 0,
        "batch_size": 64,
        "queued": 0,
        "under_way": 0,
        "others": 0,
        "group_size": 8,
        "part": 1.0,
    }
    return room(**(figures | changes))


def test_on_policy_a_batch_is_begun_only_when_its_version_is_served() -> None:
    assert groups(served=4, formed=4) == 8
    assert groups(served=3, formed=4) == 0
    assert groups(served=None) == 0


def test_staleness_allows_so_many_batches_ahead() -> None:
    assert groups(served=4, formed=4, staleness=2) == 24
    assert groups(served=4, formed=6, staleness=2) == 8
    assert groups(served=4, formed=7, staleness=2) == 0


def test_what_is_queued_and_under_way_takes_room() -> None:
    assert groups(queued=24) == 5
    assert groups(queued=24, under_way=16, others=8) == 2
    assert groups(under_way=64) == 0
    assert groups(queued=60) == 1  # a batch waits for these 4 sequences
    assert groups(queued=640) == 0


def test_workers_that_see_the_same_room_share_it() -> None:
    started = [groups(part=1 / 3) for _ in range(3)]
    assert sum(started) >= 8 and sum(started) - 8 < 3
    assert groups(part=1 / 3, under_way=24) == 0  # its share is under way
    assert groups(part=0.01) == 1
    assert [groups(part=part, staleness=3) for part in (0.75, 0.25)] == [24, 8]


def test_a_minimum_share_of_each_batch_is_left_to_whose_it_is() -> None:
    assert groups(part=0.1) == 1
    assert groups(part=0.1, share=16) == 2  # its share, though its weight would give it less
    assert groups(part=0.1, share=16, staleness=2) == 6
    assert (
        groups(part=0.1, share=16, own_queued=8) == 1
        and groups(part=0.1, share=16, under_way=16) == 0
    )
    assert groups(shares_of_others=[(16, 0)]) == 6  # the rest, for the others
    assert groups(shares_of_others=[(16, 8), (8, 8)], queued=8, others=8) == 5
    assert groups(shares_of_others=[(16, 0)], staleness=2) == 18


def test_a_batch_s_share_has_room_though_others_fill_all_batches_to_come() -> None:
    assert groups(share=16, queued=64) == 2 and groups(share=16, queued=192, staleness=2) == 2
    assert (
        groups(share=16, queued=64, under_way=16) == 0
        and groups(share=16, queued=64, own_queued=16) == 0
    )
    assert groups(share=16, served=3, formed=4) == 0  # no batch that it could go into


def test_stamps_are_per_sequence_with_the_whole_group_s_range_as_fallback() -> None:
    group: dict[str, Any] = {"tokens": [[1, 2, 50, 60], [1, 2, 70], [9, 9]]}
    stamp(
        group, [Generation((50, 60), (1, 1)), Generation((70,), (1, 3)), Generation((4, 4), (2, 2))]
    )
    assert group["generation_params"]["policy_versions"] == [[1, 1], [1, 3], [1, 3]]


def test_the_temperature_is_stamped_where_it_is_one_and_the_environment_has_not_said_it() -> None:
    generations = [Generation((1,), (0, 0), 0.7), Generation((2,), (0, 0), 0.7)]
    group: dict[str, Any] = {"tokens": [[1], [2]]}
    stamp(group, generations)
    assert group["generation_params"]["temperature"] == 0.7
    said: dict[str, Any] = {"tokens": [[1]], "generation_params": {"temperature": 0.9}}
    stamp(said, generations)
    assert said["generation_params"]["temperature"] == 0.9
    mixed: dict[str, Any] = {"tokens": [[1], [2]]}
    stamp(mixed, [*generations, Generation((3,), (0, 0), 1.0)])
    assert "temperature" not in mixed["generation_params"]


def test_a_group_without_generations_has_unknown_versions_and_keeps_its_parameters() -> None:
    group: dict[str, Any] = {"tokens": [[1]], "generation_params": {"temperature": 1}}
    stamp(group, [])
    assert group["generation_params"]["policy_versions"] is None
    assert group["generation_params"]["temperature"] == 1


def test_tokens_match_whole_ids_only() -> None:
    group: dict[str, Any] = {
        "tokens": [[0x01000000, 0x00000001]]
    }  # in bytes 00 00 00 01 01 00 00 00: 0x00010100 lies askew in it
    stamp(group, [Generation((0x00010100,), (1, 1)), Generation((0x00000001,), (2, 2))])
    assert group["generation_params"]["policy_versions"] == [[2, 2]]


def test_every_group_has_an_id_of_its_own() -> None:
    shared = {"temperature": 1.0}
    first, second = ({"tokens": [[1]], "generation_params": shared} for _ in range(2))
    stamp(first, [])
    stamp(second, [])
    assert first["generation_params"]["group_id"] != second["generation_params"]["group_id"]


def test_posts_are_json_of_numpy_and_gzipped_when_large() -> None:
    import gzip

    import numpy as np

    body, headers = encode({"scores": np.float32(0.5), "tokens": np.arange(3)})
    assert (
        json.loads(body) == {"scores": 0.5, "tokens": [0, 1, 2]}
        and "Content-Encoding" not in headers
    )
    body, headers = encode({"tokens": list(range(5000))})
    assert (
        headers["Content-Encoding"] == "gzip"
        and json.loads(gzip.decompress(body))["tokens"][-1] == 4999
    )


@pytest.mark.parametrize(
    ("target", "config", "key", "says"),
    [
        (ARITHMETIC, {"eval_problms": 3}, "config.eval_problms", "did you mean eval_problems?"),
        (ARITHMETIC, {"temperature": "hot"}, "config.temperature", "number"),
        (
            "atropos_hpc.environments.arithmetic:ArithmeticEnvironment",
            {},
            "target",
            "did you mean ArithmeticEnv?",
        ),
        ("no.such.module:Class", {}, "target", "cannot be imported"),
        ("no/such/file.py:Class", {}, "target", "cannot be imported"),
    ],
)
def test_a_wrong_environment_is_named_by_key(
    target: str, config: dict[str, Any], key: str, says: str
) -> None:
    (problem,) = check_target(target, config)
    assert problem.key == key
    assert says in problem.message


def test_the_check_runs_as_a_command() -> None:
    command = [
        sys.executable,
        "-m",
        "atropos_hpc.rollout.env_worker",
        "--check",
        "--target",
        ARITHMETIC,
        "--config",
    ]
    done = subprocess.run([*command, '{"seeds": 1}'], capture_output=True, text=True, check=True)
    (problem,) = json.loads(done.stdout.splitlines()[-1])
    assert problem["key"] == "config.seeds" and "did you mean seed?" in problem["message"]


def test_a_target_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "my_env.py").write_text(
        "from atropos_hpc.environments.arithmetic import ArithmeticEnv as Mine\n"
    )
    assert check_target(f"{tmp_path}/my_env.py:Mine", {"eval_problems": 5}) == []


def test_evaluations_are_due_before_every_so_often_and_after() -> None:
    conf = EvaluationConf(every=10, before=True, after=True)
    assert next_due(conf, served=0, last=25, done=set()) == 0
    assert (
        next_due(conf, served=50, last=60, done=set()) == 50
    )  # a run that goes on from 50 starts from 50
    assert next_due(conf, served=3, last=25, done={0}) == 10
    assert next_due(conf, served=21, last=25, done={0}) == 20  # 10 was passed
    assert next_due(conf, served=22, last=25, done={0, 20}) == 25
    assert next_due(conf, served=25, last=25, done={0}) == 25  # the last is never passed over
    assert next_due(conf, served=25, last=25, done={0, 25}) is None
    assert (
        next_due(EvaluationConf(every=0, before=False, after=False), served=0, last=5, done=set())
        is None
    )


def test_metrics_are_the_finite_numbers_about_evaluation() -> None:
    import numpy as np

    metrics = {
        "eval/a": np.float32(0.5),
        "eval/b": 1,
        "eval/c": float("nan"),
        "train/d": 1.0,
        "eval/table": object(),
        "eval/e": np.ones(3),
    }
    assert numbers(metrics) == {"eval/a": 0.5, "eval/b": 1.0}
