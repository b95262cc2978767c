"""The ports of the learner's process group, which ask for no token, are where they have to be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atropos_hpc.runtime.run_dir import RunDir

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
member = Member(run, TrainerState(rank=0), "node", 0)
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


def test_port_of_a_single_rank_serves_no_store_and_is_not_on_the_network(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    env = {key: value for key, value in os.environ.items() if "SOCKET_IFNAME" not in key}
    env |= {"ATROPOS_HPC_HOST": "192.0.2.7", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    total, store, addresses = json.loads(done.stdout.strip().splitlines()[-1])
    assert total == 1.0 and store is None
    assert set(addresses) <= {"127.0.0.1"}
