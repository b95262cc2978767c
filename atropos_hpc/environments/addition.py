"""Adding two numbers of two digits: a task that a policy of 0.1M parameters improves at within minutes on a CPU.

    47+38=580

The answer is written least significant digit first, three digits and a newline, so that a carry depends only on what was just
written. There are 10,000 problems; a fixed tenth is held out. The tokens are the characters. `teacher` gives answers that are often
wrong: a policy fitted to them knows the right answer some of the time, which is what reinforcement learning starts from.

Shared by the environment (`arithmetic`, rollout role) and by the maker of the base policy (`make_base`, trainer role), so it imports
the packages of neither.
"""

import random
import zlib
from typing import NamedTuple

PAD, EOS = "<pad>", "\n"
VOCABULARY = [PAD, EOS, "+", "=", *"0123456789"]  # a token's id is its place
PROMPT_TOKENS, ANSWER_TOKENS = 6, 4


class Problem(NamedTuple):
    """Two summands, each 0..99."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a:02d}+{self.b:02d}="

    @property
    def answer(self) -> str:
        return written(self.a + self.b)

    @property
    def held_out(self) -> bool:
        """Whether this problem is for evaluation only. Fixed for ever: it depends on the problem alone."""
        return zlib.crc32(self.prompt.encode()) % 10 == 0


def problems(held_out: bool) -> list[Problem]:
    """All problems of the one or the other part, in a fixed order."""
    everything = (Problem(a, b) for a in range(100) for b in range(100))
    return [problem for problem in everything if problem.held_out == held_out]


def written(number: int) -> str:
    """0..999 as an answer: 85 is "580" and a newline."""
    return f"{number:03d}"[::-1] + EOS


def accepted(problem: Problem, tolerance: int) -> list[str]:
    """The answers that are at most `tolerance` (0..99) off the sum."""
    total = problem.a + problem.b
    return [written(number) for number in range(max(0, total - tolerance), total + tolerance + 1)]


def teacher(
    problem: Problem, rng: random.Random, right: float = 0.2, no_carry: float = 0.40
) -> str:
    """An answer that is right with probability `right`, forgets to carry the one with `no_carry`, and is off by 1..3 otherwise.

    Where there is nothing to carry, forgetting it gives the right answer: over all problems about right + 0.55 * no_carry are right.
    """
    total = problem.a + problem.b
    draw = rng.random()
    if draw < right:
        return written(total)
    if draw < right + no_carry:
        return written(total - 10 * (problem.a % 10 + problem.b % 10 >= 10))
    return written(abs(total + rng.choice((-3, -2, -1, 1, 2, 3))))


def encode(text: str) -> list[int]:
    """Token ids of a text of this task. Raises ValueError at a character that it does not have."""
    return [VOCABULARY.index(character) for character in text]
