"""Draws of prompts: a number names an item of an environment's stream, the same in every worker.

A worker asks the trajectory server for numbers (POST /draws), advances its environment's stream to
each, and stamps the groups that come of it. The request also reports what became of earlier draws.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Number = Annotated[int, Meta(ge=0, lt=1 << 53)]
Name = Annotated[str, Meta(min_length=1, max_length=4096)]
ItemHash = Annotated[str, Meta(max_length=64)]

# What a worker reports of a draw that sends no group. A group that the server stores is no report:
# its record carries the draw.
Report = Literal["no_signal", "refused", "failed"]


class Draw(Struct, frozen=True):
    """`generation_params["draw"]` of a group: the draw that it came from."""

    stream: Name  # the environment's name in the run
    number: Number
    item: ItemHash = ""  # hash of the item


class Reported(Struct, frozen=True):
    number: Number
    outcome: Report


class Seen(Struct, frozen=True):
    """The hash of an item that a worker has drawn or skipped."""

    number: Number
    item: ItemHash


class DrawRequest(Struct, kw_only=True):
    """POST /draws. Sending one again, with the same `serial`, changes nothing."""

    stream: Name
    worker: Name  # this process: its successor has another name
    member: Name  # of which at most one process lives
    env_id: Annotated[int, Meta(ge=0, lt=1 << 31)]
    attempt: Annotated[int, Meta(ge=0)] = 0  # of the run; draws of earlier ones are returned
    serial: Number = 0  # of this worker's requests, rising
    want: Annotated[int, Meta(ge=0, le=4096)] = 0
    held: list[Number] = []  # draws that the worker has not finished
    reach: Number = 0  # the lowest number that its stream can still produce
    length: Annotated[int, Meta(ge=1)] | None = None  # items of an epoch; None: unknown
    reports: list[Reported] = []
    seen: list[Seen] = []


class DrawAnswer(Struct, kw_only=True):
    """The answer to POST /draws."""

    numbers: list[int]  # at most `want`, and those of an answer that was lost
    lowest: int = 0  # no lower number will be handed out


class PromptCounts(Struct, kw_only=True):
    """What became of an environment's draws; part of the trajectory server's status."""

    epoch: int | None  # of the next new prompt, from 0; None: its length is unknown
    drawn: int  # numbers that were handed out, at least once
    outstanding: int  # held by workers
    returned: int  # to be handed out again
    accepted: int = 0
    stale: int = 0  # accepted, and dropped before they were trained on
    no_signal: int = 0
    refused: int = 0
    failed: int = 0
    lost: int = 0
    ordered: bool = True  # False: the environment's order is not deterministic
