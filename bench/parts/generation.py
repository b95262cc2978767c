"""Measure vLLM alone, in the rollout role's Python: batches of prompts, without a server.

    .venv-rollout/bin/python bench/parts/generation.py MODEL PROMPTS SEQUENCES TOKENS
        [--samples N] [--rounds N] [--engine JSON]

Prints tokens_per_s=... and batch_s=..., of the median round.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path, help="texts with a NUL between them")
    parser.add_argument("sequences", type=int)
    parser.add_argument("tokens", type=int, help="of an answer, at most")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine", type=json.loads, default={}, help="other arguments of LLM")
    options = parser.parse_args()
    texts = options.prompts.read_text().split("\0")
    engine = {
        "dtype": "bfloat16",
        "max_model_len": 512,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 29,
        "disable_log_stats": True,
    }
    llm = LLM(options.model, **{**engine, **options.engine})
    asked = [texts[i % len(texts)] for i in range(options.sequences // options.samples)]
    sampling = SamplingParams(temperature=1.0, max_tokens=options.tokens, n=options.samples)
    if options.engine:  # what the servers are asked for
        sampling.logprobs, sampling.detokenize = 0, False
    llm.generate(asked[:2], SamplingParams(temperature=1.0, max_tokens=4), use_tqdm=False)
    seconds, rates = [], []
    for _ in range(options.rounds):
        start = time.perf_counter()
        found = llm.generate(asked, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        made = sum(len(each.token_ids) for answer in found for each in answer.outputs)
        rates.append(made / seconds[-1])
    print(f"tokens_per_s={statistics.median(rates):.1f} batch_s={statistics.median(seconds):.4f}")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
