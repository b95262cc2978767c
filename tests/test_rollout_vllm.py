"""One real vLLM server: weights pushed into it, its routes, environments over it, and its end."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_parts import leader, make_run, module, publish, publish_delta

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")

import aiohttp  # noqa: E402
from run_files import evaluations  # noqa: E402
from vllm_servers import ENVIRONMENT, PROMPT, Served, serving  # noqa: E402

from atropos_hpc.contracts.members import AgentState  # noqa: E402
from atropos_hpc.contracts.messages import WANTED, Registration  # noqa: E402
from atropos_hpc.contracts.metrics import Evaluation  # noqa: E402
from atropos_hpc.policy.follower import Follower  # noqa: E402
from atropos_hpc.policy.store import PolicyStore  # noqa: E402
from atropos_hpc.policy.weight_update import PushError, push  # noqa: E402
from atropos_hpc.rollout.server_pool import GENERATE  # noqa: E402
from atropos_hpc.runtime.membership import Member, RosterReader  # noqa: E402
from atropos_hpc.runtime.process import descendants_of  # noqa: E402
from atropos_hpc.trajectories.client import TrajectoryClient  # noqa: E402

NOTHING = "environment: LookupError('this environment has no held-out problems')"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("vllm")) as server:
        yield server


def test_pushed_weights_are_served_exactly_and_with_their_version(served: Served) -> None:
    at_start = served.greedy()
    version = served.push(served.other)
    changed = served.greedy()
    assert changed[2] == f"{version}-1"
    assert changed[1] != at_start[1]
    version = served.push(served.base)
    # The same numbers, bit by bit, as with the weights loaded at the start, tied layers included.
    assert served.greedy() == (*at_start[:2], f"{version}-1")


def test_versions_that_arrive_as_deltas_are_served_exactly(served: Served, tmp_path: Path) -> None:
    """A follower applies them to its copy in memory. These deltas change every weight."""
    served.push(served.other)
    other = served.greedy()[:2]
    served.push(served.base)
    base = served.greedy()[:2]
    follower = Follower(PolicyStore(served.run.policy), tmp_path, "a test")
    weights = {
        "base": served.base / "model.safetensors",
        "other": served.other / "model.safetensors",
    }
    for old, new, expected in (
        (None, "base", base),
        ("base", "other", other),
        ("other", "base", base),
    ):
        if old is not None:
            served.version += 1
            publish_delta(served.run, weights[old], weights[new], served.version)
        newest = follower.poll()
        assert (
            newest is not None
            and newest.version == served.key
            and newest.directory.is_relative_to(tmp_path)
        ), follower.failure
        served.push_directory(newest.directory)
        assert served.greedy() == (*expected, str(served.key))
    follower.close()


@pytest.mark.parametrize("keep_kv", [True, False])
def test_running_requests_keep_their_cache_over_an_update_unless_asked(
    served: Served, keep_kv: bool
) -> None:
    found = served.update_under_load(served.base, keep_kv)
    assert found.lengths == {24}
    assert (found.preempted == 0) == keep_kv


def test_a_damaged_version_leaves_the_old_weights_in_place(served: Served) -> None:
    served.push(served.base)
    before = served.greedy()
    with pytest.raises(PushError, match=r"part-0\.safetensors of .*xxh3"):
        served.push(served.other, damage=True)
    assert served.greedy() == before


def test_an_incomplete_version_leaves_the_old_weights_in_place(served: Served) -> None:
    served.push(served.base)
    before = served.greedy()
    with pytest.raises(PushError, match="no readable manifest"):
        served.push_directory(served.run.path / "nowhere")
    directory = publish(served.run, served.other / "model.safetensors", served.version + 100)
    with pytest.raises(PushError, match="was announced"):  # another version than the directory has
        served.push_directory(directory)
    shutil.rmtree(directory)
    assert served.greedy() == before


def test_an_update_that_somebody_left_open_does_not_block_the_next(served: Served) -> None:
    assert served.ask("POST", "/start_weight_update")[0] == 200
    version = served.push(served.base)
    assert served.greedy()[2] == f"{version}-1"


def test_log_probs_are_of_the_policy_at_the_sampling_temperature(served: Served) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    served.push(served.base)
    sampling = {"temperature": 0.5, "max_tokens": 4, "logprobs": 0}
    _, answer = served.ask("POST", GENERATE, {"token_ids": PROMPT, "sampling_params": sampling})
    (choice,) = answer["choices"]
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)
    tokens = torch.tensor([PROMPT + choice["token_ids"]])
    with torch.no_grad():
        expected = (model(tokens).logits[0, len(PROMPT) - 1 : -1] / 0.5).log_softmax(-1)
    expected = expected.gather(-1, tokens[0, len(PROMPT) :, None])[:, 0].tolist()
    assert [position["logprob"] for position in choice["logprobs"]["content"]] == pytest.approx(
        expected, abs=1e-3
    )


TRUNCATIONS = (
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.1},
    {"top_p": 0.8, "top_k": 3, "min_p": 0.02},
    {"allowed_token_ids": [2, 3, 5]},
    {"structured_outputs": {"regex": "[0-9]{4}"}},
)


def kept_by(logits: Any, options: dict[str, Any]) -> list[int] | None:
    """The ids that vLLM's order of truncation leaves: min_p, top_k, top_p; None: not known here."""
    import torch

    if "structured_outputs" in options:
        return None
    if (allowed := options.get("allowed_token_ids")) is not None:
        return list(allowed)
    p = logits.softmax(-1)
    p = torch.where(p >= options.get("min_p", 0) * p.max(), p, 0)
    order = p.argsort(descending=True)[: options.get("top_k", len(p))]
    p = p[order] / p[order].sum()
    return sorted(order[(p.cumsum(0) - p < options.get("top_p", 1)) & (p > 0)].tolist())


