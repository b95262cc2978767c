"""Measure vLLM alone, in the rollout role's Python: tokens per second of one batch.

.venv-rollout/bin/python bench/parts/generation.py MODEL PROMPTS SEQUENCES TOKENS
"""

import os
import sys
import time
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    model, prompts, sequences, tokens = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5])
    texts = prompts.read_text().split("\0")
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 29,
        disable_log_stats=True,
    )
    asked = [texts[i % len(texts)] for i in range(sequences)]
    sampling = SamplingParams(temperature=1.0, max_tokens=tokens)
    llm.generate(asked[:2], SamplingParams(temperature=1.0, max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    found = llm.generate(asked, sampling, use_tqdm=False)
    made = sum(len(each.outputs[0].token_ids) for each in found)
    print(f"tokens_per_s={made / (time.perf_counter() - start):.1f}")


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
