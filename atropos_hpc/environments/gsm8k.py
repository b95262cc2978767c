"""School word problems in GSM8K's format (Cobbe et al., arXiv:2110.14168), with exact match on the final number as the reward.

The problems come from a Hugging Face dataset (`dataset`, such as openai/gsm8k), or from JSON-lines files with the fields "question" and
"answer" (`train_path`, `test_path`), whose answers end in "#### <number>". Without either, from the small sample beside this module.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from atroposlib.envs.base import APIServerConfig, ScoredDataGroup
from math_verify import parse, verify
from pydantic import Field

from atropos_hpc.environments.single_turn import SingleTurnConfig, SingleTurnEnv

SAMPLE = Path(__file__).parent / "data"
SYSTEM_PROMPT = "Solve the problem step by step. On the last line write #### and then the answer, as a number and nothing else. For example: #### 42"
NUMBER = re.compile(r"-?\d[\d,]{0,20}(?:\.\d{1,12})?(?:/\d{1,12})?")


class GSM8KConfig(SingleTurnConfig):
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
        default=SYSTEM_PROMPT, description="What the model is told before the question."
    )
    max_tokens: int = Field(
        default=512,
        ge=1,
        description="Longest answer, tokens. Less, where max_token_length leaves less.",
    )
    eval_temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature in evaluation; 0 is greedy."
    )
    eval_problems: int | None = Field(
        default=None,
        ge=1,
        description="How many held-out problems an evaluation answers. None: all.",
    )


class GSM8KEnv(SingleTurnEnv):
    """One question, `group_size` sampled solutions, reward 1 where the final number is right and 0 elsewhere."""

    name = "gsm8k"
    env_config_cls = GSM8KConfig

    @classmethod
    def config_init(cls) -> tuple[GSM8KConfig, list[APIServerConfig]]:
        return GSM8KConfig(max_token_length=1024, group_size=8), [APIServerConfig()]

    async def setup(self) -> None:
        await super().setup()
        self.training, self.held_out = load_problems(self.config)
        self.order = random.Random(self.config.seed)
        self.pending: list[dict[str, str]] = []

    async def get_next_item(self) -> dict[str, str]:
        if not self.pending:  # a new epoch, in another order
            self.pending = self.order.sample(self.training, len(self.training))
        return self.pending.pop()

    def prompt(self, question: str) -> str:
        """The text that the model continues: by its chat template, or plain where it has none."""
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
        """How long an answer may get: BaseEnv drops a group with a sequence of max_token_length or more."""
        return min(
            self.config.max_tokens,
            self.config.max_token_length - 1 - len(self.tokenizer.encode(prompt)),
        )

    async def collect_trajectories(
        self, item: dict[str, str]
    ) -> tuple[ScoredDataGroup | None, list[Any]]:
        prompt = self.prompt(item["question"])
        left = self.tokens_left(prompt)
        if left < 1:
            return None, []  # a question that is too long for this run's max_token_length

        def reward(node: Any) -> float:
            answer = self.tokenizer.decode(
                [t for t in node.masked_tokens if t != -100], skip_special_tokens=True
            )
            return float(is_right(answer, item["answer"]))

        return await self.sampled(prompt, left, reward), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """One answer to each held-out problem, or to the first `eval_problems` of them."""
        await self.report_accuracy(self.held_out[: self.config.eval_problems], self._answers_right)

    async def _answers_right(self, problem: dict[str, str]) -> bool:
        prompt = self.prompt(problem["question"])
        left = self.tokens_left(prompt)
        if left < 1:
            return False
        completion = await self.server.completion(
            prompt=prompt,
            n=1,
            max_tokens=left,
            temperature=self.config.eval_temperature,
            split="eval",
        )
        return is_right(completion.choices[0].text, problem["answer"])


def final_number(text: str) -> str | None:
    """The number that an answer comes to: after the last ####, else in the last \\boxed{}, else the last there is. None without any."""
    for marked in (text.rpartition("####"), text.rpartition("\\boxed{")):
        if marked[1]:
            found = NUMBER.search(marked[2])
            return found.group().replace(",", "") if found else None
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def is_right(text: str, answer: str) -> bool:
    """Whether `text` comes to the same number as GSM8K's `answer`, by value: 21.50 is 21.5, and 1,000 is 1000."""
    given, gold = final_number(text), final_number(answer)
    if given is None or gold is None:
        return False
    # No timeouts: they need the main thread's alarm, and a number of bounded length is no danger.
    gold_value, given_value = (
        parse(f"${gold}$", parsing_timeout=None),
        parse(f"${given}$", parsing_timeout=None),
    )
    return bool(verify(gold_value, given_value, timeout_seconds=None))


def load_problems(config: GSM8KConfig) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) problems as {"question", "answer"}. Raises ValueError when one has no final number."""
    if config.dataset is not None:
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
