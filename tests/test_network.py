"""The address and the interface that a process uses."""

import socket
from types import SimpleNamespace

import pytest

from atropos_hpc.launch.slurm import slurm_job
from atropos_hpc.launch.slurm.sbatch import Allocation
from atropos_hpc.runtime import network, slurm


@pytest.mark.parametrize("host", [None, "127.0.0.1", "lo"])
def test_libraries_use_the_interface_that_carries_the_announced_address(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (network.HOST, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "")  # so that it is restored afterwards
        monkeypatch.delenv(variable)
    network.keep_to_interface(host)
    assert network.own_host(host) == "127.0.0.1"
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "=lo", "a name, not a prefix"


@pytest.mark.parametrize(("nodes", "address"), [(1, "127.0.0.1"), (2, "10.1.2.3")])
def test_ports_without_a_token_are_on_the_loopback_interface_unless_there_are_more_nodes(
    nodes: int, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(network.HOST, "10.1.2.3")
    assert network.group_host(None, nodes) == address


def test_a_variable_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    network.keep_to_interface("127.0.0.1")
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_an_address_that_no_interface_has_is_left_to_the_libraries() -> None:
    assert network.interface_of("192.0.2.7") is None
    assert network.interface_of("no-such-host.invalid") is None


def interfaces(
    monkeypatch: pytest.MonkeyPatch, *addresses: tuple[socket.AddressFamily, str]
) -> None:
    entries = [SimpleNamespace(family=family, address=address) for family, address in addresses]
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {"ib0": entries})


V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize(
    "addresses, chosen",
    [
        ([(V6, "fe80::1%ib0"), (V6, "fd00::2"), (V4, "10.0.0.1"), (V4, "10.0.0.2")], "10.0.0.1"),
        ([(V6, "fe80::1%ib0"), (V6, "fd00::2")], "fd00::2"),
    ],
)
def test_an_interface_without_ipv4_is_used_by_its_ipv6_address(
    addresses: list[tuple[socket.AddressFamily, str]],
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interfaces(monkeypatch, *addresses)
    assert network.own_host("ib0") == chosen


@pytest.mark.parametrize(
    "host, says", [("ib0", "ib0 has no address"), ("ib7", "no interface ib7.*it has ib0")]
)
def test_an_unusable_interface_is_an_error_that_names_the_key(
    host: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfaces(monkeypatch, (V6, "fe80::1%ib0"))
    with pytest.raises(OSError, match=f"cluster.host: .*{says}"):
        network.own_host(host)


@pytest.mark.parametrize("address, found", [("::1", "::1"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_of_a_node_may_be_of_ipv6(
    address: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = f"NodeName=n1 NodeAddr={address} NodeHostName=n1.cluster.example"
    monkeypatch.setattr(slurm, "run_command", lambda *_: shown)
    job = slurm_job.Job("7", {"trainer": Allocation(("n1",), "7")})
    assert job.addresses(None) == {"n1": found}
