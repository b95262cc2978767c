"""Stamping, and loading the environment class: what needs atroposlib, but no server."""

import asyncio
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atropos_hpc.config import Config, EnvironmentConf, EvaluationConf  # noqa: E402
from atropos_hpc.contracts.group import NO_LIMITS, encode_group  # noqa: E402
from atropos_hpc.contracts.messages import Quota, ServerInfo  # noqa: E402
from atropos_hpc.contracts.prompts import DrawAnswer, DrawRequest  # noqa: E402
from atropos_hpc.contracts.run_info import RunInfo  # noqa: E402
from atropos_hpc.contracts.scored_group import ScoredGroup  # noqa: E402
from atropos_hpc.rollout.env_adapter import RunEnvironment  # noqa: E402
from atropos_hpc.rollout.env_loader import check_target  # noqa: E402
from atropos_hpc.rollout.evaluation import (  # noqa: E402
    evaluate,
    mean_lengths,
    next_due,
    numbers,
    with_name,
)
from atropos_hpc.rollout.prompt_draws import Drawer, DrawingEnv, PromptDraws  # noqa: E402
from atropos_hpc.rollout.stamping import (  # noqa: E402
    Sampled,
    is_training,
    record_generations,
    stamp,
)
from atropos_hpc.trajectories.decode import decode_json  # noqa: E402

ARITHMETIC = "atropos_hpc.environments.arithmetic:ArithmeticEnv"


def test_stamps_are_per_sequence_with_the_whole_group_s_range_as_fallback() -> None:
    group: dict[str, Any] = {"tokens": [[1, 2, 50, 60], [1, 2, 70], [9, 9]]}
    stamp(group, [Sampled((50, 60), (1, 1)), Sampled((70,), (1, 3)), Sampled((4, 4), (2, 2))])
    assert group["generation_params"]["policy_versions"] == [[1, 1], [1, 3], [1, 3]]


def test_sequences_are_stamped_with_their_temperature_unless_the_environment_said_it() -> None:
    generations = [Sampled((1,), (0, 0), 0.7), Sampled((2,), (0, 0), 0.7)]
    group: dict[str, Any] = {"tokens": [[1], [2]]}
    stamp(group, generations)
    assert group["generation_params"]["temperature"] == 0.7
    said: dict[str, Any] = {"tokens": [[1]], "generation_params": {"temperature": 0.9}}
    stamp(said, generations)
    assert said["generation_params"]["temperature"] == 0.9
    mixed: dict[str, Any] = {"tokens": [[1], [2], [3]], "overrides": [{}, {}, {"x": 1}]}
    stamp(mixed, [*generations, Sampled((3,), (0, 0), 1.0), Sampled((4,), (0, 0), 0.0)])
    assert "temperature" not in mixed["generation_params"]
    assert mixed["overrides"] == [
        {"temperature": 0.7},
        {"temperature": 0.7},
        {"temperature": 1.0, "x": 1},
    ]


@pytest.mark.parametrize(
    ("every", "saved"), [(1, [5, 6, 9, 10]), (3, [6, 9]), (7, [7]), (-1, []), (None, [])]
)
def test_an_environment_is_saved_at_each_checkpoint_of_the_learner_that_it_sees(
    every: int | None, saved: list[int]
) -> None:
    class Saving(DrawingEnv):
        def __init__(self) -> None:
            self.found: list[int] = []

        async def get_next_item(self) -> Any: ...

        async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...

        def save_checkpoint(self, step: int, data: Any = None) -> None:
            self.found.append(step)

    env = Saving()
    registered = {"starting_step": 4, "checkpoint_interval": every}
    env.take_over_checkpoints(registered)
    assert registered["checkpoint_interval"] == -1  # BaseEnv saves nothing by itself
    for step in (4, 5, 5, 6, 9, 9, 10):  # as the loop sees them
        env.save_if_due(step)
    assert env.found == saved


def test_a_group_without_generations_has_unknown_versions_and_keeps_its_parameters() -> None:
    group: dict[str, Any] = {"tokens": [[1]], "generation_params": {"temperature": 1}}
    stamp(group, [])
    assert group["generation_params"]["policy_versions"] is None
    assert group["generation_params"]["temperature"] == 1


def test_tokens_match_whole_ids_only() -> None:
    group: dict[str, Any] = {
        "tokens": [[0x01000000, 0x00000001]]
    }  # in bytes 00 00 00 01 01 00 00 00: 0x00010100 lies askew in it
    stamp(group, [Sampled((0x00010100,), (1, 1)), Sampled((0x00000001,), (2, 2))])
    assert group["generation_params"]["policy_versions"] == [[2, 2]]


