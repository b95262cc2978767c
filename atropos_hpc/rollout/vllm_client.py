"""An Atropos APIServer over vLLM's token endpoint, /inference/v1/generate.

Token ids go in; token ids, log-probs and the weight versions that sampled them come out. So every
generation has the policy version of each token, whatever call the environment used:
chat_completion, completion, or a managed server.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from atroposlib.envs.server_handling.server_baseline import (
    APIServer,
    APIServerConfig,
    ReasoningConfig,
)
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion
from pydantic import Field
from transformers import AutoTokenizer

from atropos_hpc.contracts.messages import (
    GenerateAnswer,
    GenerateRequest,
    Generation,
    ParsedMessage,
    SamplingParams,
    Usage,
)
from atropos_hpc.contracts.policy import ADAPTER_NAME
from atropos_hpc.contracts.scored_group import JsonObject
from atropos_hpc.rollout.conversations import Conversations
from atropos_hpc.rollout.rollout_failures import note_request_error
from atropos_hpc.rollout.sampling_support import sampled, with_support
from atropos_hpc.rollout.server_pool import pool_of
from atropos_hpc.rollout.stamping import is_training, record
from atropos_hpc.rollout.tool_calls import PROMPT_TAIL, ToolCallParser

log = logging.getLogger(__name__)

# Answers that may be longer are streamed. Of shorter ones, a lost server takes few tokens with it,
# while streaming them is about a third of the server's and the client's work (of four tokens each).
WHOLE_TOKENS = 16
# OpenAI's options by what becomes of them; the rest is dropped, with one warning.
SAMPLING = set(SamplingParams.__struct_fields__) - {"logprobs", "extra_args", "detokenize"}
TEMPLATE = {
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
}
HANDLED = {
    *("model", "messages", "prompt", "input_ids", "extra_body", "tool_choice", "user", "timeout"),
    *("stream", "chat_template_kwargs", "logprobs", "top_logprobs", "response_format"),
    *("max_completion_tokens", "max_new_tokens", "reasoning", "echo"),
}


class VllmServerConfig(APIServerConfig):
    """What ServerManager needs for one VllmServer.

    `timeout` (seconds) is the deadline of one request over all servers that it tries.
    """

    run_dir: Path = Field(description="The run whose servers are used.")
    health_check: bool = False


@dataclass
class Turn:
    """An answered conversation: the prompt's ids, and each answer as sampled and as a message."""

    prompt: list[int]
    choices: list[Generation]
    messages: list[JsonObject]
    usage: Usage | None


