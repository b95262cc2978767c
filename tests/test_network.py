"""The address and the interface that a process uses."""

import pytest

from atropos_hpc.runtime import network


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
