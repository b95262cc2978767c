"""Compare the trajectory server with Atropos' run-api, on the same groups, in one run.

(a) Push and pull: groups of 8 x 2048 tokens are posted and pulled in batches of 64 sequences, in
    three ways: as each server's own workers post them (JSON to run-api, binary records to this
    server), as JSON to both, and as gzipped JSON to both. The unit is sequences per CPU second of
    the server's process; the client's time does not count. This server checks the token and
    syncs each group to disk (fdatasync) before it
    answers; batches are pulled by /lease, as the learner does. Rounds of the two servers alternate
    and the best round counts: other work on the machine takes caches and memory bandwidth and only
    makes CPU time longer. The median of the rounds' ratios, and their range, are given as well.
(b) /status-env and /status with 5000 groups in the queue, which every environment polls ten times
    per second: milliseconds as its client sees them.
(c) Memory per queued group of 8 x 2048: growth of the server's resident set.
(d) The wait of other requests while a batch of 1024 sequences is pulled: /status is requested
    without pause meanwhile. Milliseconds.

run-api runs in the rollout environment, this server in the one that runs the bench.
"""

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atropos_hpc.contracts.wal_record import CONTENT_TYPE
from bench.parts.trajectory_servers import (
    LENGTH,
    SEQUENCES,
    Server,
    body,
    numbered,
    own_server,
    record,
    run_api,
)
from bench.result import Result

BATCH = 64  # sequences
ROUNDS = 9
GROUPS = {"run-api": 16, "ours": 128}  # pushed and pulled per round
GZIP_LEVEL = 9  # as Atropos' environments do it
DEPTH = 5000
QUEUED = {"run-api": 100, "ours": 4000}  # groups over which memory is taken
LARGE_BATCH = 1024
STATUS_CALLS = 200
NO_SPREAD = {"median": "", "least": "", "greatest": ""}
PULL = """
import http.client, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=300)
start = time.time()
connection.request("GET", sys.argv[2], headers={"Authorization": "Bearer " + sys.stdin.read()})
response = connection.getresponse()
assert response.status == 200
while response.read(1 << 20):
    pass
print(time.time() - start)
"""


def ways_to_post(
    template: bytes, servers: Iterable[str]
) -> dict[str, dict[str, tuple[list[bytes], dict[str, str]]]]:
    """Return bodies and headers by way of posting and server."""
    plain = [numbered(template, number) for number in range(max(GROUPS.values()))]
    zipped = [gzip.compress(each, GZIP_LEVEL) for each in plain]
    records = [record(each) for each in plain]
    return {
        "own": {"run-api": (plain, {}), "ours": (records, {"Content-Type": CONTENT_TYPE})},
        "JSON": dict.fromkeys(servers, (plain, {})),
        "gzip": dict.fromkeys(servers, (zipped, {"Content-Encoding": "gzip"})),
    }


