"""W&B without a key, LoRA targets that match nothing, and IPv6 hosts are found before the run."""

import json
import socket
import struct
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from atropos_hpc.config import Config
from atropos_hpc.launch import service_check
from atropos_hpc.runtime import network


def found(config: Config) -> dict[str, str]:
    return {problem.key: problem.message for problem in service_check.check(config)}


def test_wandb_online_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = Config()
    config.wandb.mode = "offline"
    assert found(config) == {}
    config.wandb.mode = "online"
    assert "WANDB_API_KEY" in found(config)["wandb.mode"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert found(config) == {}
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert found(config) == {}


@pytest.mark.parametrize("indexed", [True, False])
def test_lora_targets_that_match_no_layer_are_refused(tmp_path: Path, indexed: bool) -> None:
    weights = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    if indexed:
        index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({"__metadata__": {}, **dict.fromkeys(weights, empty)}).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    config = Config()
    config.model.path, config.model.lora.rank = str(tmp_path), 8
    config.model.lora.targets = ["q_proj", "self_attn.q_proj"]
    assert found(config) == {}
    config.model.lora.targets = ["q_proj", "qproj", "oj"]
    message = found(config)["model.lora.targets"]
    assert message.startswith("qproj, oj match no layer") and "q_proj" in message
    config.model.path = "some/hub-name"
    assert found(config) == {}, "not known here"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_hosts_of_ipv4_and_ipv6_get_ports(host: str) -> None:
    try:
        port = network.free_port(host)
    except OSError as error:
        pytest.skip(f"no {host} on this machine: {error}")
    assert 0 < port < 65536


@pytest.mark.parametrize(
    ("host", "family", "url"),
    [
        ("10.0.0.1", socket.AF_INET, "http://10.0.0.1:7"),
        ("fd00::1", socket.AF_INET6, "http://[fd00::1]:7"),
    ],
)
def test_hosts_of_ipv6_are_bound_as_such_and_put_into_brackets(
    host: str, family: int, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine without IPv6."""
    made = MagicMock()
    made.return_value.__enter__.return_value.getsockname.return_value = (host, 7)
    monkeypatch.setattr(network.socket, "socket", made)
    assert network.http_url(host, network.free_port(host)) == url
    made.assert_called_once_with(family)
