"""Bodies of posted groups -> records, and records -> Atropos' JSON.

Environment workers post binary records. JSON is for unmodified Atropos clients; it is decoded
once, here.
"""

import json
import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import orjson

from atropos_hpc.contracts.group import (
    NOT_TRAINED,
    Limits,
    encode_group,
    free_form_of,
    read_group,
    verify_record,
)
from atropos_hpc.contracts.scored_group import (
    FREE_FORM_FIELDS,
    OPTIONAL_ARRAYS,
    RequestError,
    ScoredGroup,
    describe,
)
from atropos_hpc.contracts.wal_record import UNKNOWN, Record, header_at, scan

# Python's json takes 20 ms and 10 MB of memory per megabyte; larger bodies must be strict JSON.
MAX_LENIENT_BYTES = 8 << 20

_one = msgspec.json.Decoder(ScoredGroup)
_many = msgspec.json.Decoder(list[ScoredGroup])


def decode_records(body: bytes, limits: Limits) -> list[Record]:
    """Verify a body of binary group records. Raises RequestError: 400 if damaged, else 422."""
    records, end, view = [], 0, memoryview(body)
    for start, after, header in scan(view):
        records.append(verify_record(header, view[start:after], limits))
        end = after
    if end != len(body) or not records:
        raise RequestError(400, f"no intact group record at byte {end} of {len(body)}")
    return records


def decode_json(body: bytes, many: bool, limits: Limits) -> list[Record]:
    """Decode a JSON body: one group, or with `many` an array of groups. All or none.

    Equal groups in one body get different hashes: only a repeated body is a duplicate. Raises
    RequestError: 400 for a body that is not JSON, 422 with the field's name for the rest.
    """
    records = [encode_group(group, limits) for group in _parse(body, many)]
    seen: Counter[int] = Counter()
    for record in records:
        original = record.hash
        if seen[original]:
            record.disambiguate(seen[original])
        seen[original] += 1
    return records


def _parse(body: bytes, many: bool) -> list[ScoredGroup]:
    try:
        return _decode(body, many)
    except (msgspec.DecodeError, RecursionError) as error:
        if len(body) > MAX_LENIENT_BYTES:
            status = 422 if isinstance(error, msgspec.ValidationError) else 400
            raise RequestError(status, describe(error)) from None
    try:
        value = json.loads(body)
        groups = value if isinstance(value, list) else [value]
        strict = [_normalize(group) for group in groups]
        text = json.dumps(strict if isinstance(value, list) else strict[0]).encode()
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise RequestError(400, f"not JSON: {str(error)[:120]}") from None
    try:
        return _decode(text, many)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(422, describe(error)) from None


def _decode(body: bytes, many: bool) -> list[ScoredGroup]:
    return _many.decode(body) if many else [_one.decode(body)]


def _normalize(group: Any) -> Any:
    """Rewrite what Python clients send and strict JSON parsers refuse: 12.0 for 12, and NaN in
    arrays. A field that is NaN itself is refused: it is not the same as an absent one."""
    if isinstance(group, dict):
        for name, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(422, f"{name}: {value} is not a finite number")
    group = _without_nan(group)
    if isinstance(group, dict):
        for name in ("tokens", "masks"):
            group[name] = _whole(group.get(name))
    return group


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def to_json(record: bytes) -> bytes:
    """Encode a group record as the ScoredData JSON that Atropos' own API serves."""
    header = header_at(record, 0)
    group = read_group(record, 0, header)
    assert header is not None
    ends = np.cumsum(group.lengths)[:-1]
    value: dict[str, object] = dict.fromkeys((*OPTIONAL_ARRAYS, *FREE_FORM_FIELDS))
    for name in OPTIONAL_ARRAYS:
        if (array := getattr(group, name)) is not None:
            value[name] = np.split(array, ends)
    if header.meta_size:
        meta = free_form_of(record, header)
        free = msgspec.json.decode(meta, type=dict[str, msgspec.Raw])
        value |= {name: orjson.Fragment(bytes(raw)) for name, raw in free.items()}
    value["tokens"] = np.split(group.tokens, ends)
    value["masks"] = np.split(np.where(group.trained, group.tokens, np.int32(NOT_TRAINED)), ends)
    value["scores"] = group.scores
    value["env_id"] = None if group.env_id == UNKNOWN else group.env_id
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
