"""The start of vLLM's server, and what is changed in its processes, for vLLM 0.25 to 0.32.

The prefix cache keeps versions apart (`separate_caches`), and a call to several workers reads the
replies of all (`read_every_reply`). `vllm_answers` changes what the API server answers.

These two files and `policy/vllm_engine.py`, which runs in vLLM's worker processes, are all that
depends on vLLM's internals.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from functools import wraps
from typing import Any

from atropos_hpc.rollout.vllm_answers import (
    record_weight_versions,
    report_support,
    stamp_every_chunk,
)

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
    report_support()
    separate_caches()
    read_every_reply()
    _fork_engine_on_cpu()
    if _has_entry():
        entry: Any = importlib.import_module(ENTRY)
        stamp_every_chunk()
        entry.main()
        return
    import uvloop
    from vllm.entrypoints.openai import api_server, cli_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parsed = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args()
    cli_args.validate_parsed_serve_args(parsed)
    record_weight_versions()
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
