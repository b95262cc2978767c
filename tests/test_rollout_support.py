"""The support of sampled tokens, from a call's options to the group that is sent."""

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("atroposlib")

from atropos_hpc.config import RolloutConf  # noqa: E402
from atropos_hpc.contracts.group import encode_group, read_group  # noqa: E402
from atropos_hpc.contracts.messages import GenerateRequest, Generation, SamplingParams, VersionSpan  # noqa: E402
from atropos_hpc.contracts.scored_group import RequestError, ScoredGroup  # noqa: E402
from atropos_hpc.contracts.support import Support  # noqa: E402
from atropos_hpc.rollout.partial_answer import Sample  # noqa: E402
from atropos_hpc.rollout.sampling_support import add_support, sampled, with_support  # noqa: E402
from atropos_hpc.rollout.stamping import Sampled, stamp  # noqa: E402

PROMPT, ANSWER = [1, 2], [50, 60, 3]
KEPT = [[50, 51], [60], [3, 9, 10]]
TOP_P = SamplingParams(top_p=0.8)


def seen(
    sampling: SamplingParams = TOP_P, mask: list[list[int]] | None = KEPT, **changes: Any
) -> list[Sampled]:
    """What is recorded of one generation."""
    fields = {"token_ids": ANSWER, "prompt": PROMPT, **changes}
    made = Generation(
        fields["token_ids"], weight_versions=[VersionSpan("1-1", 0, 3)], sampling_mask=mask
    )
    return list(sampled([made], fields["prompt"], sampling))


def group_of(*sequences: tuple[list[int], list[int]]) -> dict[str, Any]:
    """Sequences of (prompt, trained tokens)."""
    return {
        "tokens": [prompt + answer for prompt, answer in sequences],
        "masks": [[-100] * len(prompt) + answer for prompt, answer in sequences],
        "scores": [0.0] * len(sequences),
    }


def through(
    group: dict[str, Any], generations: list[Sampled], allow: bool = False, binary: bool = True
) -> Any:
    """Stamp, add the support, encode, and read as the learner does."""
    stamp(group, generations)
    add_support(group, generations, RolloutConf(allow_biased_sampling=allow), binary)
    record = encode_group(ScoredGroup.from_python(group))
    return read_group(bytearray(record.to_bytes()))


def supports(group: Any) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(group.support.ids, np.cumsum(group.support.counts))]


def test_the_learner_gets_the_support_of_each_sampled_token() -> None:
    second = seen(mask=[[7, 50], [60, 8], [3]])
    got = through(group_of((PROMPT, ANSWER), ([4, *PROMPT], ANSWER)), seen() + second)
    assert got.support.counts.tolist() == [0, 0, 2, 1, 3, 0, 0, 0, 2, 1, 3]
    assert got.support.ids.tolist() == [50, 51, 60, 3, 9, 10] * 2
    again = Support.decode(got.support.encode(), len(got.tokens))
    assert again.ids.tolist() == got.support.ids.tolist()


def test_equal_answers_of_two_turns_get_the_support_of_their_own_turn() -> None:
    """The other samples of the first turn do not take the place of the second turn's answer."""
    first = [seen(mask=[[50, 51], [60], [3]])[0] for _ in range(3)]
    later = seen(mask=[[50, 77], [60], [3]], prompt=[*PROMPT, *ANSWER, 8])
    group = {
        "tokens": [[*PROMPT, *ANSWER, 8, *ANSWER]],
        "masks": [[-100] * 2 + ANSWER + [-100] + ANSWER],
        "scores": [0.0],
    }
    got = through(group, first + later)
    assert got.support.ids.tolist() == [50, 51, 60, 3, 50, 77, 60, 3]


def test_endings_that_a_template_adds_or_an_environment_removes_are_allowed() -> None:
    got = through(group_of((PROMPT, [*ANSWER, 4, 5])), seen())
    assert got.support.counts.tolist() == [0, 0, 2, 1, 3, 0, 0]
    got = through(group_of((PROMPT, ANSWER[:-1])), seen())
    assert got.support.counts.tolist() == [0, 0, 2, 1]


def test_generations_that_are_not_trained_do_not_matter() -> None:
    judge = seen(SamplingParams(temperature=0.0), None, token_ids=[90, 91])
    got = through(group_of((PROMPT, ANSWER)), seen() + judge)
    assert got.support.counts.tolist() == [0, 0, 2, 1, 3]
    assert got.generation_params["temperature"] == 1.0


