"""The address and the network interface that a process of a run uses."""

import fcntl
import os
import socket
import struct
from pathlib import Path

HOST = "ATROPOS_HPC_HOST"  # the node's address according to Slurm; set by the supervisor
_SIOCGIFADDR = 0x8915


def own_host(host: str | None) -> str:
    """Return the address on which this process listens and which it announces to the others.

    `host` is cluster.host: an address, the name of a network interface of this node, or None for
    the address that Slurm has for this node, and 127.0.0.1 without Slurm. Raises OSError when the
    interface has no IPv4 address.
    """
    if host is None:
        return os.environ.get(HOST) or "127.0.0.1"
    if not is_interface(host):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", host.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])


def is_interface(host: str) -> bool:
    """Whether `host` is the name of a network interface of this node."""
    return Path("/sys/class/net", host).exists()


def keep_to_interface(host: str | None) -> None:
    """Make torch and vLLM use the network interface `host`, where cluster.host names one."""
    if host is not None and is_interface(host):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", host)


def free_port(host: str) -> int:
    """Return a port that is free now. Another process may take it before the caller binds it."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
