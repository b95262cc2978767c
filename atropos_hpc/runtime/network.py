"""The address and the network interface that a process of a run uses."""

import os
import socket

import psutil

LOOPBACK = "127.0.0.1"
HOST = "ATROPOS_HPC_HOST"  # the node's address according to Slurm; set by the supervisor


def own_host(host: str | None) -> str:
    """Return the address on which this process listens and which it announces to the others.

    `host` is cluster.host: an address, the name of a network interface of this node, or None for
    the address that Slurm has for this node, and 127.0.0.1 without Slurm. IPv4 is preferred. Raises
    OSError when there is no such interface or name, or the interface has no address.
    """
    if host is None:
        return os.environ.get(HOST) or "127.0.0.1"
    interfaces = psutil.net_if_addrs()
    if host not in interfaces:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise OSError(
                f"cluster.host: this node has no interface {host}, and the name does not resolve"
                f" ({error}); it has {', '.join(sorted(interfaces))}"
            ) from None
        return host
    found = [e.address for e in interfaces[host] if e.family == socket.AF_INET]
    found += [e.address for e in interfaces[host] if e.family == socket.AF_INET6]
    usable = [address for address in found if not address.lower().startswith("fe80:")]
    if not usable:
        raise OSError(f"cluster.host: interface {host} has no address that other nodes can use")
    return str(usable[0])


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
