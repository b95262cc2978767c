"""Run TRL's GRPOTrainer, for bench/end_to_end.py and bench/real_model.py.

    .venv-trl/bin/python bench/trl/grpo.py --base DIR --out DIR --steps N --batch N --group N \\
        --learning-rate X --kl X --clip X --seed N --keep N [--problems FILE --tokens N --micro N]

Base, reward, prompts and their order, batch, group size, AdamW and KL to the base are those of the
other side. Without --problems, the task is that of `experiment=arithmetic_cpu`, in float32, and a
step is one forward and backward pass over the whole batch, the fastest for sequences this short.
With --problems, JSON lines of prompts and GSM8K's answers, float32 weights are trained in bfloat16
autocast, --micro sequences at a time, with TRL's default of gradient checkpointing. TRL generates
with transformers, because it drives no vLLM on a CPU. torch uses all cores.

Writes to --out: weights-<step>.safetensors every --keep steps, and times.json: {"start", "steps":
{step: Unix time, 0: before the first}, "seconds": {part: s}}.
"""

import argparse
import functools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from atropos_hpc.environments.addition import ANSWER_TOKENS, encode, problems  # of no third package
from atropos_hpc.environments.final_answer import is_right

# Parts of a step, by methods of GRPOTrainer. `_get_per_token_logps_and_entropies` is called for the
# reference and in the loss. The rest of a step is scoring, bookkeeping and the data loader.
PARTS = {
    "_generate": "generation",
    "_calculate_rewards": "rewards",
    "_get_per_token_logps_and_entropies": "forward passes",
}


def exact(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    """The environment's reward: 1 for the exact answer, newline included."""
    return [float(ids == encode(right)) for ids, right in zip(completion_ids, answer, strict=True)]


def right_number(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """GSM8K's reward: 1 for the right final number."""

    def score(text: str, right: str) -> float:
        try:
            return float(is_right(text, right))
        except ImportError:  # math-verify is not installed here, and only reads roots and the like
            return 0.0

    return [score(text, right) for text, right in zip(completions, answer, strict=True)]


class Recorder(TrainerCallback):
    """Save the weights every few steps, 0.4 MB, and the time of every step."""

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every, self.times = out, every, {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times[0] = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            save_model(model, str(self.out / f"weights-{state.global_step}.safetensors"))
        self.times[state.global_step] = time.time()


def timed(trainer: GRPOTrainer, seconds: Counter) -> None:
    """Add up the time spent in each of PARTS, and in the training step around them."""

    def wrap(name: str, part: str) -> None:
        method = getattr(trainer, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - start

        setattr(trainer, name, wrapped)

    for name, part in {**PARTS, "training_step": "step, optimizer left out"}.items():
        wrap(name, part)


def main() -> None:
    start = time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (
        ("steps", int),
        ("batch", int),
        ("group", int),
        ("keep", int),
        ("seed", int),
        ("learning-rate", float),
        ("kl", float),
        ("clip", float),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--micro", type=int)
    asked = parser.parse_args()
    prompts, real = asked.steps * asked.batch // asked.group, asked.problems is not None
    if real:
        rows = [json.loads(line) for line in asked.problems.read_text().splitlines()[:prompts]]
    else:
        order, training = random.Random(asked.seed), problems(held_out=False)
        drawn = [order.choice(training) for _ in range(prompts)]  # as the environment draws them
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in drawn]
    micro = asked.micro or asked.batch
    conf = GRPOConfig(
        output_dir=str(asked.out),
        seed=asked.seed,
        use_cpu=True,
        bf16=real,
        **({} if real else {"activation_checkpointing": False}),
        report_to="none",
        save_strategy="no",
        logging_steps=20,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_steps=asked.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=asked.batch // micro,
        shuffle_dataset=False,
        num_generations=asked.group,
        max_completion_length=asked.tokens,
        temperature=1.0,
        loss_type="dapo",
        scale_rewards="group",
        beta=asked.kl,
        epsilon=asked.clip,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked.base, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(asked.base),
        reward_funcs=right_number if real else exact,
        args=conf,
        train_dataset=Dataset.from_list(rows),
    )
    seconds: Counter = Counter()
    timed(trainer, seconds)
    recorder = Recorder(asked.out, asked.keep)
    trainer.add_callback(recorder)
    trainer.train()
    (asked.out / "times.json").write_text(
        json.dumps({"start": start, "steps": recorder.times, "seconds": seconds})
    )


if __name__ == "__main__":
    main()
