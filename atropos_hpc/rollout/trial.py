"""A trial of an environment before anything is queued: one group, against a stub of the servers.

It sets the environment up, draws a prompt, and rolls a group out as a worker would. The stub
answers with random tokens, so scores say nothing; but a chat template that refuses a message, data
of a wrong shape, or a group that the trajectory server would refuse shows here. Then it evaluates,
if the run does and the evaluation is short, to learn whether it reports environment.metric.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from atroposlib.envs.base import BaseEnv

from atropos_hpc.config import Config
from atropos_hpc.contracts.answers import Problem
from atropos_hpc.contracts.group import Limits, encode_group
from atropos_hpc.contracts.members import AgentState, Roster, ServerState
from atropos_hpc.contracts.messages import (
    WANTED,
    GenerateAnswer,
    GenerateRequest,
    Generation,
    Logprobs,
    SamplingParams,
    TokenLogprob,
    Usage,
    VersionSpan,
)
from atropos_hpc.contracts.policy import PolicyVersion
from atropos_hpc.contracts.scored_group import RequestError, ScoredGroup
from atropos_hpc.rollout import env_loader
from atropos_hpc.rollout.evaluation import NAMED, as_evaluator, evaluate
from atropos_hpc.rollout.rollout_failures import AccountedRollouts, Loss, Losses, files_of
from atropos_hpc.rollout.sampling_support import complete_group
from atropos_hpc.rollout.server_pool import GENERATE
from atropos_hpc.rollout.vllm_client import VllmServer
from atropos_hpc.runtime.error_text import describe_error
from atropos_hpc.runtime.run_dir import RunDir, write_file, write_struct

PROMPTS = 3  # that are tried until one gives a group: a single one may be too long
STUB_TOKENS = 16  # of an answer, at most
EVALUATION_S = 10.0  # at most; one that takes longer is not judged

Expect = Callable[[str], None]


class StubServer:
    """A vLLM token endpoint that samples tokens at random, for this process's event loop."""

    def __init__(self, vocabulary: int, eos: int | None, max_length: int) -> None:
        self.vocabulary, self.eos, self.max_length = vocabulary, eos, max_length
        self.random = random.Random(0)
        self.served = 0
        self.url = ""

    async def __aenter__(self) -> "StubServer":
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post(GENERATE, self._generate)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _generate(self, http: web.Request) -> web.Response:
        request = msgspec.json.decode(await http.read(), type=GenerateRequest)
        self.served += 1
        wanted, prompt = request.sampling_params, request.token_ids
        choices = [self._sample(i, prompt, wanted) for i in range(wanted.n)]
        logprobs: list[dict[str, TokenLogprob] | None] | None = None
        if wanted.prompt_logprobs:
            logprobs = [None, *({str(token): TokenLogprob(-1.0)} for token in prompt[1:])]
        answer = GenerateAnswer(choices, logprobs, Usage(len(prompt)))
        return web.json_response(body=msgspec.json.encode(answer))

    def _sample(self, index: int, prompt: list[int], wanted: SamplingParams) -> Generation:
        most = wanted.max_tokens or STUB_TOKENS
        longest = max(1, min(most, self.max_length - len(prompt), STUB_TOKENS))
        tokens = [
            self.random.randrange(self.vocabulary) for _ in range(self.random.randint(1, longest))
        ]
        if self.eos is not None:
            tokens[-1] = self.eos
        asked = wanted.extra_args or {}
        return Generation(
            index=index,
            token_ids=tokens,
            finish_reason="stop",
            logprobs=Logprobs([TokenLogprob(-1.0) for _ in tokens]),
            weight_versions=[VersionSpan("default", 0, len(tokens))],
            sampling_mask=[[token] for token in tokens] if WANTED in asked else None,
        )