def test_every_group_has_an_id_of_its_own() -> None:
    shared = {"temperature": 1.0}
    first, second = ({"tokens": [[1]], "generation_params": shared} for _ in range(2))
    stamp(first, [])
    stamp(second, [])
    assert first["generation_params"]["group_id"] != second["generation_params"]["group_id"]


class Items:
    """An environment whose rollouts do nothing but wait."""

    def __init__(self, *items: str | None) -> None:
        self.items, self.started = iter(items), list[Any]()
        self.quota: Quota | None = None
        self._saved = SimpleNamespace(follow=lambda rollout: rollout)
        self.max_num_workers = 8
        self.backlog: list[str] = []
        self.workers: set[asyncio.Task[Any]] = set()
        self.running_items: dict[str, Any] = {}
        self.env_id, self.numbers = 0, itertools.count()
        self.pool = SimpleNamespace(changed=asyncio.Event())
        drawer = Drawer("environment", "environment-a-0", lambda: 1)
        self.draws = PromptDraws(self, drawer, self.hand_out)

    async def hand_out(self, request: DrawRequest) -> DrawAnswer:
        return DrawAnswer(numbers=list(itertools.islice(self.numbers, request.want)))

    async def get_next_item(self) -> str | None:
        return next(self.items, None)

    async def handle_env(self, item_uuid: str) -> None:
        self.started.append(self.running_items[item_uuid]["item"])
        await asyncio.sleep(3600)

    _start_rollout = RunEnvironment._start_rollout
    add_train_workers = RunEnvironment.add_train_workers


def test_as_many_rollouts_start_as_the_quota_allows() -> None:
    async def story() -> None:
        env = Items("b", "c", "d", "e", None)
        env.backlog = ["a"]
        env.quota = Quota(groups=3, oldest_version=0)
        for _ in range(2):  # the second call finds the quota used up
            await env.add_train_workers()
            await asyncio.sleep(0)
            assert env.started == ["a", "b", "c"] and env.quota.groups == 0
        env.quota, env.max_num_workers = Quota(5, 0), 4
        await env.add_train_workers()
        assert len(env.workers) == 4
        env.max_num_workers = 8
        await env.add_train_workers()  # the environment has no further item
        assert len(env.workers) == 5
        tasks = list(env.workers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(story())


def test_a_group_with_an_answer_of_the_greatest_length_is_kept() -> None:
    class Registered:
        config = SimpleNamespace(group_size=8, batch_size=0)
        max_token_len = -1

        async def _call(self, *_: Any) -> ServerInfo:
            return ServerInfo(batch_size=64, max_token_len=1024)

    env: Any = Registered()
    asyncio.run(RunEnvironment._take_server_info(env))
    truncated = 1024  # tokens, where the server stops; BaseEnv drops what has max_token_len or more
    assert env.config.batch_size == 64 and truncated < env.max_token_len


def test_a_python_group_of_arrays_becomes_the_record_that_json_would_become() -> None:
    import numpy as np

    tokens, log_probs = np.arange(6).reshape(2, 3), [np.float32([0.5] * 3)] * 2
    group = {
        "tokens": tokens,
        "masks": [row.tolist() for row in tokens],
        "scores": [np.float32(1), 0],
    }
    record = encode_group(
        ScoredGroup.from_python(group | {"inference_logprobs": log_probs, "overrides": None})
    )
    plain = {"tokens": tokens.tolist(), "masks": tokens.tolist(), "scores": [1, 0]}
    body = json.dumps(plain | {"inference_logprobs": [[0.5] * 3] * 2}).encode()
    assert record.to_bytes() == decode_json(body, False, NO_LIMITS)[0].to_bytes()


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


@pytest.mark.parametrize(("target", "left_out"), [(ARITHMETIC, True), ("my_env.py:Env", False)])
def test_workers_of_this_package_s_environments_do_not_import_torch(
    target: str, left_out: bool
) -> None:
    program = """
import sys
from atropos_hpc.config import Config, EnvironmentConf
from atropos_hpc.rollout.environment_process import leave_out_torch
leave_out_torch(Config(environment=EnvironmentConf(sys.argv[1])), "environment")
if "torch" in sys.modules:
    import atropos_hpc.rollout.env_adapter, atropos_hpc.environments.arithmetic
print(sys.modules.get("torch", "as ever"))
"""
    command = [sys.executable, "-c", program, target]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert done.stdout == ("None\n" if left_out else "as ever\n") and done.stderr == ""


def test_the_check_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "atropos_hpc.rollout.env_worker", "--check"]
    conf = EnvironmentConf(ARITHMETIC, config={"seeds": 1})
    info = msgspec.json.encode(RunInfo(Config(environment=conf)))
    done = subprocess.run(command, input=info, capture_output=True, check=True)
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
    # A run that was at 30 of 40 has resumed at 20, with fewer steps.
    assert next_due(conf, served=20, last=25, done={0, 10, 20, 30}) == 25
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


