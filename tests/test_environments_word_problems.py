"""Generated word problems: right answers, and a held-out part that training never sees."""

import re

import pytest

from atropos_hpc.environments.word_problems import (
    ONE_STEP,
    TWO_STEPS,
    Numbers,
    WordProblemsConfig,
    WordProblemsEnv,
    generate,
)

pytestmark = pytest.mark.vllm


def test_the_same_seed_gives_the_same_problems_and_none_is_in_both_parts() -> None:
    training, held_out = generate(3, 2, 10, 2000, 500)
    assert (training, held_out) == generate(3, 2, 10, 2000, 500)
    questions = [problem["question"] for problem in training + held_out]
    assert len(set(questions)) == 2500
    other_training, _ = generate(4, 2, 10, 2000, 500)  # the text decides the part, not the seed
    assert not {p["question"] for p in other_training} & {p["question"] for p in held_out}


def test_the_config_of_the_class_has_the_options_of_word_problems() -> None:
    config, _ = WordProblemsEnv.config_init()
    assert isinstance(config, WordProblemsConfig) and config.largest == 10


@pytest.mark.parametrize("template", range(len(ONE_STEP + TWO_STEPS)))
def test_answers_are_positive_and_use_the_numbers_of_the_question(template: int) -> None:
    text, answer = (ONE_STEP + TWO_STEPS)[template]
    used = set(re.findall(r"{([abcs])}", text))
    numbers = Numbers(a=7, b=5, c=3, s=11)
    assert answer(numbers) > 0
    for name in Numbers._fields:  # a number changes the answer if and only if it is in the text
        changed = numbers._replace(**{name: getattr(numbers, name) + 1})
        assert (answer(changed) != answer(numbers)) == (name in used), name