class TrialRollouts(AccountedRollouts):
    """Checks groups as a worker and the trajectory server would, and sends nothing."""

    server_cls = VllmServer
    run_config: Config
    limits: Limits

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        binary = self.run_config.trajectories.server != "atropos"
        for group in scored_data if isinstance(scored_data, list) else [scored_data]:
            why = complete_group(group, self.run_config.rollout, binary)
            try:
                if why is None:
                    encode_group(ScoredGroup.from_python(group), self.limits)
            except RequestError as error:
                why = str(error)
            if why is None:
                self.losses.accept(1)
            else:
                self.losses.lose(Loss.REFUSED, why)


def try_out(info: bytes, expect: Expect) -> Problem | None:
    """Try an environment out, and return what is wrong, with a key of the environment's section.

    `info`: the content of a run.json whose `environment` is tried. `expect` is called with what
    happens next.
    """
    with tempfile.TemporaryDirectory(prefix="atropos-hpc-trial-") as directory:
        run = RunDir(Path(directory))
        run.create()
        write_file(run.run_json, info)
        environment, config, servers = env_loader.of_run(run, "environment", run.config().seed)
        files = files_of(environment)
        bases = (TrialRollouts, as_evaluator(environment))
        kind = type(environment.__name__, bases, {"files": files, "server_cls": VllmServer})
        try:
            return asyncio.run(_try_out(run, lambda: kind(config, servers, slurm=False), expect))
        except (Exception, SystemExit) as error:
            return Problem("target", describe_error(error, files))


async def _try_out(run: RunDir, make: Callable[[], BaseEnv], expect: Expect) -> Problem | None:
    expect("the constructor")
    config = run.config()
    max_length = config.model.max_length
    stub = StubServer(1, None, max_length)
    async with stub:
        server = ServerState(url=stub.url, version=PolicyVersion(version=0, attempt=1))
        roster = Roster(members={"agent-trial-0": AgentState(servers=[server])})
        write_struct(run.roster, roster)
        env: Any = make()
        env.run_config = config
        stub.vocabulary, stub.eos = len(env.tokenizer), env.tokenizer.eos_token_id
        env.limits = Limits(stub.vocabulary, max_length, config.algorithm.batch_size)
        env.max_token_len = max_length + 1
        expect("setup()")
        await env.setup()
        problem = None
        for _ in range(PROMPTS):
            problem = await _roll_out(env, stub, expect)
            if problem is None:
                break
        unreported = None if problem else await _unreported(env, run.config(), expect)
        await env.server.servers[0].pool.close()
    return Problem("target", problem) if problem else unreported


async def _unreported(env: Any, config: Config, expect: Expect) -> Problem | None:
    """Evaluate, and return a problem if something is reported, but not environment.metric."""
    conf, metric = config.evaluation, config.environment.metric
    if not (conf.before or conf.after or conf.every):
        return None
    expect("an evaluation")
    limit_s = min(EVALUATION_S, config.environment.trial_timeout_s / 2)
    try:
        found = (await evaluate(env, 0, limit_s)).metrics
    except Exception:  # too long, or it cannot judge random answers
        return None
    reported = sorted(name for name in found if not name.startswith(NAMED))
    if not reported or metric in found:
        return None
    return Problem("metric", f"{metric} is not what evaluate() reports: {', '.join(reported)}")


async def _roll_out(env: Any, stub: StubServer, expect: Expect) -> str | None:
    """Roll one group out, and return what is wrong."""
    expect("get_next_item()")
    item = await env.get_next_item()
    if item is None:
        return "get_next_item() returned None: the environment has no prompt"
    env.losses = Losses("the trial", None, env.files)
    env.running_items["trial"] = {"item": item, "worker": None, "start_time": time.time()}
    served = stub.served
    expect("a rollout")
    await env.handle_env("trial")
    losses = env.losses
    if losses.sent or losses.counts[Loss.EQUAL_SCORES]:
        return None
    reasons = losses.state()["reasons"]
    nothing = losses.counts[Loss.NOTHING] == losses.counts.total()
    if not reasons or (nothing and stub.served > served and "request" not in reasons[0].text):
        return None  # the environment may have judged random answers to be useless
    return str(reasons[0].text)
