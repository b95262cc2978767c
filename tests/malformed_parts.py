"""A trajectory server with some state for tests of bad requests, and values that are wrong."""

import copy
import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trajectory_parts import TOKEN, environment, group, registration, serving

from atropos_hpc.trajectories.service import Service

VOCABULARY, LONGEST = 1000, 64
NAN, INF = float("nan"), float("inf")
NUMBERS = [-1, 1.5, 2**31, 2**63, 2**64, 10**40, -(10**40), NAN, INF, -INF]
OTHERS: list[Any] = [None, True, "x", "", "1e5", [], {}, [[]], [1], {"a": 1}, [None], "\0", [[[1]]]]


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


@contextmanager
def with_groups(directory: Path) -> Iterator[Server]:
    """Start a server that has queued and leased groups."""
    with serving(directory) as (service, port):
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


def statuses_of_good_requests(server: Server) -> list[int]:
    """Send a group and lease a batch; return the statuses of the answers."""
    sent = server.call("POST", "/scored_data", group(800, env_id=0))[0]
    return [sent, server.call("GET", "/lease?batch=1&rank=0&world=1")[0]]
