"""Generated bad requests to every route: each is refused by field, or was good."""

import copy
import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_parts import (
    LONGEST,
    NUMBERS,
    OTHERS,
    VOCABULARY,
    Server,
    statuses_of_good_requests,
    with_groups,
)
from trajectory_parts import group

from atropos_hpc.contracts.group import MAX_MAGNITUDE

GENERATED = int(os.environ.get("GENERATED_REQUESTS", "10000"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with with_groups(tmp_path_factory.mktemp("journal")) as made:
        yield made


def wrong_fields(value: Any) -> set[str]:
    """What of a group is wrong, by a plain reading of the schema; independent of the server's."""
    if not isinstance(value, dict):
        return {"body"}
    found = set()
    tokens = value.get("tokens")
    if (
        not _rows(tokens, lambda x: _whole(x) and 0 <= x < VOCABULARY)
        or not tokens
        or not all(0 < len(row) <= LONGEST for row in tokens)
    ):
        found.add("tokens")
        return found | {
            "tokens",
            "masks",
            "scores",
            "inference_logprobs",
        }  # what the others are compared with is wrong
    masks = value.get("masks")
    alike = _rows(masks, _whole) and [len(row) for row in masks] == [len(row) for row in tokens]
    pairs = (
        [
            pair
            for mask, row in zip(masks, tokens, strict=True)
            for pair in zip(mask, row, strict=True)
        ]
        if alike
        else []
    )
    if not alike or not (
        all(label in (-100, token) for label, token in pairs)
        or all(label in (-100, 1) for label, _ in pairs)
    ):
        found.add("masks")
    scores = value.get("scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, bool) or _bounded(score) for score in scores)
    ):
        found.add("scores")
    log_probs = value.get("inference_logprobs")
    if log_probs not in (None, []) and (
        not _rows(log_probs, _bounded)
        or [len(row) for row in log_probs] != [len(row) for row in tokens]
    ):
        found.add("inference_logprobs")
    return found


def _rows(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and all(good(x) for x in row) for row in value
    )


def _whole(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value == int(value)


def _bounded(value: Any) -> bool:
    try:
        return type(value) in (int, float) and abs(float(value)) <= MAX_MAGNITUDE
    except OverflowError:
        return False


ANYTHING = st.one_of(
    st.sampled_from([*NUMBERS, *OTHERS]),
    st.integers(-200, 1200),
    st.floats(),
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    ),
)


@st.composite
def changed_groups(draw: st.DrawFn) -> Any:
    """A group in which one to three things were replaced, taken away or doubled."""
    value: dict[str, Any] = group(
        draw(st.integers(900, 999)),
        sequences=draw(st.integers(1, 3)),
        length=draw(st.integers(3, 8)),
    )
    for _ in range(draw(st.integers(1, 3))):
        at: Any = value
        key: Any = draw(st.sampled_from(["tokens", "masks", "scores", "inference_logprobs"]))
        while isinstance(at[key], list) and at[key] and draw(st.integers(0, 3)):
            at, key = at[key], draw(st.integers(0, len(at[key]) - 1))
        match draw(st.integers(0, 5)):
            case 0 if isinstance(at, list):
                del at[key]
            case 1 if isinstance(at, list):
                at.insert(key, copy.deepcopy(at[key]))
            case _:
                at[key] = copy.deepcopy(draw(ANYTHING))  # it may be changed further
        if any(
            name not in value or not isinstance(value[name], list) or not value[name]
            for name in ("tokens", "masks", "scores")
        ):
            break
    return value


@st.composite
def changed_bytes(draw: st.DrawFn) -> tuple[bytes, bool]:
    """(body, gzipped): a good body, cut or with bytes replaced; or plain noise."""
    gzipped = draw(st.booleans())
    body = bytearray(json.dumps(group(draw(st.integers(900, 999)), sequences=2, length=4)).encode())
    body = bytearray(gzip.compress(bytes(body), 1)) if gzipped else body
    match draw(st.integers(0, 2)):
        case 0:
            del body[draw(st.integers(0, len(body) - 1)) :]
        case 1:
            for _ in range(draw(st.integers(1, 6))):
                body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
        case _:
            body = bytearray(draw(st.binary(max_size=200)))
    return bytes(body), gzipped


def profile(share: float) -> Any:
    checks = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ]
    return settings(
        max_examples=int(GENERATED * share),
        deadline=None,
        suppress_health_check=checks,
        database=None,
        derandomize=True,
    )


@pytest.mark.timeout(1200)
@profile(0.7)
@given(value=changed_groups(), many=st.booleans())
def test_generated_groups_are_refused_by_field_or_good(
    server: Server, value: Any, many: bool
) -> None:
    path, body = ("/scored_data_list", [value]) if many else ("/scored_data", value)
    if wrong := wrong_fields(value):
        detail = server.refuses("POST", path, body)
        assert any(field in detail for field in wrong) or "not JSON" in detail, (detail, wrong)
    else:
        status, text = server.call("POST", path, body)
        assert status == 200, (value, text)


@pytest.mark.timeout(600)
@profile(0.3)
@given(change=changed_bytes(), many=st.booleans())
def test_generated_bytes_never_harm(server: Server, change: tuple[bytes, bool], many: bool) -> None:
    body, gzipped = change
    before = server.state()
    headers = {"Content-Encoding": "gzip"} if gzipped else {}
    status, text = server.call(
        "POST", "/scored_data_list" if many else "/scored_data", body, headers
    )
    assert status in (200, 400, 413, 415, 422), (body, status, text)
    assert status == 200 or (server.state() == before and json.loads(text)["detail"]), body


def test_after_all_that_the_server_works_as_before(server: Server) -> None:
    assert statuses_of_good_requests(server) == [200, 200]
