"""Binary group records: what a worker posts is what the journal holds and the learner maps."""

import json
from typing import Any

import numpy as np
import pytest
from trajectory_parts import Http, group, numbers, with_service

from atropos_hpc.contracts.group import Limits, encode_group, group_bytes
from atropos_hpc.contracts.scored_group import RequestError, ScoredGroup
from atropos_hpc.contracts.wal_record import CONTENT_TYPE, HEADER_BYTES, Record, header_at
from atropos_hpc.trajectories.decode import decode_json, decode_records

LIMITS = Limits(vocabulary=1000, max_length=64)
SEQUENCES, LENGTH = 4, 6
SCORES, LENGTHS, TOKENS = 0, 8 * SEQUENCES, 12 * SEQUENCES  # offsets in the payload
LOGPROBS = TOKENS + 4 * SEQUENCES * LENGTH
META = LOGPROBS + 4 * SEQUENCES * LENGTH + SEQUENCES * LENGTH // 8


def record(number: int = 1, **more: Any) -> Record:
    return encode_group(ScoredGroup.from_python(group(number, SEQUENCES, LENGTH, **more)))


def changed(at: int, value: Any, dtype: str) -> bytes:
    """A record with correct hashes whose payload was changed."""
    sent = record()
    payload = bytearray(sent.payload)
    payload[at : at + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()
    sent.payload = bytes(payload)
    sent.__post_init__()
    return sent.to_bytes()


async def post(http: Http, body: bytes) -> tuple[int, bytes]:
    return await http.raw("POST", "/scored_data_list", body, {"Content-Type": CONTENT_TYPE})


def test_the_payload_that_was_posted_is_leased(tmp_path: Any) -> None:
    sent = [record(1, version=3), record(2)]

    async def story(http: Http) -> None:
        await http.start(8)
        status, answer = await post(http, group_bytes(sent))
        assert (status, json.loads(answer)) == (200, {"status": "received", "groups_processed": 2})
        _, leased = await http.raw("GET", "/lease?batch=0&rank=0&world=1")
        first = header_at(leased, 0)
        assert first is not None and first.oldest == 3
        assert leased[HEADER_BYTES : HEADER_BYTES + first.size] == sent[0].payload
        groups = await http.lease(0)
        assert groups is not None and numbers(groups) == [1, 2]
        assert (await post(http, group_bytes(sent)))[0] == 200  # repeated
        assert (await http.get("/status"))["repeated"] == 2

    with_service(tmp_path, story)


def test_json_and_record_of_a_group_are_the_same() -> None:
    value = group(7, version=2, advantages=[[0.5] * 6] * 4, env_id=3)
    (from_json,) = decode_json(json.dumps(value).encode(), False, LIMITS)
    (verified,) = decode_records(from_json.to_bytes(), LIMITS)
    assert verified == from_json


@pytest.mark.parametrize(
    ("at", "value", "dtype", "field"),
    [
        (SCORES, np.nan, "<f8", "scores"),
        (LENGTHS, 5, "<u4", "tokens"),
        (LENGTHS, 2**32 - 1, "<u4", "tokens"),
        (TOKENS, -1, "<i4", "tokens"),
        (TOKENS, 1000, "<i4", "tokens"),
        (LOGPROBS, np.inf, "<f4", "inference_logprobs"),
        (META, ord("x"), "u1", "free-form"),
        (META + 1, ord("x"), "u1", "free-form"),
    ],
)
def test_values_are_checked(at: int, value: Any, dtype: str, field: str) -> None:
    with pytest.raises(RequestError, match=field) as refused:
        decode_records(changed(at, value, dtype), LIMITS)
    assert refused.value.status == 422


@pytest.mark.parametrize(
    "change",
    [
        {"flags": 3},
        {"flags": 8},
        {"meta_size": 0},
        {"meta_size": 10**6},
        {"sequences": 5},
        {"sequences": 0},
        {"tokens": 23},
        {"tokens": 2**31},
        {"kind": 2},
    ],
)
def test_a_header_must_describe_its_payload(change: dict[str, int]) -> None:
    sent = record()
    for name, value in change.items():
        setattr(sent, name, value)
    with pytest.raises(RequestError) as refused:
        decode_records(sent.to_bytes(), LIMITS)
    assert refused.value.status == 422


def test_the_oldest_version_is_taken_from_the_stamps_and_not_from_the_header() -> None:
    sent = record(version=3)
    sent.oldest = 99
    assert decode_records(sent.to_bytes(), LIMITS)[0].oldest == 3


def test_damage_at_any_byte_is_refused(tmp_path: Any) -> None:
    whole = record().to_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        with pytest.raises(RequestError) as refused:
            decode_records(bytes(damaged), LIMITS)
        assert refused.value.status == 400
    for body in (b"", whole[:-1], whole + b"x", whole + whole[:50]):
        with pytest.raises(RequestError):
            decode_records(body, LIMITS)
