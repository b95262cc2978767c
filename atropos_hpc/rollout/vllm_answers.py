"""What vLLM's answers say of each token: the weight version that sampled it, and its support.

The token endpoint of 0.32 reports which weight version sampled each token; 0.25 does not. There the
version is recorded in the API server's output processor (`record_weight_versions`): no token is
sampled between the answers of /pause and /resume, so every output that is processed belongs to the
version that the last finished update named.

Clients ask for a stream, so that they hold the tokens of an unfinished answer when its server is
lost. 0.32 names the versions in the last chunk only (`stamp_every_chunk`); the stream of 0.25 has
no field for them, so it answers as a whole (`_answer_as_a_whole`), which clients accept too.

In all versions, answers carry the support of each token where the request asks for it
(`report_support`). Like `vllm_api`, this depends on vLLM's internals, and is for 0.25 to 0.32.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from atropos_hpc.contracts.messages import WANTED


def stamp_every_chunk() -> None:
    """Have 0.32 name the weight versions in every chunk of a stream, not in the last one only.

    The spans cover all tokens of the request so far.
    """
    from vllm.v1.engine import output_processor

    state: Any = output_processor.RequestState
    new_completion = state._new_completion_output

    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_completion(self, *args, **kwargs)
        output.weight_versions = self._weight_version_spans()
        return output

    state._new_completion_output = new_completion_output


def record_weight_versions() -> None:
    """Have vLLM 0.25 report the version behind each token, as 0.32 does.

    Choices get `weight_versions`, spans {version, start, end} of tokens.
    """
    label = _Label()
    _stamp_outputs(label)
    _add_spans_to_answers()
    _answer_as_a_whole()
    _name_versions_in_routes(label)


@dataclass
class _Label:
    """The label of the weights that the server samples with."""

    version: str = "default"


def _stamp_outputs(label: _Label) -> None:
    """Note in the state of each request at which token the label changed."""
    from vllm.v1.engine import output_processor

    state: Any = output_processor.RequestState
    make_output, new_completion = state.make_request_output, state._new_completion_output

    def make_request_output(self: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        if new_token_ids:
            starts = self.__dict__.setdefault("weight_version_starts", [])
            if not starts or starts[-1][0] != label.version:
                begin = self.detokenizer.num_output_tokens() - len(new_token_ids)
                starts.append((label.version, begin))
        return make_output(self, new_token_ids, *args, **kwargs)

    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_completion(self, *args, **kwargs)
        starts = self.__dict__.get("weight_version_starts", [])
        ends = [begin for _, begin in starts[1:]] + [self.detokenizer.num_output_tokens()]
        output.weight_versions = [
            {"version": version, "start": begin, "end": end}
            for (version, begin), end in zip(starts, ends, strict=True)
        ]
        return output

    state.make_request_output = make_request_output
    state._new_completion_output = new_completion_output


def _add_spans_to_answers() -> None:
    """Copy the spans into the token endpoint's choices, and answer with all n samples."""
    from vllm.entrypoints.scale_out.token_in_token_out import protocol, serving

    class Choice(protocol.GenerateResponseChoice):  # type: ignore[misc, name-defined]
        weight_versions: list[dict[str, str | int]] | None = None
        sampling_mask: list[list[int]] | None = None  # which 0.32 has and fills by itself

    class Response(protocol.GenerateResponse):  # type: ignore[misc, name-defined]
        choices: list[Choice]

    names = vars(serving)
    names["GenerateResponseChoice"], names["GenerateResponse"] = Choice, Response
    full_generator = serving.ServingTokens.serve_tokens_full_generator

    async def serve_tokens_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any
    ) -> Any:
        last: Any = None

        async def watched() -> Any:
            # 0.25 answers with the outputs of the last message alone, which holds one of n samples.
            nonlocal last
            outputs: dict[int, Any] = {}
            async for last in result_generator:
                outputs |= {output.index: output for output in last.outputs}
            last.outputs = [outputs[index] for index in sorted(outputs)]
            yield last

        response = await full_generator(self, request, watched(), *args)
        if isinstance(response, Response):
            for choice, output in zip(response.choices, last.outputs, strict=True):
                choice.weight_versions = output.weight_versions
                if (mask := output.__dict__.get("sampling_mask")) is not None:
                    choice.sampling_mask = mask.token_ids
        return response

    serving.ServingTokens.serve_tokens_full_generator = serve_tokens_full_generator


