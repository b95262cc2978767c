"""An Atropos APIServer over vLLM's token endpoint, `/inference/v1/generate`.

Token ids go in; token ids, log-probs and the weight versions that sampled them come out. So every generation is known with the policy
version behind each token, whatever call the environment used: chat_completion, completion, or a managed server.
"""

import asyncio
import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from atroposlib.envs.server_handling.server_baseline import (
    APIServer,
    APIServerConfig,
    ReasoningConfig,
)
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion
from pydantic import Field
from transformers import AutoTokenizer

from atropos_hpc.rollout.server_pool import pool_of, record

log = logging.getLogger(__name__)


class VllmServerConfig(APIServerConfig):
    """What ServerManager needs for one VllmServer. `timeout` (seconds) is the deadline of one request over all servers it tries."""

    run_dir: Path = Field(description="The run whose servers are used.")
    health_check: bool = False


# OpenAI's names that vLLM's SamplingParams share; what is in none of the three sets is dropped, and said so once
SAMPLING = {
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids",
    "structured_outputs", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "prompt_logprobs",
}  # fmt: skip
TEMPLATE = {
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
}
ELSEWHERE = {
    "model", "messages", "prompt", "input_ids", "extra_body", "tool_choice", "user", "timeout", "stream", "chat_template_kwargs",
    "logprobs", "top_logprobs", "response_format", "max_completion_tokens", "max_new_tokens", "reasoning", "echo",
}  # fmt: skip


