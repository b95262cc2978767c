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
from math_verify import parse, verify
from pydantic import Field

from atropos_hpc.environments.single_turn import SingleTurnConfig, SingleTurnEnv

SAMPLE = Path(__file__).parent / "data"
SYSTEM_PROMPT = (
    "Solve the problem step by step. On the last line write #### and then the answer, as a number "
    "and nothing else. For example: #### 42"
)
NUMBER = re.compile(r"-?\d[\d,]{0,20}(?:\.\d{1,12})?(?:/\d{1,12})?")


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
    max_tokens: int = Field(
        default=512,
        ge=1,
        description="Longest answer, tokens; shorter where max_token_length leaves less.",
    )
    eval_problems: int | None = Field(
        default=None,
        ge=1,
        description="Held-out problems that an evaluation answers. None: all.",
    )


class GSM8KEnv(SingleTurnEnv):
    """One question, `group_size` solutions; reward 1 if the final number is right, else 0."""

    name = "gsm8k"
    env_config_cls = GSM8KConfig

    @classmethod
    def config_init(cls) -> tuple[GSM8KConfig, list[APIServerConfig]]:
        return GSM8KConfig(max_token_length=1024, group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        await super().setup()
        self.training, self.held_out = self.load()

    def load(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Load the (training, held-out) problems."""
        return load_problems(self.config)

    def prompt(self, question: str) -> str:
        """Return the prompt: by the model's chat template, or plain if it has none."""
        if self.tokenizer.chat_template is None:
            return f"{self.config.system_prompt}\n\nQuestion: {question}\nAnswer:"
        messages = [
            {"role": "system", "content": self.config.system_prompt},
            {"role": "user", "content": question},
        ]
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

        def reward(node: Any) -> float:
            answer = self.tokenizer.decode(
                [t for t in node.masked_tokens if t != -100], skip_special_tokens=True
            )
            return float(is_right(answer, item["answer"]))

        return await self.sampled(prompt, left, reward), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Answer each held-out problem once, or the first `eval_problems` of them."""
        await self.report_accuracy(self.held_out[: self.config.eval_problems], self._answers_right)

    async def _answers_right(self, problem: dict[str, str], temperature: float) -> bool:
        prompt = self.prompt(problem["question"])
        left = self.tokens_left(prompt)
        if left < 1:
            return False
        completion = await self.server.completion(
            prompt=prompt,
            n=1,
            max_tokens=left,
            temperature=temperature,
            split="eval",
        )
        return is_right(completion.choices[0].text, problem["answer"])


def final_number(text: str) -> str | None:
    """Return an answer's final number, None if there is none.

    It comes after the last ####, else in the last \\boxed{}, else it is the last number.
    """
    for marked in (text.rpartition("####"), text.rpartition("\\boxed{")):
        if marked[1]:
            found = NUMBER.search(marked[2])
            return found.group().replace(",", "") if found else None
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def is_right(text: str, answer: str) -> bool:
    """Return whether `text` has the final number of `answer`, by value: 21.50 is 21.5."""
    given, gold = final_number(text), final_number(answer)
    if given is None or gold is None:
        return False
    # No timeouts: they need SIGALRM in the main thread, and numbers of bounded length are quick.
    gold_value, given_value = (
        parse(f"${gold}$", parsing_timeout=None),
        parse(f"${given}$", parsing_timeout=None),
    )
    return bool(verify(gold_value, given_value, timeout_seconds=None))


def load_problems(config: GSM8KConfig) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Load (training, held-out) problems, each with "question" and "answer".

    Raises ValueError for an answer without a final number.
    """
    if config.dataset is not None and config.train_path is None:
        from datasets import load_dataset

        splits = load_dataset(config.dataset, config.dataset_config)
        parts = [[dict(row) for row in splits[name]] for name in ("train", "test")]
    else:
        paths = (
            config.train_path or SAMPLE / "gsm8k_sample_train.jsonl",
            config.test_path or SAMPLE / "gsm8k_sample_test.jsonl",
        )
        parts = [
            [
                json.loads(line)
                for line in Path(path).expanduser().read_text().splitlines()
                if line.strip()
            ]
            for path in paths
        ]
    for problem in (problem for part in parts for problem in part):
        if final_number(problem["answer"].rpartition("####")[2]) is None:
            raise ValueError(
                f"a GSM8K answer must end in '#### <number>': {problem['answer'][-80:]!r}"
            )
    return parts[0], parts[1]