class VllmServer(APIServer):
    """The class that BaseEnv.server_cls is set to. All instances share the run's pool.

    It overrides the public calls, not only the wrappers: Atropos' own retry three times three, wait
    without a deadline while `server_healthy` is false, and can deadlock on their semaphore inside
    `ServerManager.dedicated_server`.
    """

    def __init__(
        self, config: VllmServerConfig, reasoning_config: ReasoningConfig | None = None
    ) -> None:
        super().__init__(config, reasoning_config=reasoning_config)
        name = config.model_name if config.tokenizer_name == "none" else config.tokenizer_name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.pool = pool_of(config.run_dir)
        of_run = self.pool.run.config()
        self._model = ADAPTER_NAME if of_run.model.lora.rank else None
        self._max_support = of_run.rollout.max_support
        self._max_length = of_run.model.max_length
        self.conversations = Conversations(self.tokenizer)
        self.tool_calls = ToolCallParser(self.pool, of_run.rollout.tool_parser)
        self._warned: set[str] = set()  # unknown options that were reported

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Complete a conversation."""
        return await self._timed(self._chat_completion_wrapper, kwargs)

    async def completion(self, **kwargs: Any) -> Completion:
        """Complete one or more prompts."""
        return await self._timed(self._completion_wrapper, kwargs)

    async def tokens_and_logprobs_completion(self, **kwargs: Any) -> tuple[list, list, list, list]:
        """Complete a prompt, with token ids and log-probs."""
        return await self._timed(self._tokens_and_logprobs_completion_wrapper, kwargs)

    async def get_logprobs(self, **kwargs: Any) -> JsonObject:
        """Return the log-probs of a prompt's own tokens."""
        return await self._timed(self._get_logprobs_wrapper, kwargs)

    async def _timed(self, call: Callable[..., Awaitable[Any]], kwargs: JsonObject) -> Any:
        is_eval = kwargs.pop("split", "train") != "train"
        start = time.time()
        try:
            result = await call(**self._inject_reasoning_kwargs(kwargs))
        except Exception as error:
            note_request_error(error)
            raise
        (self.eval_request_timings if is_eval else self.request_timings).append(time.time() - start)
        return result

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        """Do nothing: the roster says which servers are alive."""

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        turn = await self.turn(**kwargs)
        wanted = bool({**kwargs, **(kwargs.get("extra_body") or {})}.get("logprobs"))
        choices = [
            {
                "index": i,
                "finish_reason": choice.finish_reason,
                "message": message,
                "logprobs": msgspec.to_builtins(choice.logprobs) if wanted else None,
                "token_ids": choice.token_ids,
            }
            for i, (choice, message) in enumerate(zip(turn.choices, turn.messages, strict=True))
        ]
        completion = self._envelope("chat.completion", turn.usage, choices)
        return ChatCompletion.model_validate({**completion, "prompt_token_ids": turn.prompt})

    async def turn(self, **kwargs: Any) -> "Turn":
        """Answer a conversation, with the ids of its earlier answers as they were sampled."""
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        given = TEMPLATE & options.keys()
        template = {key: options[key] for key in given if options[key] is not None}
        if not template.get("continue_final_message"):
            template.setdefault("add_generation_prompt", True)
        template.update(options.get("chat_template_kwargs") or {})
        messages = plain_messages(kwargs["messages"])
        prompt = self.conversations.prompt(messages, template)
        sampling = self._sampling(options)
        sampling.logprobs = (options.get("top_logprobs") or 0) if options.get("logprobs") else 0
        answer = await self._generate(prompt, sampling, "text")
        turn = Turn(prompt, answer.choices, [], answer.usage)
        parsed: Sequence[ParsedMessage | None] = [None] * len(answer.choices)
        if options.get("tools") and options.get("tool_choice") != "none":
            parsed = await self.tool_calls.parse(
                prompt, answer.choices, options["tools"], self.config.timeout
            )
        for choice, calls in zip(answer.choices, parsed, strict=True):
            message: JsonObject = {"role": "assistant", "content": self._text(choice, sampling)}
            if calls is not None:
                message |= msgspec.to_builtins(calls)
                choice.finish_reason = "tool_calls"
            turn.messages.append(message)
            (plain,) = plain_messages([message])
            self.conversations.remember(messages, template, plain, [*prompt, *choice.token_ids])
        return turn

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        prompts = kwargs["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        sampling = self._sampling(options)
        answers = await asyncio.gather(
            *(self._generate(self._encode(prompt), sampling, "text") for prompt in prompts)
        )
        choices = [
            {
                "index": i,
                "finish_reason": choice.finish_reason,
                "text": self._text(choice, sampling),
            }
            for i, choice in enumerate(choice for answer in answers for choice in answer.choices)
        ]
        usage = answers[0].usage
        return Completion.model_validate(self._envelope("text_completion", usage, choices))

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list, list, list, list]:
        """Return (prompt ids, output ids, log-probs, finish reasons); the last three by choice."""
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        prompt = self._prompt_ids(options)
        choices = (await self._generate(prompt, self._sampling(options), "tokens")).choices
        return (
            prompt,
            [choice.token_ids for choice in choices],
            [choice.sampled_log_probs for choice in choices],
            [choice.finish_reason for choice in choices],
        )

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> JsonObject:
        """Return top-k log-probs of the prompt's own tokens, for distillation.

        Position 0 has none.
        """
        top_k = max(1, int(kwargs.get("top_k") or kwargs.get("top_logprobs") or 1))
        prompt = self._prompt_ids(kwargs)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k)
        request = GenerateRequest(prompt, sampling, "tokens", self._model)
        answer = await self.pool.post(request, self.config.timeout)
        positions = [position or {} for position in answer.prompt_logprobs or ()]
        return {
            "prompt_tokens": prompt,
            "prompt_topk_token_ids": [[int(token) for token in p] for p in positions],
            "prompt_topk_logprobs": [[each.logprob for each in p.values()] for p in positions],
        }

    def _text(self, choice: Generation, sampling: SamplingParams) -> str:
        """Return the server's text of a choice, or, as vLLM 0.25 gives none, decode it here.

        A decoded text ends before its first stop string, as the server's does.
        """
        if choice.text is not None:
            return choice.text
        skip = sampling.skip_special_tokens is not False
        text = str(self.tokenizer.decode(choice.token_ids, skip_special_tokens=skip))
        if sampling.include_stop_str_in_output:
            return text
        stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    async def _generate(
        self, prompt: list[int], sampling: SamplingParams, mode: Literal["tokens", "text"]
    ) -> GenerateAnswer:
        if len(prompt) >= self._max_length:
            found = f"the prompt has {len(prompt)} tokens"
            raise ValueError(f"{found}, no shorter than model.max_length={self._max_length}")
        sampling.logprobs = sampling.logprobs or 0
        if mode == "tokens" and not sampling.stop:
            sampling.detokenize = False  # a third of the API server's work, for text nobody reads
        if is_training():
            sampling = with_support(sampling, self._max_support)
        stream = sampling.max_tokens is None or sampling.max_tokens > WHOLE_TOKENS
        request = GenerateRequest(prompt, sampling, mode, self._model, stream=stream)
        skip = sampling.skip_special_tokens is not False
        decode = functools.partial(self._decode_after, prompt, skip)
        answer = await self.pool.post(request, self.config.timeout, decode)
        record(sampled(answer.choices, prompt, sampling))
        for choice in answer.choices:
            if choice.ended_by_token and choice.token_ids:
                self.conversations.remember_end([*prompt, *choice.token_ids])
        return answer

    def _decode_after(self, prompt: list[int], skip_special: bool, tokens: Sequence[int]) -> str:
        """Decode an answer as the continuation of its prompt: a leading space stays."""
        tail = prompt[-PROMPT_TAIL:]
        before = self.tokenizer.decode(tail, skip_special_tokens=skip_special)
        text = self.tokenizer.decode([*tail, *tokens], skip_special_tokens=skip_special)
        return str(text)[len(before) :]

    def _sampling(self, options: JsonObject) -> SamplingParams:
        """Translate OpenAI's options. Without max_tokens the server fills its context."""
        unknown = options.keys() - SAMPLING - TEMPLATE - HANDLED - self._warned
        if unknown:
            self._warned |= unknown
            log.warning("ignoring options that vLLM does not have: %s", ", ".join(sorted(unknown)))
        given = SAMPLING & options.keys()
        sampling = SamplingParams(**{k: options[k] for k in given if options[k] is not None})
        for alias in ("max_new_tokens", "max_completion_tokens"):
            if options.get(alias) is not None:
                sampling.max_tokens = options[alias]
        if isinstance(sampling.stop, list):  # environments for SGLang put token ids there
            stop: list[Any] = list(sampling.stop)
            ids = [s for s in stop if isinstance(s, int)]
            sampling.stop_token_ids = [*(sampling.stop_token_ids or []), *ids]
            sampling.stop = [s for s in stop if isinstance(s, str)]
        match options.get("response_format") or {}:
            case {"type": "json_object"}:
                sampling.structured_outputs = {"json_object": True}
            case {"type": "json_schema", "json_schema": {"schema": schema}}:
                sampling.structured_outputs = {"json": schema}
        return sampling

    def _prompt_ids(self, options: JsonObject) -> list[int]:
        ids = options.get("input_ids")
        return self._encode(options["prompt"] if ids is None else ids)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self.conversations.without_repeated_tokens(ids)

    def _envelope(self, kind: str, usage: Usage | None, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": str(uuid.uuid4()),
            "object": kind,
            "created": int(time.time()),
            "model": self.config.model_name,
            "choices": choices,
            "usage": msgspec.to_builtins(usage),
        }


def plain_messages(messages: list[JsonObject]) -> list[JsonObject]:
    """Rewrite messages as chat templates expect: text parts joined, tool arguments as objects.

    Raises NotImplementedError for parts that are not text.
    """
    plain = []
    for message in messages:
        message = dict(message)
        if isinstance(content := message.get("content"), list):
            if any(part.get("type") != "text" for part in content):
                raise NotImplementedError("images in messages: the token endpoint takes text only")
            message["content"] = "".join(part["text"] for part in content)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "function": _with_parsed_arguments(call["function"])} for call in calls
            ]
        plain.append(message)
    return plain


def _with_parsed_arguments(function: JsonObject) -> JsonObject:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        with contextlib.suppress(json.JSONDecodeError):  # what a model wrote may be malformed
            arguments = json.loads(arguments)
    return {**function, "arguments": arguments}
