"""A group, and its binary record: encoding, validation, and reading without a copy.

Payload of a group's record, G sequences of N tokens in all:

    scores f64[G] | lengths u32[G] | tokens i32[N] | f32[N] per flag of OPTIONAL_ARRAYS
    | mask bits u8[ceil(N/8)] | JSON object of the free-form fields
    | with the flag SUPPORT: u32 size, and a `Support` of the N tokens, encoded in that many bytes

An environment worker encodes with `encode_group`. The trajectory server checks the record with
`verify_record` and journals the same payload. The learner maps it with `read_group`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from atropos_hpc.contracts.scored_group import (
    OPTIONAL_ARRAYS,
    SUPPORT,
    JsonObject,
    RequestError,
    ScoredGroup,
    check_free_form,
    draw_of,
    free_form_json,
)
from atropos_hpc.contracts.support import Support
from atropos_hpc.contracts.wal_record import (
    GROUP,
    HEADER_BYTES,
    UNKNOWN,
    Buffer,
    Header,
    Record,
    header_at,
)

NOT_TRAINED = -100  # Atropos' mask: the label of a token that no loss uses
UNLIMITED = 2**31 - 1
MAX_MAGNITUDE = 1e12  # of scores, advantages and log-probs: their squares, summed, fit float32


@dataclass(frozen=True)
class Limits:
    """What the learner can take."""

    vocabulary: int = UNLIMITED  # token ids are in [0, vocabulary)
    max_length: int = UNLIMITED  # tokens per sequence
    batch_size: int = UNLIMITED  # sequences


NO_LIMITS = Limits()


@dataclass
class Group:
    """The G sequences of one prompt, N tokens in all, one sequence after the other."""

    lengths: NDArray[np.uint32]  # [G], tokens of each sequence
    scores: NDArray[np.float64]  # [G]
    tokens: NDArray[np.int32]  # [N]
    trained: NDArray[np.bool_]  # [N], where Atropos' mask is not -100
    # [N], of the behaviour policy, nats; undefined where not trained
    inference_logprobs: NDArray[np.float32] | None = None
    advantages: NDArray[np.float32] | None = None  # [N], token-level, given by the environment
    ref_logprobs: NDArray[np.float32] | None = None  # [N], nats
    support: Support | None = None  # of the N tokens; None: all were sampled from the vocabulary
    overrides: list[JsonObject] | None = None  # [G]
    group_overrides: JsonObject | None = None
    generation_params: JsonObject | None = None
    env_id: int = UNKNOWN
    gid: int = UNKNOWN  # number in order of arrival

    @property
    def policy_versions(self) -> list[tuple[int, int] | None]:
        """Return (oldest, newest) policy version of each sequence's tokens, None where unknown."""
        versions = (self.generation_params or {}).get("policy_versions")
        if not versions:
            return [None] * len(self.lengths)
        return [tuple(v) if v else None for v in versions]

    @property
    def finish_reasons(self) -> list[str | None]:
        """Return why each sequence's generation ended, None where unknown.

        The key is not checked on arrival: an environment may use it for something of its own.
        """
        reasons = (self.generation_params or {}).get("finish_reasons")
        if not isinstance(reasons, list) or len(reasons) != len(self.lengths):
            return [None] * len(self.lengths)
        return [reason if isinstance(reason, str) else None for reason in reasons]


# --- encoding


def encode_group(group: ScoredGroup, limits: Limits = NO_LIMITS) -> Record:
    """Encode a group as a record. Raises RequestError (422), which names the field at fault."""
    lengths, tokens = _flatten(group.tokens, "tokens")
    if not lengths:
        raise RequestError(422, "tokens: an empty group")
    arrays = _Arrays(np.array(lengths, "<u4"), _scores(group.scores), tokens)
    _check_arrays(arrays, limits)
    arrays.optional = _optional(group, lengths)
    trained = _trained(group, lengths, tokens)
    support = group.support or b""
    if support:
        _check_support(support, tokens, limits)
        support = len(support).to_bytes(4, "little") + support
    meta, oldest = free_form_json(group), UNKNOWN
    if meta:
        oldest = check_free_form(meta, len(lengths))
    parts: tuple[Any, ...] = (
        arrays.scores.astype("<f8"),
        arrays.lengths,
        tokens.astype("<i4"),
        *arrays.optional.values(),
        np.packbits(trained),
        meta,
        support,
    )
    flags = sum(1 << OPTIONAL_ARRAYS.index(name) for name in arrays.optional)
    return Record(
        GROUP,
        b"".join(parts),
        flags=flags | (SUPPORT if support else 0),
        meta_size=len(meta),
        sequences=len(lengths),
        tokens=tokens.size,
        env_id=UNKNOWN if group.env_id is None else group.env_id,
        oldest=oldest,
        draw=draw_of(meta),
    )