def test_a_sequence_has_the_finish_reason_of_the_generation_that_ends_it() -> None:
    group: dict[str, Any] = {"tokens": [[1, 50, 2, 60], [1, 70, 3], [9, 9]]}
    reasons = {50: "stop", 60: "length", 70: "stop"}
    seen = [Sampled((token,), (1, 1), finish_reason=reason) for token, reason in reasons.items()]
    stamp(group, seen)
    assert group["generation_params"]["finish_reasons"] == ["length", None, None]


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers() -> None:
    from itertools import combinations

    from atropos_hpc.environments.single_turn import ks, pass_at_k

    answers = [True, False, True, False, False]
    for k in range(1, 6):
        chosen = [any(each) for each in combinations(answers, k)]
        assert pass_at_k(5, 2, k) == pytest.approx(sum(chosen) / len(chosen))
    assert ks(1) == [] and ks(6) == [1, 2, 4, 6]


def test_each_rule_is_reported_for_greedy_and_for_sampled_answers() -> None:
    from atropos_hpc.environments.gsm8k import verdict
    from atropos_hpc.environments.single_turn import SingleTurnEnv

    texts = {0.0: ["#### 2", "it is 3"], 1.0: ["it is 2", "2 or 3", "#### 3", "#### 3"]}
    logged: dict[str, float] = {}

    async def log(metrics: dict[str, float], **times: float) -> None:
        logged.update(metrics)

    async def answer(gold: str, temperature: float) -> Any:
        return verdict(texts[temperature].pop(0), gold)

    config = SimpleNamespace(eval_samples=2, eval_temperature=0.0, temperature=1.0)
    env: Any = SimpleNamespace(config=config, eval_metrics=[], evaluate_log=log)
    asyncio.run(SingleTurnEnv.report_accuracy(env, ["#### 2", "#### 3"], answer))
    greedy = {"percent_correct": 1.0, "strict_accuracy": 0.5, "flexible_accuracy": 1.0}
    sampled = {"sampled_strict_accuracy": 0.5, "sampled_flexible_accuracy": 0.75}
    expected = {**greedy, **sampled, "pass@1": 0.75, "pass@2": 1.0}
    assert logged == {f"eval/{name}": value for name, value in expected.items()}


def test_the_mean_length_of_sampled_answers_is_apart_from_that_of_greedy_ones() -> None:
    greedy = [Sampled((1, 2), (0, 0), temperature=0.0), Sampled((1,) * 4, (0, 0), temperature=0.0)]
    sampled = [Sampled((1,) * 9, (0, 0), temperature=0.7)]
    both = {"eval/length_mean": 3.0, "eval/sampled_length_mean": 9.0}
    assert mean_lengths([*greedy, *sampled]) == both
    assert mean_lengths(sampled) == {"eval/length_mean": 9.0} and mean_lengths([]) == {}


def test_pass_at_k_and_the_length_have_the_name_of_their_environment() -> None:
    metrics = {"eval/pass@4": 0.5, "eval/length_mean": 3.0, "eval/percent_correct": 0.25}
    named = {"eval/sums/pass@4": 0.5, "eval/sums/length_mean": 3.0, "eval/percent_correct": 0.25}
    assert with_name(metrics, "sums") == named


def test_an_evaluation_asks_for_no_support_and_leaves_nothing_running() -> None:
    class Failing:
        def __init__(self) -> None:
            self.eval_workers: set[asyncio.Task[None]] = set()

        async def evaluate(self) -> None:
            assert not is_training()
            self.eval_workers.add(asyncio.create_task(asyncio.sleep(3600)))
            raise RuntimeError("no data")

    async def story() -> None:
        env = Failing()
        with pytest.raises(RuntimeError, match="no data"):
            await evaluate(env, 3, timeout_s=60)
        (left,) = env.eval_workers
        with pytest.raises(asyncio.CancelledError):
            await left

    with record_generations():
        assert is_training()
    asyncio.run(story())
