"""The address and the network interface that a process of a run uses."""

import os
import socket

import psutil

LOOPBACK = "127.0.0.1"
HOST = "ATROPOS_HPC_HOST"  # the node's address according to Slurm; set by the supervisor


def own_host(host: str | None) -> str:
    """Return the address on which this process listens and which it announces to the others.

    `host` is cluster.host: an address, the name of a network interface of this node, or None for
    the address that Slurm has for this node, and 127.0.0.1 without Slurm. Raises OSError when the
    interface has no IPv4 address.
    """
    if host is None:
        return os.environ.get(HOST) or "127.0.0.1"
    interfaces = psutil.net_if_addrs()
    if host not in interfaces:
        return host
    found = [entry.address for entry in interfaces[host] if entry.family == socket.AF_INET]
    if not found:
        raise OSError(f"cluster.host: interface {host} has no IPv4 address")
    return str(found[0])


def group_host(host: str | None, nodes: int) -> str:
    """Return the address on which the ranks of one process group reach each other.

    Their stores and connections ask for no token: within one node they listen on the loopback
    interface only. `host` is cluster.host.
    """
    return own_host(host) if nodes > 1 else LOOPBACK


def interface_of(host: str) -> str | None:
    """Return the network interface that carries an address or host name; None if none does."""
    try:
        resolved = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] in resolved for entry in entries):
            return name
    return None


def keep_to_interface(host: str | None) -> None:
    """Make torch and vLLM communicate over the interface that carries this process's address.

    By default, gloo uses the interface that the host name resolves to, and NCCL the first one that
    it finds; with "=", it does not take a name for a prefix, of eth1 and eth10. `host` is
    cluster.host. Variables that are set already are kept.
    """
    if (interface := interface_of(own_host(host))) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def free_port(host: str) -> int:
    """Return a port that is free now. Another process may take it before the caller binds it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def http_url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 address is put into brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
