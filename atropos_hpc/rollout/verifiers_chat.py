"""A harness for `verifiers`: the chat loop with tools, inside the environment worker's process.

The library's own `null` harness does the same in a process per rollout, which it first installs
packages for; a rollout node has no network, and importing them takes longer than most rollouts.
It is selected with the id `atropos_hpc_chat`.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from atropos_hpc.contracts.scored_group import JsonObject

__all__ = ["ID", "ChatHarness"]

ID = "atropos_hpc_chat"
CONNECT_S = 60.0  # to the tool servers
OVERFLOW = "exceeds maximum context length"  # in the answer to a prompt that is too long


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Sends the conversation, runs the tool calls of the reply, and repeats without any."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: vf.ModelContext, trace: vf.Trace, runtime: vf.Runtime, *more: Any
    ) -> vf.ProgramResult:
        """Hold the conversation of one task. The framework records it at `endpoint`."""
        endpoint, secret, mcp_urls, data = more  # in the order of the library's signature
        system, prompt = self.resolve_prompt(data)
        messages: list[JsonObject] = []
        if system:
            messages.append({"role": "system", "content": system})
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        specs = {
            name: {"url": url, "timeout": self.config.tool_timeout}
            for name, url in mcp_urls.items()
        }
        headers = {"Authorization": f"Bearer {secret}"}
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S)
        async with (
            AsyncExitStack() as stack,
            aiohttp.ClientSession(headers=headers, timeout=timeout) as http,
        ):
            async with asyncio.timeout(CONNECT_S):
                tools, dispatch, servers = await connect_mcp({"mcpServers": specs}, stack)
            body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
            while True:
                async with http.post(f"{endpoint}/chat/completions", json=body) as answer:
                    text = await answer.text()
                if answer.status != 200:
                    # A conversation that fills the context is complete, not failed.
                    return vf.ProgramResult(int(OVERFLOW not in text.lower()), "", text)
                reply = json.loads(text)["choices"][0]["message"]
                messages.append(reply)
                if not reply.get("tool_calls"):
                    return vf.ProgramResult(0, reply.get("content") or "", "")
                for call in reply["tool_calls"]:
                    content = await _result(call["function"], dispatch, servers)
                    result = {"role": "tool", "tool_call_id": call["id"], "content": content}
                    messages.append({**result, "name": call["function"]["name"]})


async def _result(function: JsonObject, dispatch: Any, servers: Any) -> Any:
    """Run one tool call. What is wrong with the call itself is told to the model."""
    name = function["name"]
    if name not in dispatch:
        return f"error: unknown tool {name!r}"
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except json.JSONDecodeError as error:
        return f"error: the arguments are not JSON: {error}"
    if not isinstance(arguments, dict):
        return "error: the arguments are not a JSON object"
    return await call_mcp(servers, dispatch, name, arguments)


# verifiers finds a plugin by importing a module of its id.
sys.modules.setdefault(ID, sys.modules[__name__])
