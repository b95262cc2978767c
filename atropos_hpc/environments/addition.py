"""Addition of two-digit numbers: a policy of 0.1M parameters improves at it in minutes on a CPU.

    47+38=580

The answer has three digits, least significant first, and a newline, so a carry depends only on the
digit just written. There are 10,000 problems; a fixed tenth is held out. Tokens are characters.
`teacher` gives answers that are often wrong: a policy fitted to them is right some of the time,
which is what reinforcement learning starts from.

The environment (`arithmetic`, rollout role) and `make_base` (trainer role) share this module, so it
imports the packages of neither.
"""

import random
import zlib
from typing import NamedTuple

PAD, EOS = "<pad>", "\n"
VOCABULARY = [PAD, EOS, "+", "=", *"0123456789"]  # a token's id is its index
PROMPT_TOKENS, ANSWER_TOKENS = 6, 4


class Problem(NamedTuple):
    """Two summands, each 0 to 99."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a:02d}+{self.b:02d}="

    @property
    def answer(self) -> str:
        return format_answer(self.a + self.b)

    @property
    def held_out(self) -> bool:
        """Return whether this problem is for evaluation only. It depends on the problem alone."""
        return zlib.crc32(self.prompt.encode()) % 10 == 0


def problems(held_out: bool) -> list[Problem]:
    """Return all problems of one part, in a fixed order."""
    everything = (Problem(a, b) for a in range(100) for b in range(100))
    return [problem for problem in everything if problem.held_out == held_out]


def format_answer(number: int) -> str:
    """Write 0 to 999 as an answer: 85 is "580" and a newline."""
    return f"{number:03d}"[::-1] + EOS


def accepted(problem: Problem, tolerance: int) -> list[str]:
    """Return the answers that are at most `tolerance` (0 to 99) off the sum."""
    total = problem.a + problem.b
    return [
        format_answer(number) for number in range(max(0, total - tolerance), total + tolerance + 1)
    ]


def teacher(
    problem: Problem, rng: random.Random, right: float = 0.2, no_carry: float = 0.40
) -> str:
    """Return an answer: right with probability `right`, without the carry with `no_carry`.

    Otherwise it is off by 1 to 3. Without a carry to forget, the answer is right; over all problems
    about right + 0.55 * no_carry of the answers are.
    """
    total = problem.a + problem.b
    draw = rng.random()
    if draw < right:
        return format_answer(total)
    if draw < right + no_carry:
        return format_answer(total - 10 * (problem.a % 10 + problem.b % 10 >= 10))
    return format_answer(abs(total + rng.choice((-3, -2, -1, 1, 2, 3))))


def encode(text: str) -> list[int]:
    """Return the token ids of a text. Raises ValueError for a character without a token."""
    return [VOCABULARY.index(character) for character in text]
