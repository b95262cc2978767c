"""The distribution that a call of training samples from, and whether the learner can replay it.

- top_p, top_k, min_p, allowed_token_ids and structured outputs set the probability of some ids to
  zero. The server reports the ids that were left, the support of each token, and the learner
  restricts its softmax to them.
- Penalties and logit_bias change the probabilities themselves, min_tokens and bad_words by
  themselves leave a support of nearly the whole vocabulary, and temperature 0 samples nothing. The
  learner does not replay these.

A group with tokens of the second kind, or of the first without a known support, is refused. With
rollout.allow_biased_sampling it is trained as if it came from the whole vocabulary, and counted.
"""

from array import array
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from atropos_hpc.config import RolloutConf
from atropos_hpc.contracts.group import NOT_TRAINED
from atropos_hpc.contracts.messages import WANTED, Generation, SamplingParams
from atropos_hpc.contracts.prompts import Draw
from atropos_hpc.contracts.scored_group import RequestError
from atropos_hpc.contracts.support import Support
from atropos_hpc.rollout.stamping import Sampled, find_tokens, recorded, stamp

# Tokens that an environment may remove at the end of an answer (a stop token), and that a chat
# template may add behind it (the end of a turn), which nobody sampled.
ENDING = 8
LOWEST_TEMPERATURE = 0.01  # to which vLLM raises any below it but 0
Flags = NDArray[np.bool_]
HOW = "set rollout.allow_biased_sampling=true to train on such groups all the same"


def masking_options(sampling: SamplingParams) -> list[str]:
    """Return the options of a call that narrow the support of its tokens."""
    given = {
        "top_p": sampling.top_p is not None and sampling.top_p < 1,
        "top_k": bool(sampling.top_k and sampling.top_k > 0),
        "min_p": bool(sampling.min_p),
        "allowed_token_ids": bool(sampling.allowed_token_ids),
        "structured_outputs": sampling.structured_outputs is not None,
    }
    return [name for name, is_set in given.items() if is_set]


def bias(sampling: SamplingParams) -> str | None:
    """Return the options of a call that the learner cannot replay, None if there are none."""
    if sampling.temperature == 0:
        return "temperature=0 (greedy decoding)"
    given = {
        "presence_penalty": bool(sampling.presence_penalty),
        "frequency_penalty": bool(sampling.frequency_penalty),
        "repetition_penalty": sampling.repetition_penalty not in (None, 1),
        "logit_bias": bool(sampling.logit_bias),
    }
    if not masking_options(sampling):
        given["min_tokens"] = bool(sampling.min_tokens)
        given["bad_words"] = bool(sampling.bad_words)
    return ", ".join(name for name, is_set in given.items() if is_set) or None


def with_support(sampling: SamplingParams, largest: int) -> SamplingParams:
    """Return the call's parameters with which the server reports the support of each token.

    They are the same if the call does not narrow it. `largest` is the number of ids beyond which a
    support counts as too large. With top_k it is asked for somewhat more than k, because tokens of
    equal logits are all kept.
    """
    if not masking_options(sampling) or bias(sampling):
        return sampling
    if sampling.top_k and sampling.top_k > 0:
        largest = min(largest, 2 * sampling.top_k + 16)
    wanted = sampling.logprobs or 0
    return msgspec.structs.replace(
        sampling, logprobs=max(largest, wanted), extra_args={WANTED: wanted}
    )


def outcome(generation: Generation, sampling: SamplingParams) -> tuple[Support | None, str | None]:
    """Return the support of a generation's tokens, and why it cannot be replayed; None where n/a.

    Both are None for tokens that were sampled from the whole vocabulary.
    """
    if (why := bias(sampling)) is not None:
        return None, why
    if not (options := ", ".join(masking_options(sampling))):
        return None, None
    kept = generation.sampling_mask
    if kept is None or len(kept) != len(generation.token_ids):
        return None, f"{options} (the server did not report the tokens that it left)"
    if not all(kept):
        limit = f"more than rollout.max_support={sampling.logprobs} ids; a top_k bounds them"
        return None, f"{options} (left {limit})"
    return Support.of_lists(kept), None


def sampled(
    generations: Iterable[Generation], prompt: Sequence[int], sampling: SamplingParams
) -> Iterator[Sampled]:
    """Return what is to be recorded of generations that have policy versions."""
    temperature = 1.0 if sampling.temperature is None else float(sampling.temperature)
    if temperature > 0:
        temperature = max(temperature, LOWEST_TEMPERATURE)
    prompt = tuple(prompt)  # one for all samples
    for generation in generations:
        if (versions := generation.versions) is not None:
            support, why = outcome(generation, sampling)
            tokens = tuple(generation.token_ids)
            yield Sampled(
                tokens, versions, temperature, prompt, support, why, generation.finish_reason
            )


