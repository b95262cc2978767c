"""The token ids of conversations, so that an answer's ids stay the ones that were sampled.

A chat template renders a conversation anew for every turn. Tokenizing an earlier answer's text can
give other ids than were sampled, and templates trim answers or drop their reasoning. Here the ids
of each turn are kept, under the messages that led to it; the next turn's prompt is those ids and
the rendering of what came after them.

Conversations that run side by side, as those of a group do, may have answers of one text and of
different ids. So a task that holds a conversation finds its own last answer first.
"""

import contextvars
import json
import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash
from jinja2 import TemplateError

from atropos_hpc.contracts.scored_group import JsonObject

log = logging.getLogger(__name__)

CAPACITY = 16 << 20  # tokens, 4 bytes each
PLACEHOLDER = "PLACEHOLDEROFANANSWER"  # stands for an answer while what follows it is rendered
PER_CALL = ("add_generation_prompt", "continue_final_message")  # not part of a conversation
SEQUENCES = 1 << 16  # whose end is known
LONGEST_END = 8  # tokens that may end a turn

Answers = dict[int, "array[int]"]  # by the conversation that ends with the answer
# The running task's last answers: the conversation that they answer, and their ids.
_last: contextvars.ContextVar[tuple[list[int], Answers] | None] = contextvars.ContextVar(
    "last", default=None
)


class Conversations:
    """Renders conversations with a tokenizer's chat template, and keeps the ids of answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: OrderedDict[int, array[int]] = OrderedDict()
        self._size = 0
        self._ended = OrderedDict[int, None]()  # sequences that ended with one of `_ends`
        self._ends: set[int] = set()
        self._warned = False

    def prompt(self, messages: Sequence[JsonObject], template: JsonObject) -> list[int]:
        """Return the ids of a conversation, up to where the next answer begins.

        It begins with the ids of its last known answer, if there is one.
        """
        if not template.get("continue_final_message"):
            digests = list(_digests(messages, template))
            _, own = _last.get() or ([], {})
            for at in reversed(range(len(messages))):
                known = self._known.get(digests[at])
                if known is not None:
                    self._known.move_to_end(digests[at])
                    known = own.get(digests[at], known)
                    after = self._after(messages, at, template)
                    if after is not None:
                        return [*known, *_without_repeated_end(known, after)]
        rendered: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=False, **template
        )
        return rendered

    def remember(
        self,
        messages: Sequence[JsonObject],
        template: JsonObject,
        answer: JsonObject,
        ids: Sequence[int],
    ) -> None:
        *answered, digest = _digests([*messages, answer], template)
        self._size += len(ids) - len(self._known.pop(digest, ()))
        self._known[digest] = array("i", ids)
        last, others = _last.get() or ([], {})
        own = others if last == answered[-1:] else {}
        _last.set((answered[-1:], {**own, digest: self._known[digest]}))
        while self._size > CAPACITY:
            self._size -= len(self._known.popitem(last=False)[1])

    def remember_end(self, ids: Sequence[int]) -> None:
        """Note a sequence that ended with a sampled end-of-turn token."""
        self._ends.add(ids[-1])
        self._ended[_digest(ids)] = None
        if len(self._ended) > SEQUENCES:
            self._ended.popitem(last=False)

    def without_repeated_tokens(self, ids: Sequence[int]) -> list[int]:
        """Return a prompt with one beginning-of-sequence token, and one end token after an answer.

        Callers that concatenate a sampled answer and a template's text, as Atropos' managed server
        does, repeat the end of the answer's turn; those that tokenize a template's text repeat its
        beginning.
        """
        bos = self.tokenizer.bos_token_id
        first = 1 if len(ids) > 1 and ids[0] == ids[1] == bos is not None else 0
        kept = list(ids[first : first + 1])
        for token in ids[first + 1 :]:
            if token == kept[-1] and token in self._ends and _digest(kept) in self._ended:
                continue
            kept.append(token)
        return kept

    def _after(
        self, messages: Sequence[JsonObject], at: int, template: JsonObject
    ) -> list[int] | None:
        """Return the ids of what follows the content of message `at`; None if it has no place.

        They include the end of that message's turn.
        """
        stand_in = {"role": "assistant", "content": PLACEHOLDER}
        changed = [*messages[:at], stand_in, *messages[at + 1 :]]
        try:
            text: str = self.tokenizer.apply_chat_template(changed, tokenize=False, **template)
        except TemplateError as error:
            self._warn(str(error))
            return None
        _, found, after = text.rpartition(PLACEHOLDER)
        if not found:
            self._warn("it does not show the content of an answer")
            return None
        ids: list[int] = self.tokenizer.encode(after, add_special_tokens=False)
        return ids

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the chat template cannot continue a conversation after an answer (%s): earlier "
                "answers are tokenized anew, and may get other ids than were sampled",
                why,
            )


def _digest(ids: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(array("i", ids).tobytes())


def _without_repeated_end(known: Sequence[int], after: list[int]) -> list[int]:
    """Drop the end of the turn from `after` as far as the answer has sampled it already."""
    for size in range(min(LONGEST_END, len(after), len(known)), 0, -1):
        if list(known[-size:]) == after[:size]:
            return after[size:]
    return after


def _digests(messages: Sequence[JsonObject], template: JsonObject) -> Iterator[int]:
    """Yield the hash of the conversation after each message."""
    options = {key: value for key, value in template.items() if key not in PER_CALL}
    hasher = xxhash.xxh3_64(_canonical(options))
    for message in messages:
        hasher.update(_canonical(_compared(message)))
        yield hasher.intdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"


def _compared(message: JsonObject) -> JsonObject:
    """Return what makes two messages the same: not ids of calls, nor space around a text."""
    compared = {key: value for key, value in message.items() if value not in (None, "", [])}
    if isinstance(content := compared.get("content"), str):
        compared["content"] = content.strip()
    if "tool_calls" in compared:
        functions = [call["function"] for call in compared["tool_calls"]]
        compared["tool_calls"] = [[each["name"], each["arguments"]] for each in functions]
    return compared
