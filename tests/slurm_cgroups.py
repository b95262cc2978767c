"""A private Slurm cluster whose jobs are held to their memory and cores by cgroup v2.

Needs root and a cgroup2 hierarchy with the memory and cpuset controllers, as on a machine of today
or in a virtual one; tests/cgroup_vm.sh starts one. Not in containers.
"""

import os
from pathlib import Path

from slurm_cluster import Cluster

CGROUPS = Path("/sys/fs/cgroup")
MORE = """\
TaskPlugin=task/cgroup,task/affinity
ProctrackType=proctrack/cgroup
JobAcctGatherType=jobacct_gather/cgroup
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/v2
IgnoreSystemd=yes
EnableControllers=yes
ConstrainCores=yes
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
"""


class ConstrainedCluster(Cluster):
    def __init__(self, home: Path, nodes: int) -> None:
        super().__init__(home, nodes, more=MORE)

    def before_controller(self) -> None:
        (self.home / "cgroup.conf").write_text(CGROUP_CONF)


def missing_controllers() -> set[str]:
    """What this machine does not let a root user constrain."""
    if os.geteuid() != 0:
        return {"root"}
    controllers = CGROUPS / "cgroup.controllers"
    found = controllers.read_text().split() if controllers.exists() else []
    return {"memory", "cpuset"} - set(found)
