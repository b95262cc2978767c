"""Small tokenizers with chat templates of three families, for tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGES = [("a", "b"), ("t", "h"), ("th", "e"), ("o", "n")]
THINK = ["<think>", "</think>"]  # one token each, and not special, as in Qwen3
TOOL = ["<tool_call>", "</tool_call>"]

LLAMA = """{{ bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

QWEN = """
{%- if tools %}{{ '<|im_start|>system\n# Tools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + (m.content or '').split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}
{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A chat template, its special tokens, and what it puts around a user's message."""

    name: str
    template: str
    bos: str | None
    end: str  # of a turn, which the model samples
    before: str
    after: str
    start: str = ""


FAMILIES = [
    Family(
        "llama",
        LLAMA,
        bos="<|begin_of_text|>",
        end="<|eot_id|>",
        start="<|begin_of_text|>",
        before="<|start_header_id|>user<|end_header_id|>\n\n",
        after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Family(
        "qwen",
        QWEN,
        bos=None,
        end="<|im_end|>",
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
    ),
    Family(
        "gemma",
        GEMMA,
        bos="<bos>",
        end="<end_of_turn>",
        start="<bos>",
        before="<start_of_turn>user\n",
        after="<end_of_turn>\n<start_of_turn>model\n",
    ),
]
BETWEEN = {"llama": "", "qwen": "\n", "gemma": "\n"}  # the end of a turn and the next turn
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}


def make_tokenizer(family: Family) -> Any:
    """A tokenizer of characters and a few merges. Like Llama's, each but Qwen's adds its BOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = [*characters, *(one + other for one, other in MERGES)]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, MERGES)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL[family.name]])
    tokenizer.add_tokens([AddedToken(token) for token in THINK + TOOL])
    if family.bos is not None:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.end,
        bos_token=family.bos,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = family.template
    return made


def save_tokenizer(family: Family, directory: Path) -> Any:
    """Make and save the tokenizer; return it."""
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(directory)
    return tokenizer
