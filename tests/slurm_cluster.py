"""A private Slurm cluster on this machine: slurmds, a controller and munge, in one directory.

Needs Debian's slurmctld, slurmd, slurm-client and munge (`make apt`); works as root and as a plain
user. Nodes have fake CPUs and GPUs (links to /dev/null). A node can be killed with everything on it
and started again. By hand:

    python tests/slurm_cluster.py up DIR [NODES]    prints a line to evaluate: export SLURM_CONF=...
    python tests/slurm_cluster.py down DIR
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
ROOT = Path(__file__).resolve().parent.parent

NODE_DEFAULTS = (
    "CPUs=16 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:4"
    " Feature=small,fake State=UNKNOWN"
)
LOW = "Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=1"
CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/run/munge.sock
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/run/slurmctld.pid
SlurmdPidFile={home}/run/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld.log
SlurmdLogFile={home}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5,bf_continue
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT {node_defaults}
{nodes}
PartitionName=main Default=YES MaxNodes=8 {low} PreemptMode={preempt} GraceTime={grace_s}
PartitionName=sudden {low} PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=physics Nodes=ALL State=UP PriorityTier=1 PreemptMode=OFF AllowAccounts=physics
PartitionName=closed Nodes=ALL State=DOWN
{more}
"""


class Cluster:
    """One private cluster. `more`: further lines of slurm.conf."""

    def __init__(
        self,
        home: Path,
        nodes: int = 3,
        grace_s: int = 20,
        preempt: str = "REQUEUE",
        more: str = "",
    ) -> None:
        self.home, self.grace_s, self.preempt, self.more = home.resolve(), grace_s, preempt, more
        self.nodes = [f"n{i}" for i in range(nodes)]
        self.conf = self.home / "slurm.conf"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.conf),
        }
        self.env["PATH"] += ":/usr/sbin:/sbin"

    # --- life

    def up(self) -> "Cluster":
        """Start everything and wait until all nodes are idle. Raises RuntimeError with the log."""
        missing = [name for name in PROGRAMS if shutil.which(name, path=self.env["PATH"]) is None]
        if missing:
            raise RuntimeError(
                f"there is no {', '.join(missing)}: `make apt` installs Slurm and munge"
            )
        spools = (f"spool/{node}" for node in self.nodes)
        for name in ("run", "state", "log", "munge", "dev", *spools):
            (self.home / name).mkdir(parents=True)
        self.home.chmod(0o755)
        (self.home / "munge").chmod(0o700)
        key = self.home / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for i in range(4):
            (self.home / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        ports, host = free_ports(1 + len(self.nodes)), socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={p}"
            for n, p in zip(self.nodes, ports[1:], strict=True)
        ]
        (self.home / "gres.conf").write_text(
            f"NodeName={','.join(self.nodes)} Name=gpu File={self.home}/dev/nvidia[0-3]\n"
        )
        self.conf.write_text(
            CONF.format(
                home=self.home,
                node_defaults=NODE_DEFAULTS,
                low=LOW,
                host=host,
                user=getpass.getuser(),
                ports=ports,
                nodes="\n".join(nodes),
                preempt=self.preempt,
                grace_s=self.grace_s,
                more=self.more,
            )
        )
        self.command(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={self.home}/run/munge.sock",
            "--num-threads=4",
            f"--pid-file={self.home}/run/munged.pid",
            f"--log-file={self.home}/log/munged.log",
            f"--seed-file={self.home}/munge/seed",
        )
        self.before_controller()
        self.command("slurmctld", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        until("idle nodes", self.is_idle, 60, self.story)
        return self

    def before_controller(self) -> None:
        """Start what the controller needs beside munge: nothing, here."""

    def down(self) -> None:
        """End every job, every daemon, and what is left of them; then remove the directory."""
        if self.conf.exists():
            subprocess.run(
                ["scancel", "-f", "-u", getpass.getuser()],
                env=self.env,
                timeout=30,
                check=False,
                capture_output=True,
            )
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.processes():
                time.sleep(0.2)
        pids = [
            int(path.read_text())
            for path in (self.home / "run").glob("*.pid")
            if path.read_text().strip()
        ]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in [*pids, *self.processes()]:
            _kill(pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            stack.callback(self.down)
            self.up()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def clear(self) -> None:
        """Cancel every job, and start the nodes that are down; returns when all are idle."""
        subprocess.run(
            ["scancel", "-u", getpass.getuser()],
            env=self.env,
            timeout=30,
            check=False,
            capture_output=True,
        )
        for node in self.nodes:
            if not self._pidfile(node).exists():
                self.start_node(node)
        until("idle nodes", self.is_idle, 60, self.story)

    def is_idle(self) -> bool:
        return (
            self.command("sinfo", "-h", "-p", "high", "-t", "idle", "-o", "%D")
            == str(len(self.nodes))
            and not self.processes()
        )

    # --- nodes

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.command("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, its step daemons and every process of a job on it at the same
        moment, as a power failure would.

        All are suspended before the first is killed: otherwise an srun that sees another process
        die would cancel its step on other nodes.
        """
        doomed = [self._slurmd(node), *self._step_daemons(node), *self.processes(node)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in doomed:
                _kill(pid, number)
        for pid in self.processes(node):  # started before its parent was stopped
            _kill(pid, signal.SIGKILL)
        self._pidfile(node).unlink()

    def kill_daemons(self, node: str, of_steps: bool) -> None:
        """Kill a node's slurmd, and the daemons of its steps if asked; the jobs' processes live."""
        for pid in [self._slurmd(node), *(self._step_daemons(node) if of_steps else ())]:
            _kill(pid, signal.SIGKILL)
        self._pidfile(node).unlink()

    def _pidfile(self, node: str) -> Path:
        return self.home / "run" / f"slurmd-{node}.pid"

    def _slurmd(self, node: str) -> int:
        return int(self._pidfile(node).read_text())

    def _step_daemons(self, node: str) -> list[int]:
        log = self.home / "log" / f"slurmd-{node}.log"
        return [
            each.pid
            for each in psutil.process_iter(["cmdline"])
            if " ".join(each.info["cmdline"] or ()).startswith("slurmstepd") and _holds(each, log)
        ]

    def processes(self, node: str | None = None, job: str | None = None) -> list[int]:
        """Pids of the processes of all jobs or of one, on one node or on all. Processes of every
        component of a heterogeneous job have the id of its first."""
        found = []
        for each in psutil.process_iter(["environ"]):
            variables = each.info["environ"] or {}
            of_cluster = variables.get("SLURM_CONF") == str(self.conf) and each.pid != os.getpid()
            on_node = variables.get("SLURMD_NODENAME")
            of_job = job in (None, variables.get("SLURM_JOB_ID"))
            if of_cluster and of_job and on_node is not None and node in (None, on_node):
                found.append(each.pid)
        return found

    # --- jobs

    def command(self, *words: str, timeout: float = 60) -> str:
        """The output of a command on this cluster. Raises RuntimeError with its error output."""
        done = subprocess.run(
            words,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=self.home,
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout.strip()

    def jobs(self) -> dict[str, str]:
        """Every job and het component that the controller remembers, with its state."""
        return dict(
            line.split("|")
            for line in self.command("squeue", "-h", "--states=all", "-o", "%i|%T").splitlines()
        )

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job's leader."""
        words = self.command("scontrol", "-o", "show", "job", number).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def skip_requeue_delay(self, number: str) -> None:
        """Make a requeued job eligible seconds after it became pending, not after two minutes."""
        until(
            f"job {number} pending",
            lambda: self.job(number)["JobState"] == "PENDING",
            60,
            self.story,
        )
        time.sleep(4)
        self.command("scontrol", "update", f"jobid={number}", "StartTime=now")

    def story(self) -> str:
        """For a failed test: the queue, and the end of the controller's log."""
        queue = subprocess.run(
            ["squeue", "--states=all"],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        ).stdout
        log = self.home / "log" / "slurmctld.log"
        return queue + "\n".join(log.read_text().splitlines()[-25:] if log.exists() else [])


def until(
    what: str, look: Callable[[], Any], seconds: float, story: Callable[[], str] = str
) -> Any:
    """Wait until `look()` returns something true, and return that. Raises AssertionError with the
    story after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"no {what} after {seconds} s:\n{story()}"
        time.sleep(0.2)
    return found


def free_ports(count: int) -> list[int]:
    """Different ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _holds(process: psutil.Process, log: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(file.path) == log for file in process.open_files())
    return False


def main(words: list[str]) -> int:
    verb, home = words[0], Path(words[1])
    cluster = Cluster(home, int(words[2]) if len(words) > 2 else 3)
    if verb == "up":
        cluster.up()
        print(f"export SLURM_CONF={cluster.conf}")
    else:
        cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
