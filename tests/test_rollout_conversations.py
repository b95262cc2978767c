"""Conversations of several turns keep the sampled ids, for chat templates of three families."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rollout_parts import list_servers, make_run

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from chat_models import BETWEEN, FAMILIES, Family, save_tokenizer  # noqa: E402
from stub_vllm import Interrupt, Policy, StubVllm  # noqa: E402

from atropos_hpc.rollout.env_loader import patch_atropos  # noqa: E402
from atropos_hpc.rollout.server_pool import pool_of  # noqa: E402
from atropos_hpc.rollout.tool_calls import ROUTE  # noqa: E402
from atropos_hpc.rollout.vllm_client import WHOLE_TOKENS, VllmServer, VllmServerConfig  # noqa: E402

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
END = "END"  # the token that ends a turn
# What the model samples, token by token: ids that no tokenizer gives for their text, space that
# templates trim, reasoning that they drop, an answer that reaches max_tokens, a plain one.
ANSWERS = [
    ["t", "h", "e", " ", "a", "b", END],
    [" ", "x", "on", " ", "\n", END],
    ["<think>", "h", "m", "</think>", "o", "n", END],
    ["a"] * 8,
    ["y", "e", "s", END],
]
QUESTIONS = ["on the table", "ab?", "the", "more", "end"]


class ScriptedVllm(StubVllm):
    """Samples the given answers, one per request."""

    def __init__(self, family: Family, tokenizer: Any) -> None:
        super().__init__()
        self.ids = {token: i for token, i in tokenizer.get_vocab().items()}
        self.eos = self.ids[END] = tokenizer.eos_token_id
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self.script = [[self.ids[token] for token in answer] for answer in ANSWERS]
        self.left = iter(self.script)

    def plan(self, body: dict[str, Any]) -> tuple[Policy, Interrupt]:
        answer = iter(next(self.left))
        return lambda _: next(answer), ("", 0)


@asynccontextmanager
async def serving(
    path: Path, family: Family, **rollout: Any
) -> AsyncIterator[tuple[VllmServer, ScriptedVllm]]:
    tokenizer = save_tokenizer(family, path / "model")
    run = make_run(path / "run", model={"path": str(path / "model")}, rollout=rollout)
    async with ScriptedVllm(family, tokenizer) as stub:
        list_servers(run, {stub.url: 1})
        name = str(path / "model")
        config = VllmServerConfig(
            run_dir=run.path, model_name=name, tokenizer_name=name, timeout=30, server_type="vllm"
        )
        yield VllmServer(config), stub
        await pool_of(run.path).close()


def expected(server: VllmServer, stub: ScriptedVllm, family: Family) -> list[int]:
    """What was given and what was sampled, in turn; the end of each turn is there once."""
    ids: list[int] = []
    for question, answer in zip(QUESTIONS, stub.script, strict=True):
        between = ""
        if ids:
            between = BETWEEN[family.name]
            if ids[-1] != stub.eos:  # the answer before was cut short: its turn has to be ended
                between = family.end + between
        text = (between or ("" if ids else family.start)) + family.before + question + family.after
        ids += server.tokenizer.encode(text, add_special_tokens=False) + answer
    return ids


def run_test(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@families
def test_five_turns_of_chat_completion_are_what_was_given_and_sampled(
    tmp_path: Path, family: Family
) -> None:
    async def main() -> None:
        async with serving(tmp_path, family) as (server, stub):
            messages: list[Any] = []
            for question in QUESTIONS:
                messages.append({"role": "user", "content": question})
                answer = await server.chat_completion(messages=messages, max_tokens=8)
                message = answer.choices[0].message
                messages.append({"role": "assistant", "content": message.content})
            final = stub.requests[-1]["token_ids"] + stub.script[-1]
            assert final == expected(server, stub, family)
            assert answer.prompt_token_ids + answer.choices[0].token_ids == final

    run_test(main())


@families
def test_five_turns_of_a_managed_server_are_what_was_given_and_sampled(
    tmp_path: Path, family: Family
) -> None:
    from atroposlib.envs.server_handling.server_manager import ServerManager

    async def main() -> None:
        patch_atropos()
        async with serving(tmp_path, family) as (server, stub):
            manager = ServerManager([server.config], server_class=VllmServer)
            messages: list[Any] = []
            async with manager.managed_server(tokenizer=server.tokenizer) as managed:
                for question in QUESTIONS:
                    messages.append({"role": "user", "content": question})
                    answer = await managed.chat_completion(messages=messages, max_tokens=8)
                    messages.append(answer.choices[0].message.model_dump())
                (node,) = managed.get_state()["nodes"]
            assert node.tokens == expected(server, stub, family)
            trained = [t for t, m in zip(node.tokens, node.masked_tokens, strict=True) if m != -100]
            assert trained == [token for answer in stub.script for token in answer]
            sampled = [p for p in node.logprobs if p != 1.0]
            assert sampled == [-token / 100 for token in trained]

    run_test(main())


@families
def test_five_turns_by_token_ids_are_what_was_given_and_sampled(
    tmp_path: Path, family: Family
) -> None:
    """As Atropos does it: the first prompt is encoded with special tokens, and so begins with two
    BOS; after a sampled end the template's text begins with the same end again."""

    async def main() -> None:
        async with serving(tmp_path, family) as (server, stub):
            encode = server.tokenizer.encode
            ids: list[int] = []
            for question in QUESTIONS:
                text = family.before + question + family.after
                if ids:
                    text = family.end + BETWEEN[family.name] + text
                    ids += encode(text, add_special_tokens=False)
                else:
                    ids = encode(family.start + text)
                    assert family.bos is None or ids[0] == ids[1]
                prompt, outputs, log_probs, _ = await server.tokens_and_logprobs_completion(
                    input_ids=ids, max_tokens=8
                )
                assert stub.requests[-1]["token_ids"] == prompt
                assert stub.requests[-1]["sampling_params"]["detokenize"] is False  # not needed
                ids = prompt + outputs[0]
                assert len(log_probs[0]) == len(outputs[0])
            assert ids == expected(server, stub, family)

    run_test(main())


