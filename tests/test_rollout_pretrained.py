"""A pretrained model behind a real server: tokens, masks, ends and log-probs are transformers' own.

SmolLM2-135M-Instruct answers word problems in bfloat16, once in groups for training and once in a
chat, and what an environment gets is compared with transformers run by hand.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import list_servers, make_run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
pytest.importorskip("vllm")

from vllm_servers import ROLLOUT, started  # noqa: E402

from atropos_hpc.launch.base_model import made_path, pretrained  # noqa: E402
from atropos_hpc.rollout import env_loader  # noqa: E402
from atropos_hpc.rollout.evaluation import as_evaluator  # noqa: E402
from atropos_hpc.rollout.stamping import Sampled, record_generations  # noqa: E402

ENDS, TURN = "<|im_end|>", "<|im_start|>"
SYSTEM = "Answer with one short calculation. For example: 2 + 3 = 5"
TEMPERATURE, MAX_TOKENS, GROUP = 0.7, 96, 8
# Nats. A learner in bfloat16 differs from the server by 0.03 on average and by 1.06 at most, of
# 1,985 tokens; a shifted, doubled or missing token differs by nats on average.
TOLERANCE, MEAN_TOLERANCE = 1.5, 0.06


@pytest.fixture(scope="module")
def model() -> Path:
    path = made_path(pretrained())
    if not path.exists():
        reason = "SmolLM2-135M is not in the cache: `make real-model` puts it there"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def generated(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any, list[Sampled], str]]:
    """Return (question, a group, a chat's generations and its text) of a real server."""
    root = tmp_path_factory.mktemp("pretrained")
    config = {"system_prompt": SYSTEM, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
    run = make_run(
        root / "run",
        model={"path": str(model), "max_length": 256},
        rollout={**ROLLOUT, "kv_cache_bytes": 256 << 20},
        environment={
            "target": "atropos_hpc.environments.word_problems:WordProblemsEnv",
            "config": config,
            "group_size": GROUP,
        },
    )
    env_loader.patch_atropos()

    async def generate() -> tuple[str, Any, list[Sampled], str]:
        environment, env_config, servers = env_loader.of_run(run, "environment", seed=0)
        env = as_evaluator(environment)(env_config, servers, slurm=False)
        await env.setup()
        question = env.training[0]["question"]
        group, _ = await env.collect_trajectories(env.training[0])
        with record_generations() as chat:
            answer = await env.server.chat_completion(
                messages=messages(question), n=4, max_tokens=MAX_TOKENS, temperature=TEMPERATURE
            )
        await env.server.servers[0].pool.close()
        return question, group, chat, answer.choices[0].message.content

    with started(run, model, model, root / "server.log") as server:
        server.wait_until_up()
        list_servers(run, {server.url: 0})
        yield asyncio.run(generate())


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """Return the prompt's ids by transformers, and check that they are the template's text."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages(question), add_generation_prompt=True, return_dict=False
    )
    turns = [f"{TURN}{each['role']}\n{each['content']}{ENDS}\n" for each in messages(question)]
    assert tokenizer.decode(ids) == "".join(turns) + f"{TURN}assistant\n"
    return ids


def test_prompts_are_those_of_the_chat_template_with_no_token_twice(
    generated: tuple[str, Any, list[Sampled], str], tokenizer: Any
) -> None:
    question, group, chat, _ = generated
    prompt = prompt_of(tokenizer, question)
    for tokens, mask in zip(group["tokens"], group["masks"], strict=True):
        assert tokens[: len(prompt)] == prompt
        assert mask == [-100] * len(prompt) + tokens[len(prompt) :]
    assert len(chat) == 4 and all(list(each.prompt) == prompt for each in chat)


def test_answers_end_with_the_token_that_ended_them_or_at_the_limit(
    generated: tuple[str, Any, list[Sampled], str], tokenizer: Any
) -> None:
    question, group, chat, text = generated
    prompt = len(prompt_of(tokenizer, question))
    end = tokenizer.convert_tokens_to_ids(ENDS)
    answers = [tokens[prompt:] for tokens in group["tokens"]] + [list(each.tokens) for each in chat]
    ended = [answer for answer in answers if end in answer]
    assert ended, "no answer ended by itself"
    for answer in answers:
        assert len(answer) <= MAX_TOKENS
        if answer in ended:
            assert answer.index(end) == len(answer) - 1
        else:
            assert len(answer) == MAX_TOKENS
    assert text in [tokenizer.decode(each.tokens, skip_special_tokens=True) for each in chat]


def test_the_server_s_log_probs_are_those_of_transformers(
    generated: tuple[str, Any, list[Sampled], str], model: Path, tokenizer: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    question, group, _, _ = generated
    start = len(prompt_of(tokenizer, question))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    differences = []
    for tokens, log_probs in zip(group["tokens"], group["inference_logprobs"], strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([tokens])).logits[0, start - 1 : -1].float()
        exact = (logits / TEMPERATURE).log_softmax(-1)
        chosen = exact.gather(1, torch.tensor(tokens[start:])[:, None])[:, 0]
        differences.append(chosen - torch.tensor(log_probs[start:]))
        assert log_probs[:start] == [1.0] * start
    difference = torch.cat(differences).abs()
    assert len(difference) == sum(len(tokens) - start for tokens in group["tokens"])
    assert difference.max() < TOLERANCE and difference.mean() < MEAN_TOLERANCE
