"""Everything that depends on vLLM's internals in its server, for vLLM 0.25 to 0.32.

The token endpoint of 0.32 reports which weight version sampled each token; 0.25 does not. There the
version is recorded in the API server's output processor (`_record_weight_versions`): no token is
sampled between the answers of /pause and /resume, so every output that is processed belongs to the
version that the last finished update named.

Clients ask for a stream, so that they hold the tokens of an unfinished answer when its server is
lost. 0.32 names the versions in the last chunk only (`_stamp_every_chunk`); the stream of 0.25 has
no field for them, so it answers as a whole (`_answer_as_a_whole`), which clients accept too.

In all versions, answers carry the support of each token where the request asks for it
(`_report_support`), and the prefix cache keeps versions apart (`separate_caches`).

`policy/vllm_engine.py` is the other file that touches vLLM: it runs in vLLM's worker processes.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any

from atropos_hpc.contracts.messages import WANTED

ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # since 0.32
# Tokens of a sample that are sent together. A killed server takes up to one less than that of each
# sample with it. Encoding costs the server 4.9 us per token instead of 3.3 for whole answers (11 us
# with a chunk per token), and decoding costs the client 1.7 us (measured on one core of a CPU).
CHUNK_TOKENS = 4
REPLY_S = 600.0  # for the other workers' replies to a call in which one has failed
# Methods of the workers that change their weights: vLLM's own, and policy/vllm_engine.py's.
CHANGES_OF_WEIGHTS = ("finish_weight_update", "load_policy_adapter")


def version_flags() -> list[str]:
    """Return the flags that only some versions know: 0.32 needs one for its token endpoint."""
    if not _has_entry():
        return []
    return ["--enable-scale-out", "--stream-interval", str(CHUNK_TOKENS)]


def serve(arguments: list[str]) -> None:
    """Run vLLM's OpenAI-compatible server with these arguments until it is stopped."""
    from atropos_hpc.runtime.uvicorn_limits import limit_half_sent_requests

    limit_half_sent_requests()
    sys.argv = ["vllm", *arguments]
    _report_support()
    separate_caches()
    read_every_reply()
    _fork_engine_on_cpu()
    if _has_entry():
        entry: Any = importlib.import_module(ENTRY)
        _stamp_every_chunk()
        entry.main()
        return
    import uvloop
    from vllm.entrypoints.openai import api_server, cli_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parsed = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args()
    cli_args.validate_parsed_serve_args(parsed)
    _record_weight_versions()
    uvloop.run(api_server.run_server(parsed))


def _has_entry() -> bool:
    try:
        return importlib.util.find_spec(ENTRY) is not None
    except ModuleNotFoundError:
        return False


def _fork_engine_on_cpu() -> None:
    """Have the engine's process fork from this one, where there is no accelerator.

    Reason (0.25 to 0.32): on a CPU, vLLM spawns it, which imports vLLM a second time: 8 s of a
    core, and 0.4 GiB. This process has not computed anything by then, so no thread pool is lost.
    Workers of tensor parallelism are still spawned. VLLM_WORKER_MULTIPROC_METHOD=spawn wins; vLLM
    sets it itself later, while it reads its config.
    """
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if current_platform.is_cpu() and os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") != "spawn":
        vars(utils)["get_mp_context"] = lambda: multiprocessing.get_context("fork")


def separate_caches() -> None:
    """Have requests find no keys and values of older weights in the prefix cache.

    Reason (0.25 to 0.32): an update that lets running requests keep theirs leaves the cache as it
    is. A prefix that all prompts share, such as a system message, would stay that of the version
    which computed it first. So the number of updates salts the hashes of a request's blocks. This
    happens in the engine's process: only there is it known whether a request begins under the new
    weights, which those do that were waiting, or arrived during the pause of the update.

    Processes that vLLM forks inherit the change; spawned ones have to call this themselves.
    """
    from vllm.v1.engine.core import EngineCore

    core: Any = EngineCore
    preprocess, add, rpc = core.preprocess_add_request, core.add_request, core.collective_rpc
    core.weight_updates = 0

    def salt_anew(self: Any, request: Any) -> None:
        updates, _, own = request.cache_salt.partition(" ")
        if updates != str(self.weight_updates):
            request.cache_salt = f"{self.weight_updates} {own}"
            request.block_hashes.clear()
            request.update_block_hashes()

    @wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:  # in a thread of its own
        request.cache_salt = f"{self.weight_updates} {request.cache_salt or ''}"
        return preprocess(self, request)

    @wraps(add)
    def add_request(self: Any, request: Any, *args: Any) -> None:
        salt_anew(self, request)
        add(self, request, *args)

    @wraps(rpc)  # vLLM looks at the signature of what a client calls
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        found = rpc(self, method, *args, **kwargs)
        if method in CHANGES_OF_WEIGHTS:
            self.weight_updates += 1
            for request in self.scheduler.requests.values():
                if request.num_computed_tokens == 0:
                    salt_anew(self, request)
        return found

    core.preprocess_add_request, core.add_request = preprocess_add_request, add_request
    core.collective_rpc = collective_rpc


def read_every_reply() -> None:
    """Have a call to all workers read the replies of all, also when one of them has failed.

    Reason (0.25 to 0.32): vLLM raises at the first failure, and leaves the replies of the other
    workers in their queues, where later calls take them for their own. After a version that it
    refuses, a server of several workers refused good ones, and applied one without naming it.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor: Any = MultiprocExecutor
    rpc = executor.collective_rpc

    @wraps(rpc)
    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("unique_reply_rank") is not None or kwargs.get("non_block"):
            return rpc(self, *args, **kwargs)
        queues, replies = self.response_mqs, [_Reply(queue) for queue in self.response_mqs]
        self.response_mqs = replies
        try:
            return rpc(self, *args, **kwargs)
        except RuntimeError:
            left = [reply for reply in replies if not reply.read]
            for reply in left if len(left) < len(replies) else []:  # else another call has failed
                reply.dequeue(timeout=REPLY_S)
            raise
        finally:
            self.response_mqs = queues

    executor.collective_rpc = collective_rpc


class _Reply:
    """The queue of a worker's replies during one call; `read` tells whether its reply was taken."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.read = queue, False

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        self.read = True
        return self.queue.dequeue(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queue, name)


def _stamp_every_chunk() -> None:
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


def _record_weight_versions() -> None:
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


def _report_support() -> None:
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
