"""Tool calls of answers, parsed by vLLM's own tool parser in a server.

Importing vLLM takes seconds and most of a gigabyte, too much for each environment worker. vLLM's
servers have a route that turns sampled tokens into a chat message with the parser they were started
with (`rollout.tool_parser`).
"""

import logging
from collections.abc import Sequence

import msgspec

from atropos_hpc.contracts.messages import (
    ChatRequest,
    Generation,
    ParsedAnswer,
    ParsedMessage,
    ParseRequest,
    SampledAnswer,
    SampledChoice,
)
from atropos_hpc.rollout.server_pool import Pool

log = logging.getLogger(__name__)

ROUTE = "/v1/chat/completions/derender"
PROMPT_TAIL = 6  # tokens of the prompt that an answer's text may depend on


class ToolCallParser:
    """Asks the run's servers for the tool calls of answers."""

    def __init__(self, pool: Pool, parser: str | None) -> None:
        self.pool, self.parser = pool, parser
        self._warned = False

    async def parse(
        self, prompt: Sequence[int], choices: Sequence[Generation], tools: object, timeout_s: float
    ) -> list[ParsedMessage | None]:
        """Return the message of each choice that calls a tool, None for the others.

        Raises TimeoutError.
        """
        parsed: list[ParsedMessage | None] = [None] * len(choices)
        if self.parser is None:
            self._warn("rollout.tool_parser is not set: tool calls stay in the answers' text")
            return parsed
        sampled = [SampledChoice(i, without_end(choice)) for i, choice in enumerate(choices)]
        request = ParseRequest(
            SampledAnswer([each for each in sampled if each.token_ids]),
            ChatRequest(tools),
            list(prompt[-PROMPT_TAIL:]),
        )
        if not request.generate_response.choices:
            return parsed
        status, body = await self.pool.call(ROUTE, msgspec.json.encode(request), timeout_s)
        if status != 200:
            text = body[:500].decode(errors="replace")
            self._warn(f"tool calls stay in the answers' text: {ROUTE} answered {status}: {text}")
            return parsed
        for choice in msgspec.json.decode(body, type=ParsedAnswer).choices:
            if choice.message.tool_calls:
                parsed[choice.index] = choice.message
        return parsed

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", message)


def without_end(choice: Generation) -> list[int]:
    """Return the tokens of an answer without the one that ended it, whose text is not content."""
    return choice.token_ids[:-1] if choice.ended_by_token else choice.token_ids
