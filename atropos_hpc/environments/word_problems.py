"""Word problems in English with one or two operations, made from templates.

A pretrained model of 135M parameters solves some of them, so reinforcement learning on real tokens
shows within minutes. A problem is a pure function of a seed and its number, and no question of the
held-out part occurs in training. Everything but the problems is the environment `gsm8k`'s: prompt,
reward and evaluation.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import Field

from atropos_hpc.environments.gsm8k import GSM8KConfig, GSM8KEnv


class Numbers(NamedTuple):
    """The numbers of a problem: c is at most a and b, and s is more than b."""

    a: int
    b: int
    c: int
    s: int


Templates = tuple[tuple[str, Callable[[Numbers], int]], ...]

NAMES = (
    "Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jamal", "Kira",
    "Liam", "Mei", "Noah", "Olga", "Pedro", "Quinn", "Rosa", "Samir", "Tina", "Umar", "Vera",
    "Will", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "candles", "cards", "coins", "cookies", "cups", "eggs", "flowers", "keys",
    "lemons", "marbles", "muffins", "pears", "pencils", "plums", "shells", "stamps", "stickers",
    "stones", "toys", "tickets",
)  # fmt: skip
CONTAINERS = ("bags", "baskets", "boxes", "crates", "drawers", "jars", "packs", "rows", "trays")


def _asked(answer: Callable[[Numbers], int], *texts: str) -> Templates:
    return tuple((text, answer) for text in texts)


# {a}, {b}, {c} are numbers, {x}, {y} people, {t} a kind of thing, {k} a kind of container.
ONE_STEP: Templates = (
    *_asked(
        lambda n: n.a + n.b,
        "{x} has {a} {t}. {y} gives {x} {b} more. How many {t} does {x} have now?",
        "{x} picks {a} {t} and {y} picks {b}. How many {t} do they have together?",
        "There are {a} {t} on a table. {x} puts {b} more there. How many are on the table?",
        "{x} found {a} {t} on Monday and {b} on Tuesday. How many {t} did {x} find?",
    ),
    *_asked(
        lambda n: n.s - n.b,
        "{x} had {s} {t} and gave {b} to {y}. How many {t} does {x} have left?",
        "There were {s} {t} in a shop. {b} were sold. How many {t} are left in the shop?",
        "{x} has {s} {t}. {y} has {b} fewer. How many {t} does {y} have?",
        "{x} needs {s} {t} and has {b}. How many more {t} does {x} need?",
    ),
    *_asked(
        lambda n: n.a * n.b,
        "{x} has {a} {k} with {b} {t} in each. How many {t} does {x} have?",
        "One of the {t} costs {a} dollars. How many dollars do {b} of them cost?",
        "{x} reads {a} pages every day. How many pages does {x} read in {b} days?",
        "{x} buys {a} {k}. Each holds {b} {t}. How many {t} did {x} buy?",
    ),
)
TWO_STEPS: Templates = (
    *_asked(
        lambda n: n.a + n.b - n.c,
        "{x} has {a} {t}, finds {b} more and then loses {c}. How many {t} are left?",
    ),
    *_asked(
        lambda n: n.s - n.b + n.c,
        "{x} has {s} {t}, gives {b} to {y} and buys {c}. How many {t} does {x} have?",
    ),
    *_asked(
        lambda n: n.a * n.b + n.c,
        "{x} has {a} {k} with {b} {t} each, and {c} more. How many {t} are there?",
    ),
    *_asked(
        lambda n: n.a * n.b - n.c,
        "{x} fills {a} {k} with {b} {t} each. {y} takes {c} {t}. How many remain?",
    ),
    *_asked(
        lambda n: n.a + n.a + n.b,
        "{x} has {a} {t}. {y} has {b} more than {x}. How many do both have together?",
    ),
    *_asked(
        lambda n: n.a * n.b - n.c,
        "{x} earns {a} dollars a day for {b} days and spends {c}. What is left?",
    ),
    *_asked(
        lambda n: n.a + n.b + n.c,
        "{x}, {y} and a friend have {a}, {b} and {c} {t}. How many are there in all?",
        "A bus has {a} people. {b} get on, and then {c} get on. How many are on it?",
    ),
)


class WordProblemsConfig(GSM8KConfig):
    """The environment's own config."""

    operations: int = Field(default=2, ge=1, le=2, description="Most operations in a problem.")
    largest: int = Field(default=10, ge=3, le=1000, description="Largest number in a question.")
    train_problems: int = Field(
        default=4000, ge=1, le=100_000, description="Number of training problems."
    )
    test_problems: int = Field(
        default=500, ge=1, le=10_000, description="Number of held-out problems."
    )


class WordProblemsEnv(GSM8KEnv):
    """One generated problem, `group_size` solutions; reward 1 if the number is right, else 0."""

    name = "word_problems"
    env_config_cls = WordProblemsConfig

    def load(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Generate the (training, held-out) problems."""
        config: Any = self.config
        return generate(
            config.seed,
            config.operations,
            config.largest,
            config.train_problems,
            config.test_problems,
        )


def generate(
    seed: int, operations: int, largest: int, train: int, test: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (training, held-out) problems, each with "question" and "answer".

    All questions differ. A question's text decides its part, whatever the seed. There are more than
    half a million questions with the smallest options, so this ends soon.
    """
    rng, seen = random.Random(seed), set()
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    sizes = (train, test)
    while any(len(part) < size for part, size in zip(parts, sizes, strict=True)):
        problem = _problem(rng, operations, largest)
        question = problem["question"]
        held_out = zlib.crc32(question.encode()) % 8 == 0
        if question not in seen and len(parts[held_out]) < sizes[held_out]:
            seen.add(question)
            parts[held_out].append(problem)
    return parts


def _problem(rng: random.Random, operations: int, largest: int) -> dict[str, str]:
    text, answer = rng.choice(ONE_STEP if operations == 1 else ONE_STEP + TWO_STEPS)
    x, y = rng.sample(NAMES, 2)
    a, b = rng.randint(2, largest), rng.randint(2, largest)
    c = rng.randint(1, min(a, b))
    numbers = Numbers(a, b, c, s=b + rng.randint(1, largest))
    words = {"x": x, "y": y, "t": rng.choice(THINGS), "k": rng.choice(CONTAINERS)}
    question = text.format(**words, **numbers._asdict())
    return {"question": question, "answer": f"#### {answer(numbers)}"}