def test_only_answers_that_may_be_long_are_streamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, FAMILIES[0]) as (server, stub):
            for most in (WHOLE_TOKENS, WHOLE_TOKENS + 1):
                await server.tokens_and_logprobs_completion(prompt="the", max_tokens=most)
            assert [each.get("stream", False) for each in stub.requests] == [False, True]

    run_test(main())


@families
def test_an_edited_answer_is_rendered_anew(tmp_path: Path, family: Family) -> None:
    async def main() -> None:
        async with serving(tmp_path, family) as (server, stub):
            messages = [{"role": "user", "content": "the"}]
            await server.chat_completion(messages=messages, max_tokens=8)
            messages += [
                {"role": "assistant", "content": "another"},
                {"role": "user", "content": "on"},
            ]
            await server.chat_completion(messages=messages, max_tokens=8)
            rendered = server.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            assert stub.requests[-1]["token_ids"] == rendered

    run_test(main())


def test_a_tool_call_comes_back_parsed_and_its_ids_stay_as_sampled(tmp_path: Path) -> None:
    """The stub parses as vLLM's hermes parser does; the real one is in test_rollout_survival."""
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    family = FAMILIES[1]

    async def main() -> None:
        async with serving(tmp_path, family, tool_parser="hermes") as (server, stub):
            tokens = server.tokenizer.encode(call, add_special_tokens=False)
            stub.script = [[*tokens, stub.eos], stub.script[0]]
            stub.left = iter(stub.script)
            function = {"name": "add", "arguments": '{"a": 1}'}
            asked = []

            async def parse(request: web.Request) -> web.Response:
                asked.append(await request.json())
                calls = [{"id": "x", "type": "function", "function": function}]
                if asked[-1]["generate_response"]["choices"][0]["token_ids"] != tokens:
                    calls = []
                message = {"role": "assistant", "content": None, "tool_calls": calls}
                return web.json_response({"choices": [{"index": 0, "message": message}]})

            stub.routes[ROUTE] = parse
            messages: list[Any] = [{"role": "user", "content": "the"}]
            answer = await server.chat_completion(messages=messages, tools=tools, max_tokens=200)
            (choice,) = answer.choices
            assert choice.finish_reason == "tool_calls"
            (found,) = choice.message.tool_calls
            assert json.loads(found.function.arguments) == {"a": 1}
            assert asked[0]["chat_request"]["tools"] == tools
            messages += [
                choice.message.model_dump(),
                {"role": "tool", "content": "2", "tool_call_id": found.id},
            ]
            answer = await server.chat_completion(messages=messages, tools=tools, max_tokens=200)
            assert answer.choices[0].finish_reason == "stop"
            given = "\n<|im_start|>user\n<tool_response>\n2\n</tool_response>" + family.after
            first, second = (body["token_ids"] for body in stub.requests)
            given_ids = server.tokenizer.encode(given, add_special_tokens=False)
            assert second == first + stub.script[0] + given_ids

    run_test(main())


def test_conversations_with_equal_texts_keep_their_own_ids(tmp_path: Path) -> None:
    """Two of a group answer alike, but for a space that the environment removes."""
    family = FAMILIES[1]

    async def main() -> None:
        async with serving(tmp_path, family) as (server, stub):
            answers = [["y", "e", "s", END], ["y", "e", "s", " ", END]]
            stub.script = [[stub.ids[token] for token in answer] for answer in answers]
            stub.left = iter(stub.script * 2)
            both = asyncio.Barrier(2)

            async def hold() -> list[int]:
                messages: list[Any] = [{"role": "user", "content": "the"}]
                answer = await server.chat_completion(messages=messages, max_tokens=8)
                await both.wait()
                text = answer.choices[0].message.content.strip()
                messages.append({"role": "assistant", "content": text})
                messages.append({"role": "user", "content": "more"})
                again = await server.chat_completion(messages=messages, max_tokens=8)
                first: list[int] = answer.prompt_token_ids + answer.choices[0].token_ids
                assert again.prompt_token_ids[: len(first)] == first
                return first

            first, second = await asyncio.gather(hold(), hold())
            assert first != second

    run_test(main())