REFUSED = {
    "presence_penalty": (SamplingParams(presence_penalty=0.1), None),
    "frequency_penalty": (SamplingParams(frequency_penalty=0.1), None),
    "repetition_penalty": (SamplingParams(repetition_penalty=1.1, top_p=0.5), KEPT),
    "logit_bias": (SamplingParams(logit_bias={"5": 1.0}), None),
    "temperature=0": (SamplingParams(temperature=0.0), None),
    "min_tokens": (SamplingParams(min_tokens=3), None),
    r"top_p \(the server did not report": (TOP_P, None),
    r"top_p, min_p \(left more than rollout.max_support=2 ids": (
        SamplingParams(top_p=0.8, min_p=0.1, logprobs=2),
        [[50], [60], []],
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_distribution_that_cannot_be_replayed_is_refused_by_name(message: str) -> None:
    sampling, mask = REFUSED[message]
    with pytest.raises(RequestError, match=f"{message}.*rollout.allow_biased_sampling=true"):
        through(group_of((PROMPT, ANSWER)), seen(sampling, mask))
    allowed = through(group_of((PROMPT, ANSWER)), seen(sampling, mask), allow=True)
    assert allowed.support is None and allowed.generation_params["biased_sampling"]


def test_answers_that_were_tokenized_again_and_servers_that_take_no_support_are_refused() -> None:
    with pytest.raises(RequestError, match="tokenized the answer again"):
        through(group_of((PROMPT, [50, 61, 3])), seen())
    with pytest.raises(RequestError, match="trajectories.server=atropos"):
        through(group_of((PROMPT, ANSWER)), seen(), binary=False)


def at_temperature(value: float, prompt: list[int], answer: list[int]) -> list[Sampled]:
    return seen(SamplingParams(temperature=value), None, prompt=prompt, token_ids=answer)


def test_a_sequence_whose_turns_were_sampled_at_several_temperatures_is_refused() -> None:
    group = {
        "tokens": [[*PROMPT, 50, 60, 8, 70, 3]],
        "masks": [[-100, -100, 50, 60, -100, 70, 3]],
        "scores": [0.0],
    }
    first, prompt = at_temperature(1.0, PROMPT, [50, 60]), [*PROMPT, 50, 60, 8]
    with pytest.raises(RequestError, match=r"temperature: 0.7 and 1.0 in one sequence"):
        through(dict(group), first + at_temperature(0.7, prompt, [70, 3]))
    helper = at_temperature(0.7, [4], [90, 91])  # is in no sequence
    got = through(dict(group), first + at_temperature(1.0, prompt, [70, 3]) + helper)
    assert got.support is None and got.generation_params["temperature"] == 1.0


def test_the_learner_gets_the_temperature_that_vllm_makes_of_a_very_low_one() -> None:
    got = through(group_of((PROMPT, ANSWER)), seen(SamplingParams(temperature=0.001), None))
    assert got.generation_params["temperature"] == 0.01


def test_sampling_from_the_whole_vocabulary_costs_nothing() -> None:
    plain = SamplingParams(temperature=0.7, top_p=1.0, top_k=-1, min_p=0.0, presence_penalty=0.0)
    assert with_support(plain, 64) is plain
    got = through(group_of((PROMPT, ANSWER)), seen(plain, None))
    assert got.support is None


def test_the_server_is_asked_for_the_support_and_for_the_log_probs_that_the_caller_wants() -> None:
    asked = with_support(SamplingParams(top_k=20, logprobs=2), 1024)
    assert (asked.logprobs, asked.extra_args) == (56, {"support_top_logprobs": 2})
    assert with_support(TOP_P, 1024).logprobs == 1024


def test_an_answer_that_continues_on_another_server_keeps_its_support() -> None:
    sample = Sample(GenerateRequest(PROMPT, TOP_P, "tokens"), 0)
    sample.add(Generation(ANSWER[:1], sampling_mask=KEPT[:1]))
    sample.interrupt()
    assert sample.rest().sampling_params.top_p == 0.8
    sample.add(Generation(ANSWER[1:], finish_reason="stop", sampling_mask=KEPT[1:]))
    assert sample.result().sampling_mask == KEPT
