"""Bad requests of many kinds to every route, listed and generated.

Each gets a 4xx that names what is wrong, and changes nothing.
"""

import copy
import gzip
import http.client
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trajectory_parts import TOKEN, environment, group, registration, serving

from atropos_hpc.contracts.group import MAX_MAGNITUDE
from atropos_hpc.trajectories.service import Service

GENERATED = int(os.environ.get("GENERATED_REQUESTS", "10000"))
VOCABULARY, LONGEST = 1000, 64
NAN, INF = float("nan"), float("inf")
NUMBERS = [-1, 1.5, 2**31, 2**63, 2**64, 10**40, -(10**40), NAN, INF, -INF]
OTHERS: list[Any] = [None, True, "x", "", "1e5", [], {}, [[]], [1], {"a": 1}, [None], "\0", [[[1]]]]
NOT_JSON = [
    b"", b" ", b"{", b"}", b"[", b"nonsense", b"\xff\xfe", b"\0", b"'single'", b"{'a': 1}",
    b'{"a" 1}', b'{"a": }', b"{]", b"[}", b"[1,]", b'{"a": 1,}', b"NaN NaN", b"tru", b'"unfinished',
    b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 5000, b"{" * 5000, b"01", b"1.", b"--1", b'"\\ud800',
    b"\x80abc", b"<html></html>", b"a=1&b=2", b"//comment", b"/* */ {}", b"undefined", b"None",
    b"+1", b"0x10", b".5", b"\\",
]  # fmt: skip
WRONG_WHOLES = [
    b"null",
    b"true",
    b"3",
    b"-1.5",
    b'"text"',
    b"[]",
    b"[1]",
    b"[null]",
    b'["x"]',
    b"[[]]",
    b"[[1, 2], [3]]",
    b"[true]",
]


