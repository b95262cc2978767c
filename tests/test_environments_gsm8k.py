"""GSM8K: final numbers in the spellings that models write, and data in the shapes files have."""

import asyncio
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.environments.final_answer import (
    final_number,
    is_flexibly_right,
    is_right,
    is_strictly_right,
)

pytestmark = pytest.mark.vllm

DATA = os.environ.get("GSM8K_DATA")  # a directory with GSM8K's train.jsonl and test.jsonl
ROWS = 8_792

SPELLINGS: dict[str, list[tuple[str, str | None]]] = {
    "minus signs": [
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### - 5", "-5"),
        ("the answer is -5.", "-5"),
        ("it is 7 - 5", "5"),
    ],
    "points and exponents": [
        ("#### .5", "1/2"),
        ("#### 18.", "18"),
        ("#### 1.2e3", "1200"),
        ("#### 3 \\times 10^2", "300"),
        ("#### 3 × 10^{2}", "300"),
    ],
    "fractions": [
        ("#### 43/2", "43/2"),
        ("#### 1 1/2", "3/2"),
        ("#### 1\\frac{1}{2}", "3/2"),
        ("#### -\\dfrac{3}{4}", "-3/4"),
        ("\\boxed{\\frac12}", "1/2"),
        ("#### 5/0", None),
    ],
    "LaTeX": [
        ("#### 1{,}000", "1000"),
        ("\\boxed{\\text{it is } 7}", "7"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} and \\boxed{}", "5"),
        ("#### \\$18.00", "18"),
        ("#### \\(42\\)", "42"),
        ("#### $\\boxed{42}$", "42"),
    ],
    "markers": [
        ("#### 42 ####", "42"),
        ("#### 42\n####\n", "42"),
        ("####", None),
        ("####\n42", "42"),
        ("#### 1\n#### 2", "2"),
    ],
    "equations": [("#### 2 + 3 = 5", "5"), ("#### 10 - 4", "6"), ("#### x = 5", "5")],
    "units": [
        ("#### 5 apples", "5"),
        ("#### 50%", "50"),
        ("#### $1,234.50 dollars", "2469/2"),
        ("#### **42**", "42"),
        ("#### 1,000,000", "1000000"),
    ],
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_gsm8k_numbers_are_read_in_every_spelling(kind: str) -> None:
    for text, number in SPELLINGS[kind]:
        wanted = None if number is None else Fraction(number)
        assert final_number(text) == wanted, text
        if wanted is not None:
            assert is_right(text, f"#### {float(wanted)}"), text
            assert not is_right(text, f"#### {float(wanted) + 1}"), text


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("5 + 7 = 12\n#### 12", True, True),
        ("#### 12 apples in 3 bags", True, False),
        ("#### 1\n#### 12", True, True),
        ("#### 11\nno, it is 12", False, True),
        ("so \\boxed{12}", False, True),
        ("The answer is 12.", False, True),
        ("12 and 13", False, False),
        ("####", False, False),
        ("", False, False),
    ],
)
def test_gsm8k_strict_accuracy_wants_the_marker_and_flexible_the_last_number(
    text: str, strict: bool, flexible: bool
) -> None:
    assert is_strictly_right(text, "#### 12") is strict
    assert is_flexibly_right(text, "#### 12") is flexible


@pytest.mark.parametrize(
    ("text", "reward"), [("#### 12", 1.0), ("\\boxed{12}", 0.25), ("12", 0.25), ("#### 3", 0.0)]
)
def test_gsm8k_a_right_number_in_another_format_may_be_worth_less(text: str, reward: float) -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    env = gsm8k.GSM8KEnv.__new__(gsm8k.GSM8KEnv)
    env.config = gsm8k.GSM8KConfig(unformatted_reward=0.25)
    assert env.reward(text, "#### 12") == reward
    env.config = gsm8k.GSM8KConfig()
    assert env.reward(text, "#### 12") == bool(reward)


def test_gsm8k_other_mathematics_is_compared_within_bounds() -> None:
    pytest.importorskip("math_verify")
    assert is_right("#### \\sqrt{16}", "#### 4") and is_right("#### 2^3", "#### 8")
    assert not is_right("#### \\sqrt{16}", "#### 5")
    assert is_right(r"#### \binom{5}{2}", "#### 10")
    combinatorial = (r"\binom{99999999}{44444444}", r"\Gamma(99999999)", r"{9999999 \choose 4444}")
    powers = ("9^{9^{9^9}}", "9**9**9", "2^{99999}", "99!")
    for endless in (*(f"#### {each}" for each in (*powers, *combinatorial)), "#### " * 99):
        assert not is_right(endless, "#### 4")


REWRITES: dict[str, Callable[[str], str]] = {
    "as it is": lambda n: f"#### {n}",
    "dollars": lambda n: f"#### ${n}" if n[0] != "-" else f"#### -${n[1:]}",
    "a decimal": lambda n: f"#### {n}.00" if "." not in n else f"#### {n}0",
    "boxed": lambda n: f"so \\boxed{{{n}}}.",
    "LaTeX": lambda n: f"#### \\({n.replace(',', '{,}')}\\)",
    "units": lambda n: f"#### {n} apples",
    "an equation": lambda n: f"#### 2 + 3 = {n}",
    "a fraction": lambda n: f"#### \\frac{{{n.replace(',', '')}}}{{1}}",
    "a sentence": lambda n: f"2 and 3 make it. The answer is {n}.",
    "two markers": lambda n: f"#### {n}\n####",
}


