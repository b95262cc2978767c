"""One vLLM server of a run.

    python -m atropos_hpc.rollout.vllm_server --run-dir R --port P

This process runs vLLM's OpenAI-compatible server with the routes for token-level generation and
weight updates, our weight-transfer engine in its workers, and the token check on every route but
/health. The server starts with the weights of model.path; the node agent pushes the newest policy
version before it lists the server.

However this process ends, its children end too: each of vLLM's processes dies with its parent.
"""

import argparse
import os
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

from atropos_hpc.config import ModelConf, RolloutConf
from atropos_hpc.rollout.vllm_api import read_every_reply, separate_caches, serve, version_flags
from atropos_hpc.runtime import cores, devices, process
from atropos_hpc.runtime.network import LOOPBACK, keep_to_interface, own_host
from atropos_hpc.runtime.position_limit import require_positions
from atropos_hpc.runtime.run_dir import RunDir
from atropos_hpc.runtime.token_check import RUN_DIR, TokenGuard

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM is built for
EXTENSION = "atropos_hpc.policy.vllm_engine.WorkerExtension"


def arguments(rollout: RolloutConf, model: ModelConf, host: str, port: int, seed: int) -> list[str]:
    """Build vLLM's command line; `rollout.arguments` come last and override the others.

    Raises ValueError without a model.
    """
    if model.path is None:
        raise ValueError("model.path is not set: a server needs the directory or name of a model")
    flags: dict[str, Any] = {
        "model": model.path,
        "host": host,
        "port": port,
        "dtype": model.dtype,
        "max-model-len": model.max_length,
        "max-num-seqs": rollout.max_sequences,
        "tensor-parallel-size": rollout.tensor_parallel,
        "seed": seed,
        # sampling as the environment asks for it, not as the model's authors recommend
        "generation-config": "vllm",
        # of the distribution that was sampled, temperature included: the behaviour policy's
        "logprobs-mode": "processed_logprobs",
        # the support of truncated sampling is read off the log-probs, see `vllm_answers`
        "max-logprobs": max(20, rollout.max_support),
        "worker-extension-cls": EXTENSION,
        "weight-transfer-config": '{"backend": "disk"}',
        "middleware": f"{TokenGuard.__module__}.{TokenGuard.__qualname__}",
        "disable-uvicorn-access-log": True,
        "trust-remote-code": model.trust_remote_code,
        "enforce-eager": rollout.enforce_eager,
        "kv-cache-memory-bytes": rollout.kv_cache_bytes,
        "gpu-memory-utilization": rollout.memory_utilization,
        "enable-auto-tool-choice": rollout.tool_parser is not None,
        "tool-call-parser": rollout.tool_parser,
    }
    line: list[str] = []
    for name, value in flags.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None and value is not False:
            line += [f"--{name}", str(value)]
    return line + version_flags() + lora_arguments(model) + list(rollout.arguments)


def lora_arguments(model: ModelConf) -> list[str]:
    """Return the flags with which vLLM serves one adapter beside the base model."""
    if not model.lora.rank:
        return []
    rank = next((rank for rank in LORA_RANKS if rank >= model.lora.rank), None)
    if rank is None:
        raise ValueError(f"model.lora.rank={model.lora.rank}: vLLM serves at most {LORA_RANKS[-1]}")
    return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]


def variables(rollout: RolloutConf, model: ModelConf, gpus: bool = True) -> dict[str, str]:
    """Environment variables for vLLM. `rollout.variables` have the last word."""
    found = {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for pausing and weight updates
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": LOOPBACK,  # where vLLM's processes meet, not where the server listens
    }
    if not gpus:
        found |= cores.PASSIVE_WAITING
    if model.lora.rank:
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # the route that registers the adapter
    if model.path is not None and Path(model.path).is_dir():
        found["HF_HUB_OFFLINE"] = (
            "1"  # nothing to look up: compute nodes often have no way out, and would wait for it
        )
    return found | dict(rollout.variables)


def bind_to_parent() -> None:
    """Die with the parent, have children do the same, and dump stack traces on request."""
    process.die_with_parent(signal.SIGKILL)
    process.dump_stacks_on_request()
    os.environ[process.PARENT] = str(os.getpid())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    bind_to_parent()
    os.register_at_fork(after_in_child=bind_to_parent)

    config = RunDir(options.run_dir).config()
    rollout, model = config.rollout, config.model
    if config.roles.rollout.gpus_per_node:
        devices.stay_near(devices.visible_devices(os.environ, 0))
    host = own_host(config.cluster.host)
    keep_to_interface(LOOPBACK)  # of vLLM's own processes, which are all on this node
    gpus = config.roles.rollout.gpus_per_node > 0
    own = {RUN_DIR: str(options.run_dir.resolve())}
    os.environ.update(variables(rollout, model, gpus), **own)
    print(f"computes with {cores.bind()}", flush=True)
    try:
        devices.require_gpus("rollout", config.roles.rollout.gpus_per_node)
        require_positions(model)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(process.REFUSED)
    # Servers that sample with the same seed would give groups of the same noise.
    seed = zlib.crc32(
        f"{config.seed} {os.environ.get(process.NODE, 'local')} {options.port}".encode()
    )
    serve(arguments(rollout, model, host, options.port, seed))


if __name__ == "__mp_main__":
    # A process that vLLM has spawned, not forked, imports its parent's main module by this name.
    bind_to_parent()
    separate_caches()
    read_every_reply()

if __name__ == "__main__":
    main()