class Server:
    """A service with some state, and a connection to it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port = service, port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(
            method, path, data, {"Authorization": f"Bearer {TOKEN}"} | (headers or {})
        )
        response = self.connection.getresponse()
        text = response.read().decode(errors="replace")
        return response.status, text

    def state(self) -> Any:
        """All that a rejected request must not change."""
        state, journal = self.service.state, self.service.journal
        presence = self.service.pacing.presence.items()
        seen = {env_id: (p.in_flight, p.delivered) for env_id, p in presence}
        return copy.deepcopy(
            (state.snapshot(), list(state.known), seen, journal._tail, state.repeated)
        )

    def refuses(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> str:
        """Check that a request is rejected and changes nothing; return the detail."""
        before = self.state()
        status, text = self.call(method, path, body, headers)
        assert 400 <= status < 500 and status not in (401, 404), (
            method,
            path,
            str(body)[:300],
            status,
            text[:300],
        )
        assert self.state() == before, (method, path, str(body)[:300])
        return str(json.loads(text)["detail"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("journal")) as (service, port):
        made = Server(service, port)
        made.call(
            "POST", "/register", registration(8, vocab_size=VOCABULARY, max_token_len=LONGEST)
        )
        assert made.call("GET", "/lease?batch=0&rank=0&world=1")[0] == 204
        assert made.call("POST", "/register-env", environment())[0] == 200
        for number in range(5):
            assert made.call("POST", "/scored_data", group(number, env_id=0))[0] == 200
        assert made.call("GET", "/lease?batch=0&rank=0&world=1")[0] == 200
        yield made


# --- of each kind, to each route

REQUESTS: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/register"): registration(8, vocab_size=5),
    ("POST", "/register-env"): environment() | {"min_batch_allocation": 0.5, "member": "m"},
    ("GET", "/status-env"): {"env_id": 0, "in_flight": 3},
    ("POST", "/disconnect-env"): {"env_id": 0, "in_flight": 3},
    ("POST", "/scored_data"): group(700, version=0)
    | {"env_id": 0, "overrides": [{}] * 4, "group_overrides": {}, "messages": []},
}
LENIENT = {"save_checkpoint_interval", "num_steps"}  # of no consequence here: any whole number


def wrong_values(route: str, field: str, good: Any) -> list[Any]:
    """Values that are certainly wrong for a field that is good with `good`."""
    if isinstance(good, str):
        return [3, 1.5, True, [], {}, ["x"], "x" * 5000]
    if isinstance(good, float):
        return ["x", [], {}, [1], -1.0, 10**40, True]
    if isinstance(good, int):
        wrong = ["x", 1.5, [], {}, [1], 10**40]
        return wrong if field in LENIENT else [*wrong, -1, 2**31, 2**63, -(10**40)]
    wrong = [3, "x", True, 1.5, [3], ["x"], {"a": 1}]
    return [value for value in wrong if type(value) is not type(good) or value == [3]]


def bodies(method: str, route: str) -> list[tuple[Any, str]]:
    """(body, what the refusal has to name); at least 60 kinds."""
    good = REQUESTS[method, route]
    kinds: list[tuple[Any, str]] = [(body, "") for body in (*NOT_JSON, *WRONG_WHOLES)]
    for field, value in good.items():
        if field != "generation_params":
            kinds += [
                ({**good, field: wrong}, field) for wrong in wrong_values(route, field, value)
            ]
    for field in (
        "batch_size",
        "max_token_len",
        "max_token_length",
        "env_id",
        "tokens",
        "masks",
        "scores",
    ):
        if field in good and not (field == "env_id" and route == "/scored_data"):
            kinds.append(({name: value for name, value in good.items() if name != field}, field))
            kinds.append(({**good, field: None}, field))
    return kinds


@pytest.mark.parametrize(("method", "route"), REQUESTS)
def test_sixty_kinds_of_bad_bodies_to_each_route(server: Server, method: str, route: str) -> None:
    kinds = bodies(method, route)
    assert len(kinds) >= 60
    for body, named in kinds:
        assert named in server.refuses(method, route, body), (body, named)
    if route == "/scored_data":
        for body, named in kinds:
            many = b"[" + body + b"]" if isinstance(body, bytes) else [group(701), body]
            if body not in (b"", b" "):
                assert named in server.refuses("POST", "/scored_data_list", many), (many, named)


def test_sixty_kinds_of_bad_queries(server: Server) -> None:
    wrong = [
        "",
        "x",
        "-1",
        "1.5",
        "1e3",
        "NaN",
        "inf",
        "99999999999999999999",
        "0x1",
        "null",
        "%00",
        "%ff",
        "1%202",
        "true",
        "[1]",
        "--1",
    ]
    good = {"batch": "0", "rank": "0", "world": "1", "oldest": "0", "version": "0", "wait": "0"}
    whole = {"1e3"}  # a whole number all the same
    for name in good:
        for value in wrong:
            if value not in whole and (name, value) != ("wait", "1.5"):
                query = "&".join(
                    f"{key}={value if key == name else known}" for key, known in good.items()
                )
                assert name in server.refuses("GET", f"/lease?{query}")
    for query, named in (
        ("", "batch"),
        ("rank=0&world=1", "batch"),
        ("batch=0&rank=0", "world"),
        ("batch=0&world=1", "rank"),
        ("batch=0&rank=1&world=1", "rank"),
        ("batch=0&rank=0&world=0", "world"),
        ("batch=7&rank=0&world=1", "batch"),
        ("batch=0&rank=0&world=99999999", "world"),
    ):
        assert named in server.refuses("GET", f"/lease?{query}")
    for value in {*wrong, "1", "77"} - whole:
        assert "batch" in server.refuses("POST", f"/ack?batch={value}")
    assert "batch" in server.refuses("POST", "/ack")


def test_other_methods_and_encodings_are_refused_on_every_route(server: Server) -> None:
    bodiless = [
        ("GET", path)
        for path in (
            "/",
            "/health",
            "/info",
            "/wandb_info",
            "/status",
            "/latest_example",
            "/batch",
            "/reset_data",
        )
    ]
    for method, route in (
        *REQUESTS,
        *bodiless,
        ("GET", "/lease"),
        ("POST", "/ack"),
        ("POST", "/scored_data_list"),
    ):
        for other in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"} - {method}:
            assert route in server.refuses(other, route)
    for method, route in (*REQUESTS, ("POST", "/scored_data_list")):
        for encoding in ("br", "deflate", "zstd", "gzip", "compress", "gzip, gzip", "x"):
            assert encoding.split(",")[0] in server.refuses(
                method, route, b"{}", {"Content-Encoding": encoding}
            )


# --- generated


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


def test_after_all_that_the_server_works_as_before(tmp_path: Path, server: Server) -> None:
    assert server.call("POST", "/scored_data", group(800, env_id=0))[0] == 200
    assert server.call("GET", "/lease?batch=1&rank=0&world=1")[0] == 200