def _answer_as_a_whole() -> None:
    """Have 0.25 answer requests for a stream without one."""
    from vllm.entrypoints.scale_out.token_in_token_out import serving

    serve_tokens = serving.ServingTokens.serve_tokens

    async def serve_whole(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        request.stream = False
        return await serve_tokens(self, request, *args, **kwargs)

    serving.ServingTokens.serve_tokens = serve_whole


def report_support() -> None:
    """Have requests with WANTED in extra_args answered with each token's support.

    Reason (0.25 to 0.32): only 0.32 reports the support (--return-sampling-mask), and then only
    with its model runner V2 (no CPU), for requests with top_k, and not at all to greedy ones. The
    log-probs of mode "processed_logprobs" show it in every version and with every runner: an id
    that was masked has -inf. So such a request has `logprobs` set to the largest support, the
    engine sends that many log-probs, and here, in the API server's output processor, they are
    reduced to `sampling_mask` and to the number of log-probs that the caller wants. A token with
    more ids than `logprobs` gets an empty list.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.engine.output_processor import RequestState

    parameters: Any = SamplingParams
    processor: Any = LogprobsProcessor
    state: Any = RequestState
    validate, new_completion = parameters._validate_logprobs, state._new_completion_output
    from_request, update = processor.from_new_request, processor._update_sample_logprobs
    vocabulary = sys.maxsize

    def validate_logprobs(self: Any, model_config: Any) -> None:
        nonlocal vocabulary
        vocabulary = model_config.get_vocab_size()
        if _wanted(self) is not None:  # the sampler fails if it has to find more than there are
            self.logprobs = min(self.logprobs, vocabulary)
        validate(self, model_config)

    def from_new_request(tokenizer: Any, request: Any) -> Any:
        made = from_request(tokenizer=tokenizer, request=request)
        if (wanted := _wanted(request.sampling_params)) is not None:
            made.support, made.largest, made.num_logprobs = [], made.num_logprobs, wanted
        return made

    def update_sample_logprobs(self: Any, found: Any) -> None:
        ids, log_probs, ranks, *rest = found
        if (support := self.__dict__.get("support")) is not None:
            complete = self.largest >= vocabulary
            for row, values in zip(ids, log_probs, strict=True):
                kept = values > -math.inf
                full = bool(kept.all()) and not complete
                support.append([] if full else sorted(set(row[kept].tolist())))
        if self.num_logprobs >= 0:
            # Every request gets as many as the one of its batch that wants most, and decodes all.
            columns = slice(self.num_logprobs + 1)
            found = type(found)(ids[:, columns], log_probs[:, columns], ranks, *rest)
        update(self, found)

    def new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_completion(self, *args, **kwargs)
        if (support := self.logprobs_processor.__dict__.get("support")) is not None:
            new = len(support) - len(output.token_ids)  # in a stream, those of this chunk
            output.sampling_mask = SimpleNamespace(token_ids=support[new:])
        return output

    parameters._validate_logprobs = validate_logprobs
    processor.from_new_request = staticmethod(from_new_request)
    processor._update_sample_logprobs = update_sample_logprobs
    state._new_completion_output = new_completion_output


def _wanted(sampling: Any) -> int | None:
    """Return the number of log-probs that a caller wants beside the support, None without it."""
    return (sampling.extra_args or {}).get(WANTED) if sampling is not None else None


def _name_versions_in_routes(label: _Label) -> None:
    """Have the routes set the label: 0.25 ignores the body that names it."""
    from fastapi import Request
    from vllm.entrypoints.serve.dev.rlhf import api_router

    finish = "/finish_weight_update"
    routes = api_router.router.routes
    original = next(route.endpoint for route in routes if route.path == finish)
    routes[:] = [route for route in routes if route.path != finish]

    async def finish_weight_update(raw_request: Request) -> Any:
        answer = await original(raw_request)
        body = await raw_request.json() if await raw_request.body() else {}
        label.version = body.get("weight_version", label.version)
        return answer

    async def update_weight_version(raw_request: Request) -> Any:
        label.version = (await raw_request.json())["new_version"]
        return {"success": True}

    endpoints = ((finish, finish_weight_update), ("/update_weight_version", update_weight_version))
    for path, endpoint in endpoints:
        endpoint.__annotations__ = {"raw_request": Request}  # resolved, as FastAPI needs them
        api_router.router.post(path)(endpoint)