@pytest.mark.parametrize("options", TRUNCATIONS, ids=lambda options: "+".join(options))
def test_log_probs_are_of_the_truncated_policy_and_its_support_is_reported(
    served: Served, options: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    served.push(served.base)
    sampling = {"temperature": 0.7, "max_tokens": 4, "n": 6, "logprobs": 1024, **options}
    sampling["extra_args"] = {WANTED: 0}
    status, answer = served.ask(
        "POST", GENERATE, {"token_ids": PROMPT, "sampling_params": sampling}
    )
    assert status == 200, answer
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)
    sizes = set()
    for choice in answer["choices"]:
        tokens = choice["token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1] / 0.7
        assert len(choice["sampling_mask"]) == len(tokens)
        positions = choice["logprobs"]["content"]
        for row, token, kept, position in zip(
            logits, tokens, choice["sampling_mask"], positions, strict=True
        ):
            expected = kept_by(row, options)
            assert kept == (expected or kept) and token in kept
            exact = float(row[kept].log_softmax(-1)[kept.index(token)])
            assert position["logprob"] == pytest.approx(exact, abs=1e-3)
            sizes.add(len(kept))
    assert max(sizes) < len(logits[0]), "something was truncated"


def test_requests_in_flight_outlive_a_push(served: Served) -> None:
    async def main() -> list[int]:
        body = {
            "token_ids": PROMPT,
            "sampling_params": {"temperature": 1.0, "max_tokens": 26, "min_tokens": 26, "n": 8},
        }
        headers = {"Authorization": f"Bearer {served.token}"}

        async def generate(session: aiohttp.ClientSession) -> list[int]:
            async with session.post(served.url + GENERATE, json=body, headers=headers) as answer:
                return [len(choice["token_ids"]) for choice in (await answer.json())["choices"]]

        served.version += 1
        directory = publish(served.run, served.other / "model.safetensors", served.version)
        async with aiohttp.ClientSession() as session:
            generations = [asyncio.create_task(generate(session)) for _ in range(8)]
            await asyncio.sleep(0.05)
            await push(session, served.url, served.token, directory, served.key)
            return [length for lengths in await asyncio.gather(*generations) for length in lengths]

    assert asyncio.run(main()) == [26] * 64


def test_every_route_but_health_asks_for_the_token(served: Served) -> None:
    routes = (
        "/v1/models",
        "/metrics",
        "/pause",
        "/resume",
        "/start_weight_update",
        "/collective_rpc",
        "/invocations",
        GENERATE,
        "/docs",
    )
    for route in routes:
        assert served.ask("POST", route, token="wrong")[0] == 401, route
        assert served.ask("GET", route, token="wrong")[0] == 401, route
    assert served.ask("GET", "/health", token="wrong")[0] == 200


def test_every_way_of_generating_gives_stamped_groups_on_policy(served: Served) -> None:
    """A trajectory server and a worker, with this test as the learner of two on-policy batches."""
    run = served.run
    version = served.push(served.base)
    arguments = ("--run-dir", str(run.path))
    run.evaluations.write_text('{"version": 0}\n')  # else the worker waits for an evaluation
    with contextlib.ExitStack() as stack:
        stack.enter_context(leader(run))
        agent = Member(
            run,
            AgentState(servers=[served.state]),
            "local",
        )
        stack.callback(agent.leave)
        stack.enter_context(
            module("atropos_hpc.trajectories.server", *arguments, log=run.path / "trajectories.log")
        )
        roster = RosterReader(run.roster)
        while roster.trajectory_server() is None:
            time.sleep(0.05)
        learner = TrajectoryClient(roster.trajectory_server, run.token(), 30)
        learner.register(Registration(20, 32, starting_step=version, num_steps=version + 2))
        stack.enter_context(
            module("atropos_hpc.rollout.env_worker", *arguments, log=run.path / "worker.log")
        )
        kinds = {}
        for step in (version, version + 1):
            groups = learner.lease(step, rank=0, world=1, oldest=step, version=step, wait_s=90)
            assert groups is not None, (run.path / "worker.log").read_text()[-3000:]
            for group in groups:
                assert group.policy_versions == [(step, step)] * 4
                kinds[group.generation_params["kind"]] = group
            served.push(served.base)
            agent.update(servers=[served.state])
    assert set(kinds) == {"managed", "tokens", "completion", "chat", "turns"}
    for kind in ("managed", "tokens", "turns"):
        group = kinds[kind]
        assert (group.inference_logprobs[group.trained] <= 0).all()
        # each sampled token, and no other, comes with what it was sampled from
        assert ((group.support.counts > 0) == group.trained).all()
        assert group.support.contains(group.tokens).all()
    assert kinds["completion"].support is kinds["chat"].support is None  # not truncated
    starts = group.lengths.cumsum() - group.lengths
    for start, length in zip(starts, group.lengths, strict=True):  # prompt, turn, tool, turn
        trained = "".join("x" if each else "." for each in group.trained[start : start + length])
        assert re.fullmatch(r"\.{6}x{1,4}\.{3}x{1,4}", trained)
    assert evaluations(run) == [Evaluation(0)]


@pytest.mark.parametrize(
    ("target", "report"),
    [
        ("atropos_hpc.environments.arithmetic:ArithmeticEnv", {"sequences": 40}),
        (ENVIRONMENT["target"], {"error": NOTHING, "accuracy": None}),
    ],
)
def test_an_evaluation_is_reported_with_the_versions_that_generated(
    served: Served, tmp_path: Path, target: str, report: dict[str, Any]
) -> None:
    """Before and after a run of one step; an evaluation that fails is reported too."""
    version = served.push(served.base)
    run = make_run(
        tmp_path / "run",
        model={"path": str(served.base), "max_length": 32, "dtype": "float32"},
        environment={
            "target": target,
            "config": {"eval_problems": 40} if "Arithmetic" in target else {},
        },
        trainer={"steps": version + 1},
    )
    run.secret.write_text(served.token)
    with leader(run):
        agent = Member(
            run,
            AgentState(servers=[served.state]),
            "local",
        )
        with module(
            "atropos_hpc.rollout.evaluation", "--run-dir", str(run.path), log=tmp_path / "log"
        ) as evaluator:
            while not evaluations(run):
                assert evaluator.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.05)
            served.push(served.base)
            agent.update(servers=[served.state])
            assert evaluator.wait(60) == 0
        agent.leave()
    lines = evaluations(run)
    assert [line.version for line in lines] == [version, version + 1]
    for line in lines:
        assert {name: getattr(line, name) for name in report} == report
        if "error" not in report:
            assert line.served == (line.version, line.version)
            assert 0 <= line.accuracy == line.metrics["eval/percent_correct"] <= 1


def test_nothing_is_left_of_a_server_that_is_killed(served: Served) -> None:
    """The last test of this file: it ends the server."""
    family = [served.pid]
    for pid in family:
        family += [child for child in descendants_of(pid) if child not in family]
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in family}
    assert any("Engine" in name for name in names.values())
    os.kill(served.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left := [f"{pid} {names[pid]}" for pid in family if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs: zombies that nobody has waited for yet do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