class VllmServer(APIServer):
    """What `BaseEnv.server_cls` is set to. ServerManager makes one per server config; all share the run's pool.

    The public calls are overridden, not only the wrappers: upstream's retry three times three, wait without a deadline while
    `server_healthy` is false, and can deadlock on their semaphore inside `ServerManager.dedicated_server`.
    """

    def __init__(
        self, config: VllmServerConfig, reasoning_config: ReasoningConfig | None = None
    ) -> None:
        super().__init__(config, reasoning_config=reasoning_config)
        name = config.model_name if config.tokenizer_name == "none" else config.tokenizer_name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.pool = pool_of(config.run_dir)
        self._said: set[str] = set()  # unknown options that were reported

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        return await self._timed(self._chat_completion_wrapper, kwargs)

    async def completion(self, **kwargs: Any) -> Completion:
        return await self._timed(self._completion_wrapper, kwargs)

    async def tokens_and_logprobs_completion(self, **kwargs: Any) -> tuple[list, list, list, list]:
        return await self._timed(self._tokens_and_logprobs_completion_wrapper, kwargs)

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        return await self._timed(self._get_logprobs_wrapper, kwargs)

    async def _timed(self, call: Any, kwargs: dict[str, Any]) -> Any:
        is_eval = kwargs.pop("split", "train") != "train"
        start = time.time()
        result = await call(**self._inject_reasoning_kwargs(kwargs))
        (self.eval_request_timings if is_eval else self.request_timings).append(time.time() - start)
        return result

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        """Nothing to poll: the roster says who lives."""

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        template = {
            key: options[key] for key in TEMPLATE & options.keys() if options[key] is not None
        }
        if not template.get("continue_final_message"):
            template.setdefault("add_generation_prompt", True)
        template.update(options.get("chat_template_kwargs") or {})
        prompt = self.tokenizer.apply_chat_template(
            plain_messages(kwargs["messages"]), tokenize=True, return_dict=False, **template
        )
        logprobs = (options.get("top_logprobs") or 0) if options.get("logprobs") else None
        answer = await self._generate(
            prompt, self._sampling(options), logprobs=logprobs or 0, text=True
        )
        choices = [
            {
                "index": i,
                "finish_reason": choice["finish_reason"],
                "message": {"role": "assistant", "content": choice["text"]},
                "logprobs": None if logprobs is None else choice["logprobs"],
            }
            for i, choice in enumerate(answer["choices"])
        ]
        return ChatCompletion.model_validate(self._envelope("chat.completion", answer, choices))

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        prompts = kwargs["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        sampling = self._sampling(options)
        answers = await asyncio.gather(
            *(
                self._generate(self._encode(prompt), sampling, logprobs=0, text=True)
                for prompt in prompts
            )
        )
        choices = [
            {"index": i, "finish_reason": choice["finish_reason"], "text": choice["text"]}
            for i, choice in enumerate(choice for answer in answers for choice in answer["choices"])
        ]
        return Completion.model_validate(self._envelope("text_completion", answers[0], choices))

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list, list, list, list]:
        """(prompt ids, output ids, log-probs, finish reasons); all but the first with one entry per choice."""
        options = {**kwargs, **(kwargs.get("extra_body") or {})}
        prompt = self._prompt_ids(options)
        choices = (await self._generate(prompt, self._sampling(options), logprobs=0, text=False))[
            "choices"
        ]
        logprobs = [
            [position["logprob"] for position in choice["logprobs"]["content"]]
            for choice in choices
        ]
        return (
            prompt,
            [c["token_ids"] for c in choices],
            logprobs,
            [c["finish_reason"] for c in choices],
        )

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> dict[str, Any]:
        """Top-k log-probs of the prompt's own tokens, for distillation. Position 0 has none."""
        top_k = max(1, int(kwargs.get("top_k") or kwargs.get("top_logprobs") or 1))
        prompt = self._prompt_ids(kwargs)
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        answer = await self._post(prompt, sampling, logprobs=None, text=False)
        positions = [position or {} for position in answer["prompt_logprobs"]]
        return {
            "prompt_tokens": prompt,
            "prompt_topk_token_ids": [[int(token) for token in p] for p in positions],
            "prompt_topk_logprobs": [[float(v["logprob"]) for v in p.values()] for p in positions],
        }

    async def _generate(
        self, prompt: list[int], sampling: dict[str, Any], *, logprobs: int, text: bool
    ) -> dict[str, Any]:
        answer = await self._post(prompt, sampling, logprobs=logprobs, text=text)
        record(answer["choices"], float(sampling.get("temperature", 1.0)))
        self.pool.generated += sum(len(choice["token_ids"]) for choice in answer["choices"])
        return answer

    async def _post(
        self, prompt: list[int], sampling: dict[str, Any], *, logprobs: int | None, text: bool
    ) -> dict[str, Any]:
        body = {
            "token_ids": prompt,
            "sampling_params": {**sampling, "logprobs": logprobs},
            "output_mode": "text" if text else "tokens",
        }
        return await self.pool.post(body, self.config.timeout)

    def _sampling(self, options: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's options as vLLM's SamplingParams. Without max_tokens the server fills its context."""
        unknown = options.keys() - SAMPLING - TEMPLATE - ELSEWHERE - self._said
        if unknown:
            self._said |= unknown
            log.warning("generation options without effect on vLLM: %s", ", ".join(sorted(unknown)))
        sampling = {
            key: options[key] for key in SAMPLING & options.keys() if options[key] is not None
        }
        for alias in ("max_new_tokens", "max_completion_tokens"):
            if options.get(alias) is not None:
                sampling["max_tokens"] = options[alias]
        stop = sampling.get("stop")
        if isinstance(stop, list):  # environments written for SGLang put token ids there
            sampling["stop_token_ids"] = [
                *sampling.get("stop_token_ids", []),
                *(s for s in stop if isinstance(s, int)),
            ]
            sampling["stop"] = [s for s in stop if isinstance(s, str)]
        match options.get("response_format") or {}:
            case {"type": "json_object"}:
                sampling["structured_outputs"] = {"json_object": True}
            case {"type": "json_schema", "json_schema": {"schema": schema}}:
                sampling["structured_outputs"] = {"json": schema}
        return sampling

    def _prompt_ids(self, options: dict[str, Any]) -> list[int]:
        return (
            list(options["input_ids"])
            if options.get("input_ids") is not None
            else self._encode(options["prompt"])
        )

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids = self.tokenizer.encode(prompt)
        doubled = (
            len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id
        )  # the chat template had already put one there
        return ids[1:] if doubled else ids

    def _envelope(
        self, kind: str, answer: dict[str, Any], choices: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            "id": str(uuid.uuid4()),
            "object": kind,
            "created": answer["created"],
            "model": self.config.model_name,
            "choices": choices,
            "usage": answer["usage"],
        }


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: text parts joined, tool calls' arguments as objects.

    Raises NotImplementedError at parts that are not text.
    """
    plain = []
    for message in messages:
        message = dict(message)
        if isinstance(content := message.get("content"), list):
            if any(part.get("type") != "text" for part in content):
                raise NotImplementedError(
                    "images in messages: the token endpoint is used with text only"
                )
            message["content"] = "".join(part["text"] for part in content)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {
                    **c,
                    "function": {
                        **c["function"],
                        "arguments": _as_object(c["function"]["arguments"]),
                    },
                }
                for c in calls
            ]
        plain.append(message)
    return plain


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
