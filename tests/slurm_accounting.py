"""A private Slurm cluster with accounting: slurmdbd on MariaDB, and a script of job_submit/lua.

Needs Debian's slurmdbd, mariadb-server-core and mariadb-client-core beside what slurm_cluster.py
needs (`make apt`).
Nothing listens beyond this machine: MariaDB on a socket in the cluster's directory, slurmdbd on
127.0.0.1.
"""

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

from slurm_cluster import Cluster, free_ports, until

PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "my_print_defaults")

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={home}/run/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={home}/log/slurmdbd.log
PidFile={home}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=accounting
"""
MORE = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={home}/run/munge.sock
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
JobSubmitPlugins=lua
"""


class AccountedCluster(Cluster):
    """`accounts`: sacctmgr's commands that make accounts, users and QOS; {user} is this user.
    `lua`: the body of slurm_job_submit(job, partitions, uid) of job_submit/lua."""

    def __init__(self, home: Path, nodes: int, accounts: list[str], lua: str) -> None:
        (self.port,) = free_ports(1)
        super().__init__(home, nodes, more=MORE.format(port=self.port, home=home.resolve()))
        self.accounts, self.lua = accounts, lua
        self.database: subprocess.Popen[bytes] | None = None

    def up(self) -> "AccountedCluster":
        super().up()
        for words in self.accounts:  # the controller has told slurmdbd of GPUs by now
            self.command("sacctmgr", "-i", *words.format(user=getpass.getuser()).split())
        return self

    def down(self) -> None:
        if self.database is not None:
            self.database.kill()
            self.database.wait()
        super().down()

    def before_controller(self) -> None:
        """Start MariaDB and slurmdbd."""
        (self.home / "job_submit.lua").write_text(
            f"function slurm_job_submit(job, partitions, uid)\n{self.lua}\nreturn slurm.SUCCESS\n"
            "end\nfunction slurm_job_modify(...)\nreturn slurm.SUCCESS\nend\n"
        )
        self._start_database()
        conf = self.home / "slurmdbd.conf"
        host = socket.gethostname().partition(".")[0]
        values = {"home": self.home, "host": host, "port": self.port, "user": getpass.getuser()}
        conf.write_text(SLURMDBD_CONF.format(**values))
        conf.chmod(0o600)
        self.command("slurmdbd")  # finds its config beside slurm.conf
        until("slurmdbd", self._is_counting, 60, self.story)
        self.command("sacctmgr", "-i", "add", "cluster", "private")

    def _start_database(self) -> None:
        """Start MariaDB with an empty database; this user needs no password.

        slurmdbd would create the database, but with libmariadb 11.8.9 of Debian 13 its queries then
        fail: "Number of columns in result (=1) set execeeds maxmimum allowed number of columns".
        """
        data, run = self.home / "database", self.home / "run"
        own = f"--user={getpass.getuser()}"
        here = (f"--datadir={data}", own)
        install = ("mariadb-install-db", "--no-defaults", *here, "--skip-test-db")
        self.command(*install, "--auth-root-authentication-method=normal")
        self.env["MYSQL_UNIX_PORT"] = str(run / "database.sock")  # of slurmdbd, too
        server = ["mariadbd", "--no-defaults", *here, "--skip-networking", "--skip-grant-tables"]
        init = self.home / "database.sql"
        init.write_text("CREATE DATABASE IF NOT EXISTS accounting;\n")
        options = [
            f"--init-file={init}",
            f"--socket={run}/database.sock",
            f"--pid-file={run}/database.pid",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        ]
        with (self.home / "log" / "database.log").open("ab") as log:
            command = [*server, *options]
            self.database = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        until("MariaDB", (run / "database.pid").exists, 60, self.story)  # written once it listens

    def _is_counting(self) -> bool:
        show = ("sacctmgr", "-n", "show", "cluster")
        done = subprocess.run(show, env=self.env, capture_output=True, timeout=60, check=False)
        return done.returncode == 0


def missing_programs() -> list[str]:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]
