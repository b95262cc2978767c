"""A verifiers environment with a tool over a real vLLM server, whose policy calls the tool.

A grammar leaves a policy of random weights nothing but calls and answers to sample. The worker runs
in the verifiers environment, in a process of its own, as in a run.
"""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_parts import leader, make_run, module

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
pytest.importorskip("vllm")

from vllm_servers import ROLLOUT, started  # noqa: E402

from atropos_hpc.contracts.group import Group  # noqa: E402
from atropos_hpc.contracts.members import AgentState  # noqa: E402
from atropos_hpc.contracts.messages import Registration  # noqa: E402
from atropos_hpc.environments.make_base import make_model  # noqa: E402
from atropos_hpc.runtime.membership import Member, RosterReader  # noqa: E402
from atropos_hpc.trajectories.client import TrajectoryClient  # noqa: E402

PACKAGES = Path(__file__).parent / "verifiers_packages"
PYTHON = Path(__file__).parents[1] / ".venv-verifiers" / "bin" / "python"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
PLAIN += ["<think>", "</think>"]  # one token each, and not special, as in Qwen3
# A policy of random weights calls the tool or answers, by chance.
REPLY = r'(<tool_call>\n\{"name": "calculator_add", "arguments": \{"a": [0-9], "b": 2\}\}\n'
REPLY += r"</tool_call>|2)"
MERGES = [("c", "a"), ("ca", "l"), ("a", "d"), ("ad", "d"), ("n", "a")]
SEQUENCES, GROUP_SIZE, LENGTH = 24, 8, 1536


def make_policy(directory: Path) -> Any:
    """Save a policy of random weights and its tokenizer of characters. Return both."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = [*characters, *(one + other for one, other in MERGES)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    bpe.decoder = decoders.Fuse()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    bpe.add_tokens([AddedToken(token) for token in PLAIN])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    config = make_model(seed=0).config
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.max_position_embeddings, config.pad_token_id = LENGTH, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


@contextlib.contextmanager
def learner_of(run: Any, version: int) -> Iterator[TrajectoryClient]:
    """A trajectory server, with this process as the learner."""
    with module(
        "atropos_hpc.trajectories.server", "--run-dir", str(run.path), log=run.path / "server.log"
    ):
        roster = RosterReader(run.roster)
        while roster.trajectory_server() is None:
            time.sleep(0.05)
        learner = TrajectoryClient(roster.trajectory_server, run.token(), 30)
        learner.register(Registration(SEQUENCES, LENGTH, starting_step=version, num_steps=9))
        yield learner


def played(root: Path, tokenizer: Any) -> list[Group]:
    """Lease a batch of the environment's groups."""
    # Else a call might be typed in characters, or end with the other token that ends a reply.
    excluded = tokenizer.convert_tokens_to_ids(["<", "<|endoftext|>"])
    sampling = {
        "structured_outputs": {"regex": REPLY},
        "allowed_token_ids": [token for token in range(len(tokenizer)) if token not in excluded],
    }
    run = make_run(
        root / "run",
        model={"path": str(root / "base"), "max_length": LENGTH, "dtype": "float32"},
        rollout=ROLLOUT,
        environment={
            "target": "vf-calculator",
            "group_size": GROUP_SIZE,
            "config": {
                "renderer": {"name": "qwen3"},
                "env": {"agent": {"max_turns": 3, "sampling": sampling}},
            },
        },
        evaluation={"before": False, "after": False},
    )
    arguments = ("--run-dir", str(run.path))
    base = root / "base"
    with contextlib.ExitStack() as stack:
        stack.enter_context(leader(run))
        served = stack.enter_context(started(run, base, base, root / "vllm.log"))
        served.wait_until_up()
        version = served.push(base)
        agent = Member(run, AgentState(servers=[served.state]), "local")
        stack.callback(agent.leave)
        learner = stack.enter_context(learner_of(run, version))
        log = run.path / "worker.log"
        stack.enter_context(
            module("atropos_hpc.rollout.env_worker", *arguments, log=log, python=PYTHON)
        )
        groups = learner.lease(version, 0, 1, oldest=version, version=version, wait_s=240)
        assert groups is not None, log.read_text()[-3000:]
        return groups


@dataclass
class Part:
    """Successive tokens of a sequence that were all sampled, or all given."""

    sampled: bool
    ids: list[int]


def parts(group: Group, row: slice) -> list[Part]:
    rows = itertools.groupby(range(row.start, row.stop), key=lambda at: bool(group.trained[at]))
    return [Part(own, group.tokens[list(at)].tolist()) for own, at in rows]


def check_log_probs(group: Group, row: slice, model: Any) -> None:
    """The log-probs are those of the ids in the group, each after all ids before it."""
    import torch

    assert group.inference_logprobs is not None and group.support is not None
    with torch.no_grad():
        logits = model(torch.tensor(group.tokens[row][None].tolist())).logits[0]
    ends = np.cumsum(group.support.counts)
    for at in range(row.start, row.stop):
        kept = group.support.ids[ends[at] - group.support.counts[at] : ends[at]].tolist()
        assert bool(kept) == group.trained[at]
        if kept:
            exact = logits[at - row.start - 1][kept].log_softmax(-1)[kept.index(group.tokens[at])]
            assert group.inference_logprobs[at] == pytest.approx(float(exact), abs=1e-3)


@pytest.mark.skipif(
    not PYTHON.exists() and not os.environ.get("CI"),
    reason="make .venv-verifiers/ready installs verifiers",
)
def test_tool_calls_on_vllm_are_trained_as_they_were_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gets the tools; each call is run, and its result is given and not trained."""
    model, tokenizer = make_policy(tmp_path / "base")
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES), prepend=os.pathsep)
    rewards, turns, other_ids = set(), set(), 0
    for group in played(tmp_path, tokenizer):
        ends = np.cumsum(group.lengths).tolist()
        for score, end, length in zip(group.scores, ends, group.lengths.tolist(), strict=True):
            row = slice(end - length, end)
            check_log_probs(group, row, model)
            prompt, *conversation = parts(group, row)
            assert '<tools>\n{"type": "function", "function": {"name": "calculator_add"' in (
                tokenizer.decode(prompt.ids)
            )
            assert [part.sampled for part in conversation] == [
                i % 2 == 0 for i in range(len(conversation))
            ]
            replies = conversation[::2]
            for reply, given in zip(replies, conversation[1::2], strict=False):
                text = tokenizer.decode(reply.ids)
                other_ids += tokenizer.encode(text, add_special_tokens=False) != reply.ids
                called = re.fullmatch(rf"{REPLY}<\|im_end\|>", text)
                assert called, text
                result = int(re.search(r'"a": (\d)', text)[1]) + 2
                assert f"<tool_response>\n{result}\n</tool_response>" in tokenizer.decode(given.ids)
            rewards.add(float(score))
            turns.add(len(replies))
    assert min(turns) == 1 < max(turns) and len(rewards) > 1, (turns, rewards)
    assert other_ids, "some calls were sampled as other ids than their text has"