def push_and_pull(server: Server, bodies: list[bytes], headers: dict[str, str]) -> float:
    """Return sequences per CPU second of the server."""
    server.register(BATCH)
    spent, each_batch = 0.0, BATCH // SEQUENCES
    for batch in range(len(bodies) // each_batch):
        before = server.cpu_s()
        for each in bodies[batch * each_batch : (batch + 1) * each_batch]:
            server.call("POST", "/scored_data", each, headers)
        server.pull(batch, BATCH)
        spent += server.cpu_s() - before
    return len(bodies) * SEQUENCES / spent


def call_ms(server: Server, method: str, path: str, body: Any = None) -> float:
    """Return the median of STATUS_CALLS calls, in ms."""
    times = []
    for _ in range(STATUS_CALLS):
        before = time.perf_counter()
        server.call(method, path, body)
        times.append(time.perf_counter() - before)
    return statistics.median(times) * 1000


def at_depth(server: Server) -> tuple[float, float]:
    """Return the times of /status-env and /status in ms, with DEPTH groups queued."""
    server.register(1 << 19)
    template = body(SEQUENCES, 8)
    for start in range(0, DEPTH, 100):
        many = b"[" + b",".join(numbered(template, start + i) for i in range(100)) + b"]"
        server.call("POST", "/scored_data_list", many)
    assert json.loads(server.call("GET", "/status"))["queue_size"] == DEPTH
    return call_ms(server, "GET", "/status-env", {"env_id": 0}), call_ms(server, "GET", "/status")


def memory_per_group(server: Server, template: bytes, groups: int) -> float:
    """Return bytes of resident memory per queued group, once buffers have their size."""
    server.register(1 << 19)
    for number in range(groups // 2):
        server.call("POST", "/scored_data", numbered(template, number))
    before = server.resident_bytes()
    for number in range(groups // 2, groups + groups // 2):
        server.call("POST", "/scored_data", numbered(template, number))
    return max(os.sysconf("SC_PAGE_SIZE"), server.resident_bytes() - before) / groups


def waits_of_others(server: Server, template: bytes) -> tuple[list[float], float]:
    """Return ms of each /status during the pull of a large batch, and s of that pull."""
    server.register(LARGE_BATCH)
    for number in range(LARGE_BATCH // SEQUENCES):
        server.call("POST", "/scored_data", numbered(template, number))
    taken: list[float] = []

    def pull() -> None:
        # In another process, so that the two do not share an interpreter lock.
        path, token = (
            ("/batch" if server.token is None else "/lease?batch=0&rank=0&world=1"),
            server.token or "",
        )
        done = subprocess.run(
            [sys.executable, "-c", PULL, str(server.port), path],
            input=token,
            capture_output=True,
            text=True,
            check=True,
        )
        taken.append(float(done.stdout))

    thread, other, waits = threading.Thread(target=pull), server.connect(), []
    thread.start()
    while thread.is_alive():
        before = time.perf_counter()
        server.call("GET", "/status", on=other)
        waits.append((time.perf_counter() - before) * 1000)
    thread.join()
    return waits, taken[0]


def main() -> Result:
    template = body(SEQUENCES, LENGTH)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_api(Path(scratch)) as upstream,
        own_server(Path(scratch)) as mine,
    ):
        servers = {"run-api": upstream, "ours": mine}
        ratios: dict[str, float] = {}
        for kind, posts in ways_to_post(template, servers).items():
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, server in servers.items():
                    bodies, headers = posts[name]
                    rates[name].append(push_and_pull(server, bodies[: GROUPS[name]], headers))
            best = {name: max(found) for name, found in rates.items()}
            ratios[kind] = best["ours"] / best["run-api"]
            pairs = sorted(a / b for a, b in zip(rates["ours"], rates["run-api"], strict=True))
            rows.append(
                {
                    "what": f"sequences per CPU s, {kind}",
                    **best,
                    "ratio": ratios[kind],
                    "median": statistics.median(pairs),
                    "least": pairs[0],
                    "greatest": pairs[-1],
                }
            )
        status = {name: at_depth(server) for name, server in servers.items()}
        for index, path in enumerate(("/status-env", "/status")):
            a, b = status["run-api"][index], status["ours"][index]
            rows.append(
                {
                    "what": f"{path} at depth {DEPTH}, ms",
                    "run-api": a,
                    "ours": b,
                    "ratio": a / b,
                    **NO_SPREAD,
                }
            )
        memory = {
            name: memory_per_group(server, template, QUEUED[name])
            for name, server in servers.items()
        }
        a, b = memory["run-api"], memory["ours"]
        rows.append(
            {"what": "bytes per queued group", "run-api": a, "ours": b, "ratio": a / b, **NO_SPREAD}
        )
        longest: dict[str, list[float]] = {}
        for name, server in servers.items():
            found = [
                waits_of_others(server, template)
                for _ in range(1 if server is upstream else ROUNDS)
            ]
            longest[name] = sorted(max(waits) for waits, _ in found)
            took = statistics.median(seconds for _, seconds in found)
            rows.append(
                {
                    "what": f"longest wait beside a batch of {LARGE_BATCH} ({took:.2f} s), ms",
                    "run-api": "",
                    "ours": "",
                    name: statistics.median(longest[name]),
                    "ratio": "",
                    "median": "",
                    "least": longest[name][0],
                    "greatest": longest[name][-1],
                }
            )
    result = Result(rows, details={"load": os.getloadavg()[1], "cpus": os.cpu_count()})
    result.at_least("sequences per CPU second over run-api's", ratios["own"], 28)
    result.at_least(
        "run-api's /status-env at depth 5000 over ours", status["run-api"][0] / status["ours"][0], 5
    )
    result.at_least(
        "run-api's memory per queued group over ours", memory["run-api"] / memory["ours"], 500
    )
    result.at_most(
        "ms that another request waits beside a batch of 1024, median of rounds",
        statistics.median(longest["ours"]),
        20,
    )
    return result
