"""A group, in its three forms: the JSON that environments post, the record of the journal, and the learner's arrays.

`decode` validates JSON into records: whole number arrays go from the parser into numpy without one Python object per number.
`read_group` makes a record's bytes into a `Group` of views, copying nothing but the mask. `as_json` gives the JSON back, for
trainers that ask for it.

Payload of a record: scores f64[G] | lengths u32[G] | tokens i32[N] | f32[N] for each flag of FLOATS | mask bits u8[ceil(N/8)] |
JSON of the free-form fields.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from atropos_hpc.trajectories.wal_record import (
    GROUP,
    HEADER_BYTES,
    UNKNOWN,
    Buffer,
    Header,
    Record,
    header_at,
)

FLOATS = ("inference_logprobs", "advantages", "ref_logprobs")  # flag bit = 1 << index
FREE = (
    "messages",
    "generation_params",
    "overrides",
    "group_overrides",
    "images",
    "distill_token_ids",
    "distill_logprobs",
)
NOT_TRAINED = -100  # Atropos' mask: the label of a token that no loss touches
ANY_VOCABULARY = 2**31 - 1
ANY_LENGTH = 2**31 - 1
SLOW_BYTES = (
    8 << 20
)  # what Python's own json may be asked to parse: it takes 20 ms and 10 MB of memory per megabyte


class Refused(Exception):
    """A request that cannot be served. `status` is the HTTP status, the message is for whoever sent it."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Group:
    """The G sequences of one prompt, N tokens in all, one sequence after the other."""

    lengths: NDArray[np.uint32]  # [G], tokens of each sequence
    scores: NDArray[np.float64]  # [G]
    tokens: NDArray[np.int32]  # [N]
    trained: NDArray[np.bool_]  # [N], where Atropos' mask is not -100
    inference_logprobs: NDArray[np.float32] | None = (
        None  # [N], of the behaviour policy, nats; free where not trained
    )
    advantages: NDArray[np.float32] | None = None  # [N], token-level, given by the environment
    ref_logprobs: NDArray[np.float32] | None = None  # [N], nats
    overrides: list[dict[str, Any]] | None = None  # [G]
    group_overrides: dict[str, Any] | None = None
    generation_params: dict[str, Any] | None = None
    env_id: int = UNKNOWN
    gid: int = UNKNOWN  # number in order of arrival

    @property
    def policy_versions(self) -> list[tuple[int, int] | None]:
        """(oldest, newest) policy version behind each sequence's tokens; None where the environment did not tell."""
        versions = (self.generation_params or {}).get("policy_versions")
        return (
            [tuple(v) if v else None for v in versions] if versions else [None] * len(self.lengths)
        )


