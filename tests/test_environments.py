"""The included environments: tasks, rewards and data; the arithmetic one's base policy."""

import json
import random
import re
from pathlib import Path

import pytest

from atropos_hpc.environments.addition import (
    VOCABULARY,
    Problem,
    accepted,
    encode,
    problems,
    teacher,
)

pytestmark = pytest.mark.vllm


def test_a_tenth_of_the_problems_is_held_out() -> None:
    training, held_out = problems(held_out=False), problems(held_out=True)
    assert len({*training, *held_out}) == len(training) + len(held_out) == 10_000
    assert 900 < len(held_out) < 1100
    assert [p for p in held_out[:3]] == [p for p in problems(held_out=True)[:3]]


def test_answers_are_written_least_significant_digit_first() -> None:
    assert Problem(47, 38).prompt == "47+38="
    assert Problem(47, 38).answer == "580\n"
    assert Problem(99, 99).answer == "891\n"
    assert Problem(3, 4).prompt == "03+04=" and Problem(3, 4).answer == "700\n"
    assert [VOCABULARY[token] for token in encode("1+2=\n")] == ["1", "+", "2", "=", "\n"]


def test_a_tolerance_accepts_the_answers_that_are_near_enough() -> None:
    assert accepted(Problem(47, 38), 0) == [Problem(47, 38).answer]
    assert accepted(Problem(47, 38), 2) == ["380\n", "480\n", "580\n", "680\n", "780\n"]
    assert accepted(Problem(0, 1), 2) == ["000\n", "100\n", "200\n", "300\n"]


def test_the_teacher_is_right_less_often_than_not() -> None:
    rng = random.Random(0)
    asked = rng.choices(problems(held_out=False), k=20_000)
    right = sum(teacher(problem, rng) == problem.answer for problem in asked) / len(asked)
    assert right == pytest.approx(0.2 + 0.55 * 0.4, abs=0.02)
    without_carry = {teacher(Problem(47, 38), rng, right=0.0, no_carry=1.0) for _ in range(50)}
    assert without_carry == {"570\n"}
    assert all(re.fullmatch(r"\d{3}\n", teacher(Problem(0, 1), rng)) for _ in range(200))


def test_the_same_seed_makes_the_same_base_whose_tokenizer_loads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atropos_hpc.environments.make_base import accuracy, make_base

    threads = torch.get_num_threads()
    try:
        made = [
            make_base(tmp_path / name, seed=seed, steps=3)
            for name, seed in (("a", 5), ("b", 5), ("c", 6))
        ]
        a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
        assert a == b != c
        with pytest.raises(FileExistsError):
            make_base(tmp_path / "a", seed=5, steps=3)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "a",
            "b",
            "c",
        ]  # nothing temporary is left

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert accuracy(model, problems(held_out=True)) == pytest.approx(made[0])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = Problem(47, 38).prompt + Problem(47, 38).answer
    assert tokenizer.encode(text) == encode(text)
    assert tokenizer.decode(encode(text)) == text
    assert tokenizer.decode(encode(text), skip_special_tokens=True) == text.strip()
    assert (
        tokenizer.eos_token_id
        == encode("\n")[0]
        == json.loads((tmp_path / "a" / "config.json").read_text())["eos_token_id"]
    )


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 boxes of 4 are 12.\n#### 12", "#### 12", True),
        ("#### 1,000", "#### 1000", True),
        ("#### $18", "#### 18", True),
        ("#### 21.50", "#### 21.5", True),
        ("#### 43/2", "#### 21.5", True),
        ("so it is \\boxed{42}", "#### 42", True),
        ("The answer is 7 apples", "2*3=<<2*3=6>>6 and one\n#### 7", True),
        ("#### -5", "#### 5", False),
        ("12 and 13", "#### 12", False),
        ("#### 5/0", "#### 5", False),
        ("I do not know", "#### 3", False),
        ("#### 9999999999999999999999999999999999", "#### 3", False),
    ],
)
def test_gsm8k_compares_final_numbers_by_value(text: str, answer: str, right: bool) -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    assert gsm8k.is_right(text, answer) is right


def test_the_gsm8k_sample_is_right_about_its_sums() -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    training, held_out = gsm8k.load_problems(gsm8k.GSM8KConfig())
    assert (len(training), len(held_out)) == (24, 8)
    assert len({problem["question"] for problem in training + held_out}) == 32
    for problem in training + held_out:
        steps = re.findall(r"<<([-+*/().\d]+)=([\d.]+)>>", problem["answer"])
        assert steps
        for sum_, result in steps:
            assert eval(sum_) == pytest.approx(float(result)), sum_
        assert float(gsm8k.final_number(problem["answer"])) == float(steps[-1][1])
        assert gsm8k.is_right(problem["answer"], problem["answer"])


def test_gsm8k_data_may_be_files_and_must_have_final_numbers(tmp_path: Path) -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n\n')
    training, held_out = gsm8k.load_problems(
        gsm8k.GSM8KConfig(train_path=str(path), test_path=str(path))
    )
    assert len(training) == len(held_out) == 1
    path.write_text('{"question": "1+1?", "answer": "two"}\n')
    with pytest.raises(ValueError, match="two"):
        gsm8k.load_problems(gsm8k.GSM8KConfig(train_path=str(path), test_path=str(path)))
