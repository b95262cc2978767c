"""Everything that depends on vLLM's internals in the API server, for vLLM 0.25 to 0.32.

The token endpoint of 0.32 reports which weight version sampled each token; 0.25 does not. There the
version is recorded in the API server's output processor (`_record_weight_versions`): between the answer
of /pause and /resume no token is sampled, so every output that is processed belongs to the version that
the last finished update named.

`policy/vllm_engine.py` is the other file that touches vLLM: it runs in vLLM's worker processes.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

ENTRY = "vllm.entrypoints.launchers.api_server.entry"  # since 0.32


def version_flags() -> list[str]:
    """Command-line flags that only some versions know: 0.32 hides the token endpoint without one."""
    return ["--enable-scale-out"] if _has_entry() else []


def serve(arguments: list[str]) -> None:
    """Run vLLM's OpenAI-compatible server with these arguments until it is stopped."""
    sys.argv = ["vllm", *arguments]
    if _has_entry():
        entry: Any = importlib.import_module(ENTRY)
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


def _record_weight_versions() -> None:
    """Have vLLM 0.25 answer with `weight_versions`, as 0.32 does: spans {version, start, end} of tokens."""
    from vllm.entrypoints.scale_out.token_in_token_out import protocol, serving
    from vllm.entrypoints.serve.dev.rlhf import api_router
    from vllm.v1.engine import output_processor

    current = {"version": "default"}
    state_class: Any = output_processor.RequestState
    make_output, new_completion = (
        state_class.make_request_output,
        state_class._new_completion_output,
    )

    def make_request_output(self: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        if new_token_ids:
            starts = self.__dict__.setdefault("weight_version_starts", [])
            if not starts or starts[-1][0] != current["version"]:
                begin = self.detokenizer.num_output_tokens() - len(new_token_ids)
                starts.append((current["version"], begin))
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

    state_class.make_request_output = make_request_output
    state_class._new_completion_output = new_completion_output

    class Choice(protocol.GenerateResponseChoice):  # type: ignore[misc, name-defined]
        weight_versions: list[dict[str, Any]] | None = None

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
        return response

    serving.ServingTokens.serve_tokens_full_generator = serve_tokens_full_generator

    # The route of 0.25 ignores its body, which names the version.
    finish_path = "/finish_weight_update"
    routes = api_router.router.routes
    original = next(route.endpoint for route in routes if route.path == finish_path)
    routes[:] = [route for route in routes if route.path != finish_path]
    from fastapi import Request

    async def finish_weight_update(raw_request: Request) -> Any:
        answer = await original(raw_request)
        body = await raw_request.json() if await raw_request.body() else {}
        current["version"] = body.get("weight_version", current["version"])
        return answer

    async def update_weight_version(raw_request: Request) -> Any:
        current["version"] = (await raw_request.json())["new_version"]
        return {"success": True}

    for path, endpoint in (
        (finish_path, finish_weight_update),
        ("/update_weight_version", update_weight_version),
    ):
        endpoint.__annotations__ = {"raw_request": Request}
        api_router.router.post(path)(endpoint)
