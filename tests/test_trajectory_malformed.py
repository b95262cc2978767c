"""Bad requests of many kinds: each gets a 4xx that names what is wrong, and changes nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
from malformed_parts import Server, statuses_of_good_requests, with_groups
from trajectory_parts import environment, group, registration

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with with_groups(tmp_path_factory.mktemp("journal")) as made:
        yield made


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


def test_after_all_that_the_server_works_as_before(server: Server) -> None:
    assert statuses_of_good_requests(server) == [200, 200]