@pytest.mark.skipif(DATA is None, reason="GSM8K_DATA names no directory with GSM8K's files")
@pytest.mark.parametrize("spelling", REWRITES)
def test_gsm8k_every_answer_of_the_data_equals_itself(spelling: str) -> None:
    assert DATA is not None
    answers = [
        json.loads(line)["answer"]
        for name in ("train.jsonl", "test.jsonl")
        for line in Path(DATA, name).read_text().split("\n")
        if line
    ]
    assert len(answers) == ROWS
    written = [answer.rpartition("####")[2].strip() for answer in answers]
    wrong = [
        number
        for number, answer in zip(written, answers, strict=True)
        if not is_right(REWRITES[spelling](number), answer)
    ]
    assert wrong == []


# --- its prompt


class RolesAsTemplate:
    """A tokenizer whose chat template is `role: text` line by line, or none."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        return "\n".join(f"{each['role']}: {each['content']}" for each in messages)


def set_up(tmp_path: Path, chat_template: str | None, examples: int) -> Any:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    rows = [{"question": f"{n}+1?", "answer": f"<<{n}+1>>it is\n#### {n + 1}"} for n in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = gsm8k.GSM8KEnv.__new__(gsm8k.GSM8KEnv)
    env.config = gsm8k.GSM8KConfig(
        train_path=str(path), test_path=str(path), system_prompt="Add.", examples=examples
    )
    env.tokenizer = RolesAsTemplate(chat_template)
    asyncio.run(env.setup())
    return env


def test_gsm8k_examples_are_earlier_turns_and_not_trained_on(tmp_path: Path) -> None:
    env = set_up(tmp_path, "a template", 2)
    assert env.prompt("5+1?").split("\n") == [
        "system: Add.",
        *("user: 0+1?", "assistant: it is", "#### 1"),
        *("user: 1+1?", "assistant: it is", "#### 2"),
        "user: 5+1?",
    ]
    assert [each["question"] for each in env.training] == ["2+1?", "3+1?"]
    plain = "Add.\n\nQuestion: 0+1?\nAnswer: it is\n#### 1\n\nQuestion: 5+1?\nAnswer:"
    assert set_up(tmp_path, None, 1).prompt("5+1?") == plain
    assert set_up(tmp_path, None, 0).prompt("5+1?") == "Add.\n\nQuestion: 5+1?\nAnswer:"
    with pytest.raises(ValueError, match="examples=4, but there are 4 training problems"):
        set_up(tmp_path, None, 4)


# --- its data


def loaded(tmp_path: Path, data: bytes) -> list[dict[str, str]]:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    training: list[dict[str, str]] = gsm8k.load_problems(
        gsm8k.GSM8KConfig(train_path=str(path), test_path=str(path))
    )[0]
    return training


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("inside", ["", "\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_gsm8k_json_lines_end_at_newlines_only(
    tmp_path: Path, end: str, mark: str, inside: str
) -> None:
    row = json.dumps({"question": f"1{inside and 'a' + inside}+1?", "answer": "#### 2"})
    text = row.replace("\\u2028", "\u2028").replace("\\u2029", "\u2029").replace("\\u0085", "\x85")
    training = loaded(tmp_path, f"{mark}{text}{end}{text}{end}".encode())
    assert len(training) == 2 and inside in training[1]["question"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b"[1, 2]", "line 2: must be an object"),
        (b"3", "line 2: must be an object"),
        (b'{"question": "x"}', "line 2: answer must be a text, not None"),
        (b'{"question": 5, "answer": "#### 2"}', "line 2: question must be a text, not 5"),
        (b'{"question": "x", "answer": "two"}', "line 2: a GSM8K answer must end in"),
        (b'{"question": "x"', "line 2 is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_gsm8k_rows_of_another_shape_are_refused_by_file_and_line(
    tmp_path: Path, row: bytes, says: str
) -> None:
    with pytest.raises(ValueError, match=r"train\.jsonl") as refused:
        loaded(tmp_path, b'{"question": "1+1?", "answer": "#### 2"}\n' + row + b"\n")
    assert says in str(refused.value)


def test_gsm8k_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    with pytest.raises(ValueError, match="cannot read .*/nowhere.jsonl"):
        missing = str(tmp_path / "nowhere.jsonl")
        gsm8k.load_problems(gsm8k.GSM8KConfig(train_path=missing, test_path=missing))
    with pytest.raises(ValueError, match="there are no problems"):
        loaded(tmp_path, b"\n")


@pytest.mark.parametrize("dataset", ["openai/gsm8k", None])
@pytest.mark.parametrize("name", ["train_path", "test_path"])
def test_gsm8k_files_win_over_a_dataset_and_one_of_two_is_refused(
    name: str, dataset: str | None
) -> None:
    gsm8k = pytest.importorskip("atropos_hpc.environments.gsm8k")
    with pytest.raises(ValueError, match="give train_path and test_path, or neither"):
        gsm8k.GSM8KConfig(**{"dataset": dataset, name: "x.jsonl"})
    files = {"train_path": "x.jsonl", "test_path": "y.jsonl"}
    assert gsm8k.GSM8KConfig(dataset="openai/gsm8k", **files).dataset is None
