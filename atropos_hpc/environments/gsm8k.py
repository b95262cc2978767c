"""Word problems in GSM8K's format (Cobbe et al., arXiv:2110.14168).

The reward is an exact match of the final number. The problems come from a Hugging Face dataset
(`dataset`, such as openai/gsm8k), or from JSON-lines files with the fields "question" and "answer"
(`train_path`, `test_path`), whose answers end in "#### <number>". By default they come from the
small sample in this package.
"""

import json
import re
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig, ScoredDataGroup
from pydantic import Field, model_validator

from atropos_hpc.environments.final_answer import (
    final_number,
    is_flexibly_right,
    is_right,
    is_strictly_right,
)
from atropos_hpc.environments.single_turn import RULE, SingleTurnConfig, SingleTurnEnv, Verdict

SAMPLE = Path(__file__).parent / "data"
SYSTEM_PROMPT = (
    "Solve the problem step by step. On the last line write #### and then the answer, as a number "
    "and nothing else. For example: #### 42"
)


class GSM8KConfig(SingleTurnConfig):
    """The environment's own config."""

    dataset: str | None = Field(
        default=None,
        description="Name or directory of a Hugging Face dataset with the splits train and test.",
    )
    dataset_config: str | None = Field(default="main", description="The dataset's configuration.")
    train_path: str | None = Field(
        default=None, description="JSON-lines file of training problems, instead of a dataset."
    )
    test_path: str | None = Field(
        default=None, description="JSON-lines file of held-out problems, instead of a dataset."
    )
    system_prompt: str = Field(
        default=SYSTEM_PROMPT, description="System prompt, before the question."
    )
    examples: int = Field(
        default=0,
        ge=0,
        description="Training problems that the prompt shows with their solutions, as earlier "
        "turns: the first ones, which are not trained on.",
    )
    max_tokens: int = Field(
        default=512,
        ge=1,
        description="Longest answer, tokens; shorter where max_token_length leaves less.",
    )
    unformatted_reward: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Reward of a right final number that does not follow ####.",
    )
    eval_problems: int | None = Field(
        default=None,
        ge=1,
        description="Held-out problems that an evaluation answers. None: all.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "GSM8KConfig":
        files = [path is not None for path in (self.train_path, self.test_path)]
        if any(files):  # files win over a default of the config
            if not all(files):
                raise ValueError("give train_path and test_path, or neither to use the dataset")
            self.dataset = None
        return self


class GSM8KEnv(SingleTurnEnv):
    """One question, `group_size` solutions; reward 1 if the final number is right, else 0."""

    name = "gsm8k"
    env_config_cls = GSM8KConfig

    @classmethod
    def config_init(cls) -> tuple[GSM8KConfig, list[APIServerConfig]]:
        return cls.env_config_cls(max_token_length=1024, group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        await super().setup()
        training, self.held_out = self.load()
        count = self.config.examples
        if count >= len(training):
            raise ValueError(f"examples={count}, but there are {len(training)} training problems")
        shown, self.training = training[:count], training[count:]
        self.examples = [(each["question"], solution(each["answer"])) for each in shown]

    def load(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Load the (training, held-out) problems."""
        return load_problems(self.config)

    def prompt(self, question: str) -> str:
        """Return the prompt: by the model's chat template, or plain if it has none."""
        if self.tokenizer.chat_template is None:
            turns = [f"Question: {asked}\nAnswer: {answered}" for asked, answered in self.examples]
            turns.append(f"Question: {question}\nAnswer:")
            return "\n\n".join([self.config.system_prompt, *turns])
        messages = [{"role": "system", "content": self.config.system_prompt}]
        for asked, answered in self.examples:
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answered},
            ]
        messages.append({"role": "user", "content": question})
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    def tokens_left(self, prompt: str) -> int:
        """Return how long an answer may be.

        BaseEnv drops a group with a sequence of max_token_length tokens or more.
        """
        return min(
            self.config.max_tokens,
            self.config.max_token_length - 1 - len(self.tokenizer.encode(prompt)),
        )

    async def collect_trajectories(self, item: dict[str, str]) -> tuple[ScoredDataGroup, list[Any]]:
        prompt = self.prompt(item["question"])
        left = self.tokens_left(prompt)
        if left < 1:
            limit = f"model.max_length={self.config.max_token_length}"
            raise ValueError(f"the prompt leaves no token of {limit} for an answer")

        def score(node: Any) -> float:
            answer = self.tokenizer.decode(
                [t for t in node.masked_tokens if t != -100], skip_special_tokens=True
            )
            return self.reward(answer, item["answer"])

        return await self.sampled(prompt, left, score), []

    def reward(self, text: str, answer: str) -> float:
        """Return 1 for a right answer in the asked-for format, less in another, else 0."""
        if is_strictly_right(text, answer):
            return 1.0
        return self.config.unformatted_reward * is_right(text, answer)

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Answer each held-out problem once, or the first `eval_problems` of them."""
        await self.report_accuracy(self.held_out[: self.config.eval_problems], self._answer)

    async def _answer(self, problem: dict[str, str], temperature: float) -> Verdict:
        prompt = self.prompt(problem["question"])
        left = self.tokens_left(prompt)
        if left < 1:
            return verdict("", problem["answer"])
        completion = await self.server.completion(
            prompt=prompt,
            n=1,
            max_tokens=left,
            temperature=temperature,
            split="eval",
        )
        return verdict(completion.choices[0].text, problem["answer"])


def solution(answer: str) -> str:
    """Return GSM8K's solution without its calculator annotations.

    >>> solution("2 + 3 = <<2+3=5>>5 apples\\n#### 5")
    '2 + 3 = 5 apples\\n#### 5'
    """
    return re.sub(r"<<[^<>]*>>", "", answer)


def verdict(text: str, answer: str) -> Verdict:
    """Return whether an answer is right by the reward's rule, strictly and flexibly."""
    return {
        RULE: is_right(text, answer),
        "strict_accuracy": is_strictly_right(text, answer),
        "flexible_accuracy": is_flexibly_right(text, answer),
    }


def load_problems(config: GSM8KConfig) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Load (training, held-out) problems, each with "question" and "answer".

    Raises ValueError, naming file and line or dataset and row, for a row of another shape and for
    an answer without a final number.
    """
    if config.dataset is not None:
        from datasets import load_dataset

        splits = load_dataset(config.dataset, config.dataset_config)
        rows = {
            name: [(f"{config.dataset}, {name}, row {n}", row) for n, row in enumerate(split)]
            for name, split in splits.items()
        }
        if missing := {"train", "test"} - rows.keys():
            raise ValueError(f"{config.dataset} has no split {', '.join(sorted(missing))}")
        parts = [rows["train"], rows["test"]]
    else:
        parts = [
            read_json_lines(Path(path or SAMPLE / default).expanduser())
            for path, default in (
                (config.train_path, "gsm8k_sample_train.jsonl"),
                (config.test_path, "gsm8k_sample_test.jsonl"),
            )
        ]
    training, held_out = ([_problem(where, row) for where, row in part] for part in parts)
    if not training or not held_out:
        raise ValueError("there are no problems in the training or the held-out data")
    return training, held_out


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Return (where it is, value) of each line that is not empty. Raises ValueError.

    Only \\n and \\r\\n end a line: JSON texts may contain U+2028 and U+0085. A byte order mark at
    the start is skipped.
    """
    found = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((f"{path}, line {number}", json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return found


def _problem(where: str, row: Any) -> dict[str, str]:
    """Check a row, and return its question and answer."""
    fields = ("question", "answer")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object with the texts question and answer")
    for name in fields:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} must be a text, not {str(row.get(name))[:80]}")
    if final_number(row["answer"].rpartition("####")[2]) is None:
        raise ValueError(
            f"{where}: a GSM8K answer must end in '#### <number>': {row['answer'][-80:]!r}"
        )
    return {name: row[name] for name in fields}