def complete_group(
    group: MutableMapping[str, Any],
    rollout: RolloutConf,
    binary: bool,
    environment: str | None = None,
    draw: Draw | None = None,
) -> str | None:
    """Stamp a group of the surrounding rollout, and add its support. Return why it is refused."""
    try:
        stamp(group, recorded(), environment, draw)
        add_support(group, recorded(), rollout, binary)
    except RequestError as error:
        return str(error)
    except Exception as error:  # malformed tokens
        return f"tokens: {type(error).__name__}: {error}"
    return None


def add_support(
    group: MutableMapping[str, Any], seen: Sequence[Sampled], rollout: RolloutConf, binary: bool
) -> None:
    """Set `support` in a stamped group of which some token was not sampled from the vocabulary.

    `binary` says whether the trajectory server takes it. Raises RequestError, which names the
    options, if the support is not known for all trained tokens, or a sequence was sampled at
    several temperatures, of which the learner takes one; with rollout.allow_biased_sampling, it
    sets generation_params.biased_sampling instead.
    """
    restricted = any(each.restricted for each in seen)
    if not restricted and len({each.temperature for each in seen}) < 2:
        return
    try:
        if restricted and not binary:
            raise RequestError(422, f"{_options(seen)}: trajectories.server=atropos has no support")
        rows = zip(group["tokens"], group["masks"], strict=True)
        parts = [_support_of(tokens, mask, seen) for tokens, mask in rows]
    except RequestError as error:
        if not rollout.allow_biased_sampling:
            raise RequestError(422, f"biased sampling: {error}; {HOW}") from None
        group["generation_params"]["biased_sampling"] = str(error)
        return
    support = Support.concatenate(parts)
    if support.ids.size:
        group["support"] = support.encode()


def _options(seen: Sequence[Sampled]) -> str:
    options = {each.bias or "truncated sampling" for each in seen if each.restricted}
    return ", ".join(sorted(options)) or "several temperatures"


def _support_of(tokens: Any, mask: Any, seen: Sequence[Sampled]) -> Support:
    """Return the support of a sequence's tokens; unrestricted where not trained.

    Generations are placed behind their own prompts first, and long ones before short ones.
    """
    ids = np.array([int(token) for token in tokens], np.int64)
    trained = np.array([int(label) != NOT_TRAINED for label in mask])
    free = trained.copy()  # trained tokens that no generation has been found for
    sequence = array("i", ids.tolist()).tobytes()
    placed: dict[int, Support] = {}
    temperatures: set[float] = set()
    ordered = sorted(seen, key=lambda each: -len(each.tokens))
    for each, own_prompt in [(e, True) for e in ordered] + [(e, False) for e in ordered]:
        if (found := _place(each, sequence, free, own_prompt)) is None:
            continue
        start, length = found
        free[start : start + length] = False
        if each.bias is not None:
            raise RequestError(422, f"{each.bias}: its distribution cannot be replayed")
        support = each.support or Support.unrestricted(len(each.tokens))
        placed[start] = support.select(np.arange(len(each.tokens)) < length)
        temperatures.add(each.temperature)
    if _unexplained(free, trained):
        what = "the environment tokenized the answer again and got other ids"
        raise RequestError(422, f"{_options(seen)}: {what}")
    if len(temperatures) > 1:
        values = " and ".join(map(str, sorted(temperatures)))
        raise RequestError(422, f"temperature: {values} in one sequence")
    parts, at = [], 0
    for start, support in sorted(placed.items()):
        parts += [Support.unrestricted(start - at), support]
        at = start + support.counts.size
    return Support.concatenate([*parts, Support.unrestricted(ids.size - at)])


def _place(each: Sampled, sequence: bytes, free: Flags, own_prompt: bool) -> tuple[int, int] | None:
    """Return (start, length) of a generation among a sequence's free tokens.

    With `own_prompt`, only where the sequence begins with the prompt of the generation. An
    environment may have removed up to ENDING tokens at the end.
    """
    prompt, total = array("i", each.prompt), len(each.tokens)
    if own_prompt and not sequence.startswith(prompt.tobytes()):
        return None
    for length in range(total, max(0, total - ENDING - 1), -1):
        for at in find_tokens(sequence, array("i", each.tokens[:length]).tobytes()):
            end = at + length
            cut = length < total and end < free.size and free[end]
            if free[at:end].all() and not cut and (not own_prompt or at == len(prompt)):
                return at, length
    return None


def _unexplained(free: Flags, trained: Flags) -> bool:
    """Return whether trained tokens lack a generation, but for a template's endings of turns."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], free.astype(np.int8), [0]])))
    for start, stop in edges.reshape(-1, 2):
        behind_answer = start > 0 and trained[start - 1] and not free[start - 1]
        if not behind_answer or stop - start > ENDING:
            return True
    return False
