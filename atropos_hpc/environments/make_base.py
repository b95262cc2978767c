"""Make the base policy of the arithmetic environment: a Qwen3 of 0.1M parameters that adds badly.

    python -m atropos_hpc.environments.make_base --out base

It runs in the trainer role's Python, for half a minute of one core. The policy is fitted from
scratch to the answers of a teacher that is mostly wrong (`addition.teacher`), until it is right
some of the time. It is evaluated on the held-out problems and saved with its tokenizer in Hugging
Face's format, into a temporary directory that is renamed last: `--out` is complete or absent. The
same seed gives the same bytes, whatever the number of cores.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atropos_hpc.environments.addition import (
    ANSWER_TOKENS,
    EOS,
    PAD,
    PROMPT_TOKENS,
    VOCABULARY,
    Problem,
    encode,
    problems,
    teacher,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

EXAMPLES = 256  # per step
LEARNING_RATE = 2e-3
EVALUATE_EVERY = 5  # steps


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Make the tokenizer: one token per character, for AutoTokenizer. A newline ends a sequence."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=PAD)
    )
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_model(seed: int) -> Any:
    """Make the untrained policy, in float32."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest of vLLM's attention on CPUs
        max_position_embeddings=64,
        initializer_range=0.1,  # 0.02 is for far wider models and takes twice the steps here
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
        attn_implementation="sdpa",
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def answer_log_probs(model: Any, tokens: "torch.Tensor") -> "torch.Tensor":
    """Return log-probs of the answers: tokens [B, 10] of prompt and answer -> [B, 4]."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, PROMPT_TOKENS:, None]).squeeze(-1)


def accuracy(model: Any, on: list[Problem]) -> tuple[float, float]:
    """Return (sampled, greedy) accuracy.

    Sampled accuracy is the mean probability of the right answer at temperature 1, which is the
    expected accuracy of sampling.
    """
    import torch

    tokens = torch.tensor([encode(problem.prompt + problem.answer) for problem in on])
    with torch.no_grad():
        sampled = answer_log_probs(model, tokens).sum(-1).exp().mean().item()
        greedy = tokens[:, :PROMPT_TOKENS]
        for _ in range(ANSWER_TOKENS):
            greedy = torch.cat(
                [greedy, model(input_ids=greedy, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
            )
    return sampled, (greedy == tokens).all(-1).float().mean().item()


def fit(model: Any, seed: int, steps: int, until: float) -> None:
    """Fit by maximum likelihood to the teacher's answers to random training problems.

    It stops when the sampled accuracy on some training problems reaches `until`, or after `steps`.
    Seeds differ by a factor of two in speed; stopping by accuracy gives similar policies.
    """
    import torch

    rng, training = random.Random(seed), problems(held_out=False)
    evaluated = rng.sample(training, 500)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    start = time.process_time()
    for step in range(1, steps + 1):
        batch = rng.choices(training, k=EXAMPLES)
        tokens = torch.tensor([encode(problem.prompt + teacher(problem, rng)) for problem in batch])
        loss = -answer_log_probs(model, tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            sampled, _ = accuracy(model, evaluated)
            if step % 50 == 0 or step == steps or sampled >= until:
                measured = f"loss {loss.item():.3f}, accuracy {sampled:.3f}"
                print(
                    f"step {step}: {measured}, {time.process_time() - start:.0f} CPU-s", flush=True
                )
            if sampled >= until:
                return


def make_base(
    out: Path, seed: int = 0, steps: int = 1000, until: float = 0.36
) -> tuple[float, float]:
    """Write the base policy to `out` and return its (sampled, greedy) held-out accuracy.

    Raises FileExistsError if `out` exists: runs may have started from it.
    """
    import torch

    if out.exists():
        raise FileExistsError(f"{out} exists already: remove it, or choose another --out")
    torch.set_num_threads(1)  # for the same order of summation everywhere
    torch.use_deterministic_algorithms(True)
    model = make_model(seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, seed {seed}", flush=True)
    fit(model, seed, steps, until)
    sampled, greedy = accuracy(model, problems(held_out=True))
    print(f"held-out accuracy: {sampled:.3f} sampled, {greedy:.3f} greedy", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(temporary)
        make_tokenizer().save_pretrained(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    except OSError:
        if not out.exists():  # else another process has made the same base meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}", flush=True)
    return sampled, greedy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=1000, help=f"at most this many steps of {EXAMPLES} examples"
    )
    parser.add_argument(
        "--until",
        type=float,
        default=0.36,
        help="stop at this sampled accuracy on training problems",
    )
    arguments = parser.parse_args()
    make_base(arguments.out, arguments.seed, arguments.steps, arguments.until)


if __name__ == "__main__":
    main()