def read_group(buffer: Buffer, start: int = 0, header: Header | None = None) -> Group:
    """The group recorded at `start` of `buffer`. Arrays are views into `buffer` (writable where it is), except `trained`.

    `header` spares the check, where the caller has done it. Raises ValueError if no intact group lies there.
    """
    header = header or header_at(buffer, start)
    if header is None or header.kind != GROUP:
        raise ValueError(f"no intact group at byte {start}")
    at = start + HEADER_BYTES

    def take(dtype: str, count: int) -> NDArray[Any]:
        nonlocal at
        array = np.frombuffer(buffer, dtype, count, at)
        at += array.nbytes
        return array

    scores, lengths, tokens = (
        take("<f8", header.sequences),
        take("<u4", header.sequences),
        take("<i4", header.tokens),
    )
    floats = {
        name: take("<f4", header.tokens)
        for bit, name in enumerate(FLOATS)
        if header.flags >> bit & 1
    }
    trained = np.unpackbits(take("u1", (header.tokens + 7) // 8), count=header.tokens).view(bool)
    free = orjson.loads(bytes(buffer[at : at + header.meta_size])) if header.meta_size else {}
    return Group(
        lengths,
        scores,
        tokens,
        trained,
        **floats,
        overrides=free.get("overrides") or None,
        group_overrides=free.get("group_overrides"),
        generation_params=free.get("generation_params"),
        env_id=header.env_id,
        gid=header.gid,
    )


def as_json(record: bytes) -> bytes:
    """A recorded group as the ScoredData JSON that Atropos' own API serves."""
    header = header_at(record, 0)
    group = read_group(record, 0, header)
    assert header is not None
    ends = np.cumsum(group.lengths)[:-1]
    value: dict[str, Any] = dict.fromkeys((*FLOATS, *FREE))
    value |= {
        name: np.split(array, ends)
        for name in FLOATS
        if (array := getattr(group, name)) is not None
    }
    if header.meta_size:
        at = HEADER_BYTES + _meta_start(header)
        free = msgspec.json.decode(record[at : at + header.meta_size], type=dict[str, msgspec.Raw])
        value |= {name: orjson.Fragment(bytes(raw)) for name, raw in free.items()}
    value["tokens"] = np.split(group.tokens, ends)
    value["masks"] = np.split(np.where(group.trained, group.tokens, np.int32(NOT_TRAINED)), ends)
    value["scores"] = group.scores
    value["env_id"] = None if group.env_id == UNKNOWN else group.env_id
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _meta_start(record: Header | Record) -> int:
    """Where in a group's payload the JSON of the free-form fields begins."""
    return (
        12 * record.sequences
        + 4 * record.tokens * (1 + record.flags.bit_count())
        + (record.tokens + 7) // 8
    )


def decode(
    body: bytes, many: bool, vocabulary: int = ANY_VOCABULARY, max_length: int = ANY_LENGTH
) -> list[Record]:
    """The groups of a posted body: one object, or with `many` an array of them. All or none.

    Token ids must be in [0, vocabulary), sequences at most `max_length` tokens long. Equal groups of one body are told apart: it is
    bodies that are sent again. Raises Refused: 422 with the field's name, 400 for what is not JSON. Nothing else is ever raised,
    whatever the body.
    """
    records = _decode(body, many, vocabulary, max_length)
    seen: Counter[int] = Counter()
    for record in records:
        first = record.hash
        if seen[first]:
            record.tell_apart(seen[first])
        seen[first] += 1
    return records


def _decode(body: bytes, many: bool, vocabulary: int, max_length: int) -> list[Record]:
    global _parser
    try:
        document = _parser.parse(body)
        try:
            records = [_record(item, vocabulary, max_length) for item in _items(document, many)]
            brackets = np.count_nonzero(
                np.frombuffer(body, np.uint8) == ord("[")
            )  # a tenth of the time of bytes.count
            _refuse_nesting(document if many else [document], records, int(brackets), many)
            return records
        finally:
            document = None  # the parser is used again only when nothing points into it
    except Refused:
        _parser = simdjson.Parser()  # the traceback may hold parts of the document
        raise
    except Exception as error:  # the parser's errors have no common class
        _parser = simdjson.Parser()
        if len(body) > SLOW_BYTES:
            raise Refused(
                400,
                f"not JSON: {str(error)[:120]} (NaN and Infinity are read in bodies up to {SLOW_BYTES} bytes)",
            ) from None
        return _decode_slowly(body, many, vocabulary, max_length)


_parser = simdjson.Parser()


def _decode_slowly(body: bytes, many: bool, vocabulary: int, max_length: int) -> list[Record]:
    """Python clients write NaN, Infinity and integers over 64 bits, which fast parsers refuse wherever they stand."""
    try:
        return [_record(item, vocabulary, max_length) for item in _items(json.loads(body), many)]
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise Refused(400, f"not JSON: {str(error)[:120]}") from None


def from_python(
    group: dict[str, Any], vocabulary: int = ANY_VOCABULARY, max_length: int = ANY_LENGTH
) -> Record:
    """`decode` for one group that is already parsed. Raises Refused."""
    return _record(group, vocabulary, max_length)


def _items(document: Any, many: bool) -> Sequence[Any]:
    if isinstance(document, (list, simdjson.Array)) != many:
        raise Refused(
            422,
            "body: an array of groups is needed"
            if many
            else "body: one group is needed, as an object",
        )
    return document if many else [document]


def _record(value: Any, vocabulary: int, max_length: int) -> Record:
    """One parsed group, validated. Every check on tokens is one numpy operation."""
    if not isinstance(value, (dict, simdjson.Object)):
        raise Refused(422, "body: a group is an object")
    for name in ("tokens", "masks", "scores"):
        if value.get(name) is None:
            raise Refused(422, f"{name}: missing")
    lengths, tokens = _rows(value["tokens"], "tokens", "i")
    if not lengths:
        raise Refused(422, "tokens: an empty group")
    if min(lengths) < 1:
        raise Refused(422, f"tokens: sequence {lengths.index(0)} is empty")
    if max(lengths) > max_length:
        raise Refused(
            422,
            f"tokens: a sequence of {max(lengths)} tokens, at most {max_length} are allowed (model.max_length)",
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise Refused(
            422, f"tokens: ids must be in [0, {vocabulary}), found {tokens.min()} to {tokens.max()}"
        )
    mask_lengths, masks = _rows(value["masks"], "masks", "i")
    if mask_lengths != lengths:
        raise Refused(422, "masks: lengths differ from those of tokens")
    trained = masks != NOT_TRAINED
    if not ((masks == tokens) | ~trained).all() and not _all_flags(masks):
        raise Refused(
            422,
            f"masks: each must be {NOT_TRAINED} or the token itself (or, for every token that is trained, 1)",
        )
    scores = _numbers(value["scores"], "scores")
    if scores.size != len(lengths):
        raise Refused(422, f"scores: {scores.size} for {len(lengths)} sequences")
    if not np.isfinite(scores).all():
        raise Refused(422, "scores: NaN or Inf")
    flags, floats = 0, []
    for bit, name in enumerate(FLOATS):
        given = value.get(name)
        if given is None or (isinstance(given, (list, simdjson.Array)) and len(given) == 0):
            continue
        float_lengths, numbers = _rows(given, name, "d")
        if float_lengths != lengths:
            raise Refused(422, f"{name}: lengths differ from those of tokens")
        with np.errstate(over="ignore"):
            numbers = numbers.astype("<f4")
        if not np.isfinite(numbers).all():
            raise Refused(422, f"{name}: NaN or Inf")
        flags |= 1 << bit
        floats.append(numbers)
    env_id = value.get("env_id")
    if env_id is not None and (type(env_id) is not int or not 0 <= env_id < 2**31):
        raise Refused(422, "env_id: not an id")
    oldest = _check_free(value, len(lengths))
    meta = _free_json(value)
    parts: tuple[Any, ...] = (
        scores,
        np.array(lengths, "<u4"),
        tokens.astype("<i4"),
        *floats,
        np.packbits(trained),
        meta,
    )
    return Record(
        GROUP,
        b"".join(parts),
        flags=flags,
        meta_size=len(meta),
        sequences=len(lengths),
        tokens=tokens.size,
        env_id=UNKNOWN if env_id is None else env_id,
        oldest=oldest,
    )


def _all_flags(masks: NDArray[Any]) -> bool:
    """Is 1 written for every token that is trained, as Atropos' own tests do? With a 0 among them, it could mean anything."""
    return bool(np.isin(masks, (NOT_TRAINED, 1)).all())


def _rows(value: Any, name: str, kind: Literal["i", "d"]) -> tuple[list[int], NDArray[Any]]:
    """An array of arrays of numbers -> (row lengths, flat i64 or f64). `kind`: "i" or "d"."""
    dtype = np.int64 if kind == "i" else np.float64
    if not isinstance(value, (list, simdjson.Array)):
        raise Refused(422, f"{name}: an array of arrays of numbers is needed")
    rows: list[Any] = list(value)
    if not all(isinstance(row, type(value)) for row in rows):
        raise Refused(422, f"{name}: an array of arrays of numbers is needed")
    lengths = [len(row) for row in rows]
    if isinstance(value, simdjson.Array):
        flat = _buffer(value, name, kind)
    else:
        elements = [x for row in rows for x in row]
        if kind == "i":  # 12.0 where 12 was meant
            elements = [int(x) if type(x) is float and x.is_integer() else x for x in elements]
        if any(type(x) is not int and (kind == "i" or type(x) is not float) for x in elements):
            raise Refused(422, f"{name}: not {'whole ' if kind == 'i' else ''}numbers")
        try:
            flat = np.array(elements, dtype)
        except OverflowError:
            raise Refused(422, f"{name}: numbers out of range") from None
    if sum(lengths) != flat.size:
        raise Refused(422, f"{name}: an array of arrays of numbers is needed")
    return lengths, flat


def _buffer(value: simdjson.Array, name: str, kind: Literal["i", "d"]) -> NDArray[Any]:
    """All numbers in a (nested) array, in order, without a Python object for each."""
    try:
        return np.frombuffer(value.as_buffer(of_type=kind), np.int64 if kind == "i" else np.float64)
    except (TypeError, ValueError, OverflowError):
        if kind == "i":  # 12.0 where 12 was meant
            numbers = _buffer(value, name, "d")
            if (numbers == np.rint(numbers)).all() and (np.abs(numbers) < 2**31).all():
                return numbers.astype(np.int64)
        raise Refused(422, f"{name}: not {'whole ' if kind == 'i' else ''}numbers") from None


def _numbers(value: Any, name: str) -> NDArray[np.float64]:
    if isinstance(value, simdjson.Array):
        if any(isinstance(x, simdjson.Array) for x in value):
            raise Refused(422, f"{name}: nested too deeply")
        return _buffer(value, name, "d")
    if not isinstance(value, list) or any(type(x) not in (int, float) for x in value):
        raise Refused(422, f"{name}: an array of numbers is needed")
    try:
        return np.array(value, np.float64)
    except OverflowError:
        raise Refused(422, f"{name}: numbers out of range") from None


def _refuse_nesting(values: Any, records: list[Record], brackets: int, many: bool) -> None:
    """`_buffer` flattens at any depth, so [1, [2]] would pass for [1, 2]: count the brackets, all at once, then field by field."""
    expected = int(many)
    for record in records:
        rows = 2 + record.flags.bit_count()
        expected += (
            rows * (1 + record.sequences) + 1 + record.payload.count(b"[", _meta_start(record))
        )
    if brackets == expected:
        return
    for value, record in zip(values, records, strict=True):
        for name in ("tokens", "masks", *FLOATS):
            given = value.get(name)
            if given is not None and len(given) and given.mini.count(b"[") != 1 + record.sequences:
                raise Refused(422, f"{name}: nested too deeply")


def _check_free(value: Any, sequences: int) -> int:
    """Check what the learner will read of the free-form fields. Returns the group's oldest policy version, or UNKNOWN."""
    for name in ("generation_params", "group_overrides"):
        if not isinstance(value.get(name), (dict, simdjson.Object, type(None))):
            raise Refused(422, f"{name}: an object is needed")
    overrides = value.get("overrides")
    if overrides is not None:
        if not isinstance(overrides, (list, simdjson.Array)) or not all(
            isinstance(x, (dict, simdjson.Object)) for x in overrides
        ):
            raise Refused(422, "overrides: an array of objects is needed")
        if len(overrides) not in (0, sequences):
            raise Refused(422, f"overrides: {len(overrides)} for {sequences} sequences")
    _check_messages(value.get("messages"))
    for name in ("distill_token_ids", "distill_logprobs"):
        given = value.get(name)
        if given is not None and not (
            isinstance(given, (list, simdjson.Array)) and len(given) == sequences
        ):
            raise Refused(422, f"{name}: an array with one entry for each sequence is needed")
    versions = (value.get("generation_params") or {}).get("policy_versions")
    if versions is None:
        return UNKNOWN
    versions = versions.as_list() if isinstance(versions, simdjson.Array) else versions
    if (
        not isinstance(versions, list)
        or len(versions) != sequences
        or not all(v is None or _is_range(v) for v in versions)
    ):
        raise Refused(
            422, "generation_params.policy_versions: [oldest, newest] or null for each sequence"
        )
    return min((v[0] for v in versions if v is not None), default=UNKNOWN)


def _check_messages(conversations: Any) -> None:
    """As Atropos does: arrays of messages, each with a role and a content; what else a message has is its own affair."""
    if conversations is None:
        return
    arrays = (list, simdjson.Array)
    if not isinstance(conversations, arrays) or not all(
        isinstance(messages, arrays) for messages in conversations
    ):
        raise Refused(422, "messages: an array of arrays of messages is needed")
    for message in itertools.chain.from_iterable(conversations):  # type: ignore[arg-type]  # the parser's arrays can be gone through
        if not isinstance(message, (dict, simdjson.Object)):
            raise Refused(422, "messages: a message is an object")
        for name in ("role", "content"):
            if name not in message:
                raise Refused(422, f"messages: a message without {name}")


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(x) is int for x in value)
        and 0 <= value[0] <= value[1] < 2**31
    )


def _free_json(value: Any) -> bytes:
    """The free-form fields as one JSON object, b"" if there are none. NaN and Infinity become null, as JSON has neither."""
    parts = []
    for name in FREE:
        field = value.get(name)
        if field is None:
            continue
        if isinstance(field, (simdjson.Object, simdjson.Array)):
            text: Any = field.mini  # bytes, though its stub says str
        else:
            text = json.dumps(_without_nan(field)).encode()
            try:
                orjson.loads(text)
            except ValueError as error:  # lone surrogates, and depths that readers will refuse
                raise Refused(422, f"{name}: {error}") from None
        parts.append(b'"%s":%s' % (name.encode(), text))
    return b"{" + b",".join(parts) + b"}" if parts else b""


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value