def verify_record(header: Header, record: memoryview, limits: Limits) -> Record:
    """Check a group record that came over HTTP, and return it with the same payload.

    `header` is that of `header_at`, so both hashes are correct. Raises RequestError (422).
    """
    payload = bytes(record[HEADER_BYTES:])
    end = _meta_start(header) + header.meta_size
    support = _support_bytes(payload, end, header)
    spare = header.size - end - (4 + len(support) if header.flags & SUPPORT else 0)
    if header.kind != GROUP or header.flags >= SUPPORT << 1 or not 0 <= spare < 16:
        raise RequestError(422, "record: its header does not describe its payload")
    if header.sequences < 1:
        raise RequestError(422, "tokens: an empty group")
    arrays, at = _map_arrays(payload, 0, header)
    if int(arrays.lengths.sum(dtype=np.uint64)) != header.tokens:
        raise RequestError(422, "tokens: the lengths do not sum to the number of tokens")
    _check_arrays(arrays, limits)
    if header.flags & SUPPORT:
        _check_support(support, arrays.tokens, limits)
    at += (header.tokens + 7) // 8
    meta = payload[at : at + header.meta_size]
    return Record(
        GROUP,
        payload,
        flags=header.flags,
        meta_size=header.meta_size,
        sequences=header.sequences,
        tokens=header.tokens,
        env_id=max(UNKNOWN, header.env_id),
        oldest=check_free_form(meta, header.sequences) if meta else UNKNOWN,
        draw=draw_of(meta),
    )


