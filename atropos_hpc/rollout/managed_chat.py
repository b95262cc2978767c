"""Atropos' managed server with the token ids of VllmServer.

Atropos 0.4.0's own compares rendered texts to find the answer that a prompt continues. That misses
answers that the chat template trims, and its tool parser imports modules that vLLM 0.32 has moved.
"""

import time
import uuid
from typing import Any

from atroposlib.envs.server_handling import server_manager
from atroposlib.envs.server_handling.managed_server import ManagedServer, SequenceNode
from openai.types.chat import ChatCompletion

from atropos_hpc.contracts.group import NOT_TRAINED
from atropos_hpc.contracts.messages import Generation
from atropos_hpc.rollout.vllm_client import VllmServer

NO_LOGPROB = 1.0  # Atropos' log-prob of tokens that were not sampled


class RunManagedServer(ManagedServer):
    """Tracks the sequences of chat completions by their ids."""

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Answer a conversation and track the sequence; its tool calls come back parsed."""
        messages = kwargs.get("messages") or [{}]
        if (
            self.track_tree
            or not isinstance(self.server, VllmServer)
            or messages[-1].get("role") == "assistant"
        ):
            return await super().chat_completion(**kwargs)
        turn = await self.server.turn(**kwargs)
        extended = self._extended(turn.prompt)
        if extended is not None:
            self.current_nodes.remove(extended)
        self.current_nodes += [self._node(turn.prompt, c, extended) for c in turn.choices]
        return ChatCompletion.model_validate(
            {
                "id": str(uuid.uuid4()),
                "object": "chat.completion",
                "created": int(time.time()),
                "model": self.server.config.model_name,
                "choices": [
                    {"index": i, "finish_reason": choice.finish_reason, "message": message}
                    for i, (choice, message) in enumerate(
                        zip(turn.choices, turn.messages, strict=True)
                    )
                ],
            }
        )

    def _extended(self, prompt: list[int]) -> SequenceNode | None:
        matching = [n for n in self.current_nodes if prompt[: len(n.tokens)] == n.tokens]
        return max(matching, key=lambda node: len(node.tokens), default=None)

    def _node(
        self, prompt: list[int], choice: Generation, extended: SequenceNode | None
    ) -> SequenceNode:
        sampled = choice.sampled_log_probs
        sampled += [NO_LOGPROB] * (len(choice.token_ids) - len(sampled))
        masks = list(extended.masked_tokens) if extended else []
        logprobs = list(extended.logprobs) if extended else []
        given = len(prompt) - len(masks)
        tokens = prompt + choice.token_ids
        return SequenceNode(
            full_text=self.tokenizer.decode(tokens),
            tokens=tokens,
            masked_tokens=[*masks, *[NOT_TRAINED] * given, *choice.token_ids],
            logprobs=[*logprobs, *[NO_LOGPROB] * given, *sampled],
            metadata={"finish_reason": choice.finish_reason},
        )


def use_in_atropos() -> None:
    """Have `ServerManager.managed_server` make servers of this class."""
    server_manager.ManagedServer = RunManagedServer
