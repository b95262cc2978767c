"""Answers that a stopped run was generating: a file of partial/ per request."""

from msgspec import Struct


class SavedSample(Struct, array_like=True):
    """What there was of one sample. Arrays, because there are thousands of tokens."""

    token_ids: list[int]
    log_probs: list[float]  # nats
    versions: list[tuple[str, int, int]]  # label of the weights, first token, end
    sampling_mask: list[list[int]] | None
    text: str | None
    finish_reason: str | None  # None: unfinished
    stop_reason: int | str | None


class SavedAnswer(Struct, array_like=True):
    """What there was of the answer to one request."""

    samples: list[SavedSample]
