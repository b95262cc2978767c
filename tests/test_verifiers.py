"""Environments of the verifiers library: real packages, played through Atropos' interface."""

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.verifiers
pytest.importorskip("verifiers")

from atropos_hpc.contracts.group import encode_group, read_group  # noqa: E402
from atropos_hpc.contracts.scored_group import ScoredGroup  # noqa: E402
from atropos_hpc.contracts.wal_record import scan  # noqa: E402
from atropos_hpc.rollout.env_loader import check_target  # noqa: E402
from atropos_hpc.rollout.stamping import Sampled, record, record_generations, stamp  # noqa: E402
from atropos_hpc.rollout.verifiers_env import VerifiersEnv, of_package  # noqa: E402

PACKAGES = Path(__file__).parent / "verifiers_packages"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
SPECIAL += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LOG_PROB = -0.5


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a tokenizer of characters, with the special tokens of Qwen's templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = PLAIN
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    fast.path = str(path)
    return fast


@pytest.fixture(scope="session", autouse=True)
def packages() -> Iterator[None]:
    """Make the packages importable, here and in the tool servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGES))
        patch.setenv("PYTHONPATH", str(PACKAGES), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def loop(packages: None) -> Iterator[asyncio.Runner]:
    """The library keeps locks that belong to the first event loop."""
    with asyncio.Runner() as runner:
        yield runner


class Scripted:
    """A server that replies by a function of the prompt's text. It keeps prompts and replies."""

    def __init__(self, tokenizer: Any, reply: Callable[[str], str]) -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.turns: list[tuple[list[int], list[int]]] = []
        self.options: list[dict[str, Any]] = []

    async def tokens_and_logprobs_completion(
        self, **options: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        prompt = options["input_ids"]
        text = self.reply(self.tokenizer.decode(prompt))
        reply = self.tokenizer.encode(text, add_special_tokens=False)
        reply.append(self.tokenizer.eos_token_id)
        self.turns.append((prompt, reply))
        self.options.append(options)
        record([Sampled(tuple(reply), (3, 3), options["temperature"])])
        return prompt, [reply], [[LOG_PROB] * len(reply)], ["stop"]


def environment(
    package: str, tokenizer: Any, reply: Callable[[str], str], **changes: Any
) -> VerifiersEnv:
    """Make an environment without the parts of BaseEnv that need a run."""
    kind = of_package(package)
    values = {"group_size": 2, "max_token_length": 4096, "tokenizer_name": tokenizer.path}
    values |= {"renderer": {"name": "default"}} | changes
    env = kind.__new__(kind)
    env.config, env.tokenizer = kind.env_config_cls(**values), tokenizer
    env.server = Scripted(tokenizer, reply)
    env.reported = {}

    async def evaluate_log(metrics: dict[str, float], **_: Any) -> None:
        env.reported |= metrics

    env.evaluate_log = evaluate_log
    return env


async def one_group(env: VerifiersEnv) -> dict[str, Any]:
    """Play the first task, and stamp its group as a worker does."""
    await env.setup()
    item = env.training[0]
    with record_generations() as sampled:
        group, _ = await env.collect_trajectories(item)
    stamp(group, sampled, "vf")
    await env._serving.aclose()
    return dict(group)


def test_a_task_of_one_turn_becomes_a_group_of_exactly_what_was_sampled(
    tokenizer: Any, loop: asyncio.Runner
) -> None:
    replies = iter(["20", "21"])
    env = environment("vf-sums", tokenizer, lambda prompt: next(replies))
    group = loop.run(one_group(env))
    (prompt, first), (_, second) = env.server.turns
    assert tokenizer.decode(prompt) == "10+10="
    assert group["tokens"] == [prompt + first, prompt + second]
    assert group["masks"] == [[-100] * len(prompt) + each for each in (first, second)]
    assert group["scores"] == [1.0, 0.0]
    assert group["inference_logprobs"][0][len(prompt) :] == [LOG_PROB] * len(first)
    assert group["generation_params"]["policy_versions"] == [[3, 3], [3, 3]]
    assert group["generation_params"]["temperature"] == 1.0
    record = encode_group(ScoredGroup.from_python(group)).to_bytes()
    ((start, _, header),) = scan(bytearray(record))
    assert read_group(bytearray(record), start, header).scores.tolist() == [1.0, 0.0]


CALL = '<tool_call>\n{"name": "calculator_add", "arguments": {"a": 0, "b": 2}}\n</tool_call>'
WRONG = CALL.replace("calculator_add", "subtract")


@dataclass
class Played:
    """A group, and the turns of its episodes."""

    group: dict[str, Any]
    turns: list[tuple[list[int], list[int]]]


@pytest.fixture(scope="session")
def with_tool(tokenizer: Any, loop: asyncio.Runner) -> dict[str, Played]:
    """Play the task with a tool by three policies, with one start of the tool server."""
    policies: dict[str, Callable[[str], str]] = {
        "right": lambda prompt: "2" if "<tool_response>" in prompt else CALL,
        "wrong": lambda prompt: "2" if "unknown tool" in prompt else WRONG,
        "endless": lambda prompt: CALL,
    }
    played = {}

    async def story() -> None:
        env = environment(
            "vf-calculator", tokenizer, str, renderer={"name": "qwen3"}, max_token_length=900
        )
        await env.setup()
        for name, policy in policies.items():
            env.server.reply, env.server.turns = policy, []
            group, _ = await env.collect_trajectories(env.training[0])
            played[name] = Played(dict(group), env.server.turns)
        await env._serving.aclose()

    loop.run(story())
    return played


def test_turns_with_a_tool_keep_the_sampled_ids_and_do_not_train_the_tool_s(
    tokenizer: Any, with_tool: dict[str, Played]
) -> None:
    group, turns = with_tool["right"].group, with_tool["right"].turns
    assert group["scores"] == [1.0, 1.0] and len(turns) == 4
    (prompt, call), (longer, answer) = (f(turns, key=lambda turn: len(turn[0])) for f in (min, max))
    assert longer[: len(prompt) + len(call)] == prompt + call  # ids, not rendered again
    given = longer[len(prompt) + len(call) :]
    assert "<tool_response>\n2\n</tool_response>" in tokenizer.decode(given)
    assert group["tokens"][0] == prompt + call + given + answer
    hidden = [-100] * len(prompt), [-100] * len(given)
    assert group["masks"][0] == hidden[0] + call + hidden[1] + answer


def test_a_wrong_tool_call_is_told_to_the_model(with_tool: dict[str, Played]) -> None:
    assert with_tool["wrong"].group["scores"] == [1.0, 1.0]


def test_a_conversation_that_fills_the_context_is_complete(with_tool: dict[str, Played]) -> None:
    group = with_tool["endless"].group
    assert group["scores"] == [0.5, 0.5]  # the tool was used, and no answer given
    assert all(700 < len(each) <= 900 for each in group["tokens"])


def test_an_episode_that_fails_says_why(tokenizer: Any, loop: asyncio.Runner) -> None:
    def broken(prompt: str) -> str:
        raise RuntimeError("no server is left")

    env = environment("vf-sums", tokenizer, broken)
    with pytest.raises(RuntimeError, match="an episode of vf-sums failed: .*no server is left"):
        loop.run(one_group(env))


def test_every_task_is_drawn_once_per_epoch_and_the_held_out_ones_never(
    tokenizer: Any, loop: asyncio.Runner
) -> None:
    env = environment("vf-sums", tokenizer, str, env={"taskset": {"largest": 12}}, eval_tasks=5)

    async def story() -> tuple[list[int], list[int]]:
        await env.setup()
        drawn = [(await env.get_next_item())["task"] for _ in range(2 * len(env.training))]
        await env._serving.aclose()
        return drawn[: len(env.training)], drawn[len(env.training) :]

    first, second = loop.run(story())
    assert sorted(first) == sorted(second) == list(range(34)) and first != second
    prompts = {task.data.prompt for task in env.tasks}
    assert len(env.held_out) == 5 and not prompts & {task.data.prompt for task in env.held_out}


def test_an_evaluation_reports_the_reward_and_pass_at_k(
    tokenizer: Any, loop: asyncio.Runner
) -> None:
    """One of four samples per task is right; the greedy answer never is."""
    asked: dict[str, int] = {}

    def reply(prompt: str) -> str:
        asked[prompt] = asked.get(prompt, -1) + 1
        a, b = prompt.rstrip("=").split("+")
        return str(int(a) + int(b)) if asked[prompt] == 3 else "1"

    env = environment("vf-sums", tokenizer, reply, eval_tasks=6, eval_samples=4)

    async def story() -> None:
        await env.setup()
        await env.evaluate()
        await env._serving.aclose()

    loop.run(story())
    assert env.reported["eval/percent_correct"] == 0.0
    assert env.reported["eval/pass@1"] == pytest.approx(0.25)
    assert env.reported["eval/pass@2"] == pytest.approx(0.5)
    assert env.reported["eval/pass@4"] == 1.0
    assert env.reported["eval/reward"] == pytest.approx(0.2)
    temperatures = [options["temperature"] for options in env.server.options]
    assert temperatures == [0.0] * 6 + [1.0] * 24
    assert all(options["split"] == "eval" for options in env.server.options)


@pytest.mark.parametrize(
    ("target", "config", "key", "says"),
    [
        ("vf-sums", {"env": {"taskset": {"largest": 20}}}, None, ""),
        (
            "vf-sums",
            {"env": {"taskset": {"smallest": 20}}},
            "config.env.taskset.smallest",
            "not permitted",
        ),
        ("vf-nothing", {}, "target", "cannot load this taskset"),
    ],
)
def test_a_package_and_its_config_are_checked_before_a_run(
    target: str, config: dict[str, Any], key: str | None, says: str
) -> None:
    found = check_target(target, config)
    assert [problem.key for problem in found] == ([key] if key else [])
    assert all(says in problem.message for problem in found)


def test_the_endpoint_asks_for_its_key(tokenizer: Any, loop: asyncio.Runner) -> None:
    import aiohttp

    env = environment("vf-sums", tokenizer, str)

    async def story() -> list[int]:
        await env.setup()
        url = env.endpoint.client("train", None).base_url
        async with aiohttp.ClientSession() as stranger:
            answers = [await stranger.get(f"{url}/models")]
            answers.append(
                await stranger.post(url.removesuffix("/v1") + "/inference/v1/generate", json={})
            )
        await env._serving.aclose()
        return [answer.status for answer in answers]

    assert loop.run(story()) == [401, 401]