def read_group(buffer: Buffer, start: int = 0, header: Header | None = None) -> Group:
    """Map the group recorded at `start` of `buffer`.

    The arrays are views of `buffer`, writable where it is; only `trained` is a copy. A caller that
    has the record's header passes it, which skips the hashes. Raises ValueError if no intact group
    is there.
    """
    header = header or header_at(buffer, start)
    if header is None or header.kind != GROUP:
        raise ValueError(f"no intact group at byte {start}")
    arrays, at = _map_arrays(buffer, start + HEADER_BYTES, header)
    bits = np.frombuffer(buffer, "u1", (header.tokens + 7) // 8, at)
    at += bits.nbytes
    meta = orjson.loads(bytes(buffer[at : at + header.meta_size])) if header.meta_size else {}
    support = None
    if header.flags & SUPPORT:
        encoded = _support_bytes(buffer, at + header.meta_size, header)
        support = Support.decode(encoded, header.tokens)
    return Group(
        arrays.lengths,
        arrays.scores,
        arrays.tokens,
        np.unpackbits(bits, count=header.tokens).view(bool),
        **arrays.optional,
        support=support,
        overrides=meta.get("overrides") or None,
        group_overrides=meta.get("group_overrides"),
        generation_params=meta.get("generation_params"),
        env_id=header.env_id,
        gid=header.gid,
    )


def free_form_of(record: Buffer, header: Header) -> bytes:
    """Return the JSON of a group record's free-form fields; empty if it has none."""
    at = HEADER_BYTES + _meta_start(header)
    return bytes(record[at : at + header.meta_size])


# --- arrays


@dataclass
class _Arrays:
    lengths: NDArray[Any]
    scores: NDArray[Any]
    tokens: NDArray[Any]
    optional: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def _meta_start(header: Header) -> int:
    """Return the offset in the payload at which the free-form fields begin."""
    arrays = 1 + (header.flags & (SUPPORT - 1)).bit_count()
    return 12 * header.sequences + 4 * header.tokens * arrays + (header.tokens + 7) // 8


def _support_bytes(buffer: Buffer, at: int, header: Header) -> bytes:
    """Return the encoded support at `at`; empty if the record has none."""
    if not header.flags & SUPPORT:
        return b""
    size = int.from_bytes(bytes(buffer[at : at + 4]), "little")
    return bytes(buffer[at + 4 : at + 4 + size])


def _map_arrays(buffer: Buffer, at: int, header: Header) -> tuple[_Arrays, int]:
    """Return views of the payload at `at`, and the offset behind them."""

    def take(dtype: str, count: int) -> NDArray[Any]:
        nonlocal at
        array = np.frombuffer(buffer, dtype, count, at)
        at += array.nbytes
        return array

    scores, lengths = take("<f8", header.sequences), take("<u4", header.sequences)
    arrays = _Arrays(lengths, scores, take("<i4", header.tokens))
    for bit, name in enumerate(OPTIONAL_ARRAYS):
        if header.flags >> bit & 1:
            arrays.optional[name] = take("<f4", header.tokens)
    return arrays, at


def _check_arrays(arrays: _Arrays, limits: Limits) -> None:
    """Check values. Raises RequestError (422)."""
    lengths, tokens = arrays.lengths, arrays.tokens
    if lengths.size > limits.batch_size:
        allowed = f"a batch has {limits.batch_size} (algorithm.batch_size): none can hold it"
        raise RequestError(422, f"tokens: a group of {lengths.size} sequences; {allowed}")
    if lengths.min() < 1:
        raise RequestError(422, f"tokens: sequence {int(lengths.argmin())} is empty")
    if (longest := int(lengths.max())) > limits.max_length:
        allowed = f"at most {limits.max_length} are allowed (model.max_length)"
        raise RequestError(422, f"tokens: a sequence has {longest} tokens; {allowed}")
    if tokens.min() < 0 or tokens.max() >= limits.vocabulary:
        found = f"found {tokens.min()} to {tokens.max()}"
        raise RequestError(422, f"tokens: ids must be in [0, {limits.vocabulary}), {found}")
    if arrays.scores.size != lengths.size:
        raise RequestError(422, f"scores: {arrays.scores.size} for {lengths.size} sequences")
    for name, array in {"scores": arrays.scores, **arrays.optional}.items():
        _bounded(array, name)


def _check_support(encoded: bytes, tokens: NDArray[Any], limits: Limits) -> None:
    """Check a support. Raises RequestError (422)."""
    try:
        support = Support.decode(encoded, tokens.size)
    except ValueError as error:
        raise RequestError(422, f"support: {error}") from None
    if support.ids.size and support.ids.max() >= limits.vocabulary:
        found = f"found {support.ids.max()}"
        raise RequestError(422, f"support: ids must be in [0, {limits.vocabulary}), {found}")
    if not support.contains(tokens).all():
        raise RequestError(422, "support: a token is not in its own support")


def _bounded(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Refuse what would make a loss or a gradient infinite, which are computed in float32."""
    if not np.isfinite(array).all():
        raise RequestError(422, f"{name}: NaN or Inf")
    if array.size and (largest := float(np.abs(array).max())) > MAX_MAGNITUDE:
        allowed = f"more than {MAX_MAGNITUDE:g} in magnitude is refused"
        raise RequestError(422, f"{name}: found {largest:g}; {allowed}")
    return array


def _trained(group: ScoredGroup, lengths: list[int], tokens: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which tokens are trained. Raises RequestError (422) for ambiguous masks."""
    mask_lengths, masks = _flatten(group.masks, "masks")
    if mask_lengths != lengths:
        raise RequestError(422, "masks: the lengths differ from those of tokens")
    trained: NDArray[np.bool_] = masks != NOT_TRAINED
    # 1 for every trained token, as Atropos' own tests write; a 0 among them could mean anything
    flags_only = bool(np.isin(masks, (NOT_TRAINED, 1)).all())
    if not flags_only and not ((masks == tokens) | ~trained).all():
        wanted = f"{NOT_TRAINED} or the token itself, or 1 for every token that is trained"
        raise RequestError(422, f"masks: each entry must be {wanted}")
    return trained


def _optional(group: ScoredGroup, lengths: list[int]) -> dict[str, NDArray[np.float32]]:
    found = {}
    for name in OPTIONAL_ARRAYS:
        rows = getattr(group, name)
        if rows is None or (hasattr(rows, "__len__") and len(rows) == 0):
            continue
        row_lengths, numbers = _flatten(rows, name, whole=False)
        if row_lengths != lengths:
            raise RequestError(422, f"{name}: the lengths differ from those of tokens")
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused
            found[name] = _bounded(numbers.astype("<f4"), name)
    return found


def _flatten(rows: Any, name: str, whole: bool = True) -> tuple[list[int], NDArray[Any]]:
    """Concatenate rows of numbers: their lengths, and a flat array."""
    try:
        arrays = [_array(row, name, whole) for row in rows]
    except TypeError:  # not iterable
        raise RequestError(422, f"{name}: an array of arrays of numbers is needed") from None
    flat = np.concatenate([array for array in arrays if array.size] or [np.zeros(0)])
    return [array.size for array in arrays], flat


def _scores(numbers: Any) -> NDArray[Any]:
    """Return scores as an array; booleans, of any library, are numbers."""
    if not isinstance(numbers, np.ndarray) and hasattr(numbers, "tolist"):
        numbers = numbers.tolist()
    with contextlib.suppress(ValueError, TypeError):
        array = np.asarray(numbers)
        numbers = array.astype("<f8") if array.dtype.kind == "b" else numbers
    return _array(numbers, "scores")


def _array(numbers: Any, name: str, whole: bool = False) -> NDArray[Any]:
    """Return a sequence of numbers (list, array or tensor) as an array of one dimension."""
    if not isinstance(numbers, (list, np.ndarray)) and hasattr(numbers, "tolist"):
        numbers = numbers.tolist()
    try:
        array = np.asarray(numbers)
    except (ValueError, OverflowError):  # rows of different lengths within a row
        array = np.zeros((0, 0))
    if array.ndim != 1 or isinstance(numbers, str):
        raise RequestError(422, f"{name}: an array of numbers is needed, nested no deeper")
    if array.size and (
        array.dtype.kind not in "iuf" or (whole and array.dtype.kind == "f" and _fractions(array))
    ):
        raise RequestError(422, f"{name}: not {'whole ' if whole else ''}numbers in range")
    return array


def _fractions(array: NDArray[Any]) -> bool:
    return not (np.isfinite(array).all() and (array == np.rint(array)).all())


def group_bytes(records: Sequence[Record]) -> bytes:
    """Encode records as one HTTP body of content type CONTENT_TYPE."""
    return b"".join(part for record in records for part in (record.header(), record.payload))
