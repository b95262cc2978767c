"""Any environment package of the `verifiers` library (0.4) as an Atropos environment.

`of_package("gsm8k-v1")` is the class for the taskset of that name. The library plays an episode of
a task: its harness holds the conversation, with tools, and its rewards score the trace. Model calls
go through the library's own training client, which renders the conversation to token ids, extends
earlier turns by their sampled ids, and asks a vLLM token endpoint. That endpoint is `Endpoint`, in
this process, which forwards to the run's servers through Atropos' server interface.
"""

import asyncio
import logging
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import msgspec
import verifiers.v1 as vf
from aiohttp import web
from atroposlib.envs.base import APIServerConfig, ScoredDataGroup
from pydantic import Field, field_validator

from atropos_hpc.contracts.group import NOT_TRAINED
from atropos_hpc.contracts.messages import (
    GenerateAnswer,
    Generation,
    Logprobs,
    SamplingParams,
    TokenLogprob,
)
from atropos_hpc.contracts.scored_group import JsonObject
from atropos_hpc.environments.single_turn import RULE, SingleTurnConfig, SingleTurnEnv, Verdict
from atropos_hpc.rollout import verifiers_chat
from atropos_hpc.rollout.server_pool import GENERATE
from atropos_hpc.rollout.stamping import Sampled, record, record_generations

KEY_VARIABLE = "ATROPOS_HPC_VERIFIERS_KEY"
SESSION = "X-Session-ID"  # the trace's id, which the training client sends with every turn


class VerifiersConfig(SingleTurnConfig):
    """The environment's own config."""

    package: ClassVar[str] = ""  # id of the taskset
    env: JsonObject = Field(
        default_factory=dict,
        description="The library's [env] block: {taskset: {...}, agent: {...}} and so on. The "
        "target sets taskset.id.",
    )
    eval_taskset: JsonObject | None = Field(
        default=None,
        description="Fields of the taskset that differ in evaluation, such as {split: test}. "
        "None: the last eval_tasks tasks are held out.",
    )
    eval_tasks: int = Field(default=64, ge=1, description="Tasks that an evaluation plays.")
    right_from: float = Field(
        default=1.0, description="Reward from which an episode of an evaluation counts as right."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest reply, tokens. None: what the context leaves."
    )
    renderer: JsonObject | None = Field(
        default=None,
        description="Config of the library's renderer, such as {name: default, tool_parser: "
        "qwen3}. None: by the model's name, else its chat template, without tools.",
    )

    @field_validator("env")
    @classmethod
    def _is_known(cls, env: JsonObject) -> JsonObject:
        """Have the library check the block. Raises ValueError."""
        if cls.package:
            vf.resolve_env_config(env_block(cls.package, env, 1))
        return env


def env_block(package: str, env: JsonObject, max_length: int) -> JsonObject:
    """Return the library's [env] block, with this package's defaults for every agent."""
    block = dict(env)
    block["taskset"] = {**(block.get("taskset") or {}), "id": package}
    kind = vf.env_config_type(package, block.get("id") or "")
    for name, field in kind.model_fields.items():
        if isinstance(field.default, vf.AgentConfig):
            own = {
                "runtime": {"type": "subprocess"},
                "max_total_tokens": max_length,
                **(block.get(name) or {}),
            }
            if field.default.harness is None:
                own.setdefault("harness", {"id": verifiers_chat.ID})
            block[name] = own
    return block


class GenerateBody(msgspec.Struct):
    """What the training client asks of a vLLM token endpoint."""

    token_ids: list[int]
    sampling_params: SamplingParams


