"""The ports of the learner's process group: where they are, and what is read from them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from atropos_hpc.runtime.membership import RosterPublisher
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.signed_objects import sign_object_collectives

pytestmark = pytest.mark.verl

RANK = """
import json, os, sys
from pathlib import Path
import psutil
from atropos_hpc.contracts.members import TrainerState
from atropos_hpc.learner.main import join
from atropos_hpc.runtime.membership import Member
from atropos_hpc.runtime.network import group_host, keep_to_interface
from atropos_hpc.runtime.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
rank = int(os.environ["RANK"])
member = Member(run, TrainerState(rank=rank), "node", rank)
host = group_host(None, nodes=1)
keep_to_interface(host)
join(run, member, host, 30)
import torch, torch.distributed as dist
total = torch.ones(1)
dist.all_reduce(total)
listening = [each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"]
print(json.dumps([total.item(), member.state.store, [address.ip for address in listening]]))
member.leave()
"""


@pytest.mark.parametrize("world", [1, 2])
def test_ports_of_the_ranks_of_one_node_are_on_its_loopback_interface(
    tmp_path: Path, world: int
) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    env = {key: value for key, value in os.environ.items() if "SOCKET_IFNAME" not in key}
    env |= {"ATROPOS_HPC_HOST": "192.0.2.7", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(run.path)],
            env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    roster, deadline = RosterPublisher(run), time.monotonic() + 120
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        roster.publish(at_once=True)
        time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        output = rank.communicate()[0]
        assert rank.returncode == 0
        total, store, addresses = json.loads(output.strip().splitlines()[-1])
        assert total == world and set(addresses) <= {"127.0.0.1"}
        assert store is None or (world > 1 and store[0] == "127.0.0.1")
    assert roster.members or world == 1


class Bomb:
    """Whoever unpickles it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def exchange(rank: int, world: int, tokens: list[str], mark: Path) -> str:
    """Exchange one object between the ranks; return the error, if there is one."""
    import torch.distributed as dist

    if tokens[rank]:
        sign_object_collectives(tokens[rank])
    sent: Any = Bomb(mark) if rank else {"rank": 0}
    found: list[Any] = [None] * world
    try:
        dist.all_gather_object(found, sent)
    except Exception as error:
        return type(error).__name__
    return ""


def test_objects_of_a_process_without_the_runs_token_are_never_unpickled(tmp_path: Path) -> None:
    from learner_ranks import on_ranks

    mark = tmp_path / "mark"
    for stranger in ("", "another token"):
        assert on_ranks(2, exchange, ["token", stranger], mark)[0] == "ForgedObject"
        assert not mark.exists()
    assert on_ranks(2, exchange, ["token", "token"], mark) == ["", ""] and mark.exists()