class Endpoint:
    """The token endpoint that the library's training client talks to, on the loopback interface.

    `sampled` has the generations of each trace, for the stamps of its group.
    """

    def __init__(self, server: Any, model: str, max_length: int) -> None:
        self.sampled: defaultdict[str, list[Sampled]] = defaultdict(list)
        self._server, self._model, self._max_length = server, model, max_length
        self._key = secrets.token_urlsafe(32)
        self._url = ""

    async def start(self) -> None:
        """Listen on a free port."""
        os.environ[KEY_VARIABLE] = self._key
        app = web.Application(client_max_size=1 << 30)
        for split in ("train", "eval"):
            app.router.add_post(f"/{split}{GENERATE}", self._generate)
            app.router.add_get(f"/{split}/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    def client(self, split: str, renderer: JsonObject | None) -> vf.TrainClientConfig:
        """Return the config of the training client for the split "train" or "eval"."""
        return vf.TrainClientConfig.model_validate(
            {
                "base_url": f"{self._url}/{split}/v1",
                "api_key_var": KEY_VARIABLE,
                "renderer": renderer,
                "renderer_model_name": self._model,
            }
        )

    def _check(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if not secrets.compare_digest(given, f"Bearer {self._key}"):
            raise web.HTTPUnauthorized

    async def _models(self, request: web.Request) -> web.Response:
        self._check(request)
        card = {"id": self._model, "max_model_len": self._max_length - 1}
        return web.json_response({"data": [card]})

    async def _generate(self, request: web.Request) -> web.Response:
        self._check(request)
        body = msgspec.json.decode(await request.read(), type=GenerateBody)
        sampling = {
            name: value
            for name, value in msgspec.structs.asdict(body.sampling_params).items()
            if value is not None and name not in ("n", "logprobs")
        }
        split = request.path.split("/")[1]
        with record_generations(for_training=split == "train") as sampled:
            try:
                _, tokens, log_probs, reasons = await self._server.tokens_and_logprobs_completion(
                    input_ids=body.token_ids, prompt=None, n=1, split=split, **sampling
                )
            except Exception as error:  # whatever the servers raise fails the episode
                detail = {"error": {"message": f"{type(error).__name__}: {error}"}}
                return web.json_response(detail, status=500)
        self.sampled[request.headers.get(SESSION, "")] += sampled
        content = [
            TokenLogprob(log_prob, token=f"token_id:{token}")
            for token, log_prob in zip(tokens[0], log_probs[0], strict=True)
        ]
        choice = Generation(list(tokens[0]), reasons[0], logprobs=Logprobs(content))
        answer = msgspec.json.encode(GenerateAnswer([choice]))
        return web.Response(body=answer, content_type="application/json")


class VerifiersEnv(SingleTurnEnv):
    """One task, `group_size` episodes; a sequence per branch of a trainable trace."""

    name = "verifiers"
    env_config_cls = VerifiersConfig
    package = ""  # id of the taskset

    @classmethod
    def config_init(cls) -> tuple[VerifiersConfig, list[APIServerConfig]]:
        return cls.env_config_cls(group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        """Load the package, split its tasks, and bring up the shared tool servers."""
        await super().setup()
        for chatty in ("verifiers", "httpx", "aiohttp.access"):  # several lines per rollout
            logging.getLogger(chatty).setLevel(logging.WARNING)
        block = env_block(self.package, self.config.env, self.config.max_token_length)
        self.environment = vf.load_environment(vf.resolve_env_config(block))
        self.tasks, self.held_out = self._split(block)
        self.training = [{"task": i, "key": task.key} for i, task in enumerate(self.tasks)]
        self.endpoint = Endpoint(
            self.server, self.config.tokenizer_name, self.config.max_token_length
        )
        await self.endpoint.start()
        # Left open: the servers end with this process, and Atropos has no call for the end.
        self._serving = AsyncExitStack()
        await self._serving.enter_async_context(self.environment.serving())

    def _context(self, split: str, temperature: float) -> vf.ModelContext:
        """Return what the library needs to call the policy."""
        return vf.ModelContext(
            self.config.tokenizer_name,
            self.endpoint.client(split, self.config.renderer),
            vf.Sampling(temperature=temperature, max_tokens=self.config.max_tokens),
        )

    def _split(self, block: JsonObject) -> tuple[list[Any], list[Any]]:
        """Return the tasks for training and for evaluation. Raises ValueError."""
        if not self.environment.taskset.bounded:
            raise ValueError(
                f"the taskset {self.package} never ends: bound it with a field of its own in "
                "config.env.taskset"
            )
        tasks, count = list(self.environment.taskset), self.config.eval_tasks
        if self.config.eval_taskset is None:
            held_out = min(count, len(tasks) // 5)
            split = len(tasks) - held_out
            training, evaluation = tasks[:split], tasks[split:]
        else:
            changed = {**block, "taskset": {**block["taskset"], **self.config.eval_taskset}}
            other = vf.load_environment(vf.resolve_env_config(changed))
            training, evaluation = tasks, list(other.taskset.take(count))
        if not training:
            raise ValueError(f"the taskset {self.package} has no tasks to train on")
        return training, evaluation

    async def collect_trajectories(
        self, item: JsonObject
    ) -> tuple[ScoredDataGroup, list[JsonObject]]:
        """Play the episodes of a task at once. Raises RuntimeError if one of them fails."""
        task, context = self.tasks[item["task"]], self._context("train", self.config.temperature)
        episodes = await asyncio.gather(
            *(self.environment.run_episode(task, context) for _ in range(self.config.group_size))
        )
        traces = [trace for episode in episodes for trace in episode.traces]
        for trace in traces:
            record(self.endpoint.sampled.pop(trace.id, []))
        for episode in episodes:
            if not episode.ok:
                raise RuntimeError(_failure(self.package, episode))
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[])
        for trace in traces:
            self.rewards.append(trace.reward)
            for branch in trace.branches if trace.agent.trainable else ():
                if branch.trainable and any(branch.sampled_mask):
                    _append(group, branch, trace.reward)
        if len(group["tokens"]) != self.config.group_size:  # branches, or several agents
            group["group_overrides"] = {"group_size": len(group["tokens"])}
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Play an episode of each held-out task, or several where pass@k is asked for."""
        if not self.held_out:
            return
        start, rewards = time.time(), list[float]()

        async def play(task: Any, temperature: float) -> Verdict:
            rewards.append(await self._played(task, temperature))
            return {RULE: rewards[-1] >= self.config.right_from}

        await self.report_accuracy(self.held_out, play)
        metrics = {"eval/reward": sum(rewards) / len(rewards)}
        self.eval_metrics += metrics.items()
        await self.evaluate_log(metrics, start_time=start, end_time=time.time())

    async def _played(self, task: Any, temperature: float) -> float:
        """Play one episode for evaluation, and return the mean reward of its traces."""
        context = self._context("eval", temperature)
        episode = await self.environment.run_episode(task, context)
        for trace in episode.traces:
            record(self.endpoint.sampled.pop(trace.id, []))
        if not episode.ok:
            raise RuntimeError(_failure(self.package, episode))
        return sum(trace.reward for trace in episode.traces) / len(episode.traces)


def _append(group: ScoredDataGroup, branch: Any, reward: float) -> None:
    """Add a branch as a sequence, cut behind its last sampled token."""
    mask = branch.sampled_mask
    end = len(mask) - mask[::-1].index(True)
    tokens, log_probs = branch.token_ids[:end], branch.logprobs[:end]
    pairs = list(zip(tokens, mask, log_probs, strict=False))
    group["tokens"].append(tokens)
    group["masks"].append([token if is_sampled else NOT_TRAINED for token, is_sampled, _ in pairs])
    group["inference_logprobs"].append([p if is_sampled else 1.0 for _, is_sampled, p in pairs])
    group["scores"].append(reward)


def _failure(package: str, episode: Any) -> str:
    errors: Sequence[Any] = [
        *episode.errors,
        *(error for trace in episode.traces for error in trace.errors),
    ]
    if not errors:
        return f"an episode of {package} failed without an error"
    last = errors[-1]
    where = (last.traceback or "").strip().splitlines()[-2:-1]
    return f"an episode of {package} failed: {last.type}: {last.message}" + "".join(
        f" ({line.strip()})" for line in where
    )


def of_package(package: str) -> type[VerifiersEnv]:
    """Make the class for a taskset package. Raises what importing it raises."""
    vf.import_taskset(package)
    name = "".join(part.capitalize() for part in package.replace("-", "_").split("_"))
    config = type(f"{name}Config", (VerifiersConfig,), {"package": package})
    own = {"package": package, "name": package, "env_config_cls": config}
    return type(f"{name}Env", (VerifiersEnv,), own)
