"""Which process uses which GPU. Nothing else maps processes to devices.

A process sees the devices in CUDA_VISIBLE_DEVICES: indices, UUIDs ("GPU-...") or MIG instances
("MIG-..."), set by Slurm, a container or a person. Without the variable it sees every device of the
machine. A process is given a part of that list. Entries are passed on as they are: an index in a
child's list would otherwise name another device than in its parent's.

Only `require_gpus` imports torch, for processes that load it anyway: the supervisor and the node
agent must start quickly, and on machines without torch.
"""

import os
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
PCI_DEVICES = Path("/sys/bus/pci/devices")


def visible_devices(environment: Mapping[str, str], machine_devices: int) -> list[str]:
    """Return the entries of the inherited device list, or the indices of the whole machine.

    >>> visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, 8), visible_devices({}, 2)
    (['GPU-aa', 'GPU-bb'], ['0', '1'])
    """
    listed = environment.get(VISIBLE)
    if listed is None:
        return [str(index) for index in range(machine_devices)]
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


def machine_devices() -> int:
    """Count this machine's NVIDIA GPUs without loading CUDA."""
    if NVIDIA_DEVICES.is_dir():
        return len(list(NVIDIA_DEVICES.iterdir()))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))  # a container without the driver's /proc


def role_devices(visible: Sequence[str], trainer: int, rollout: int) -> tuple[list[str], list[str]]:
    """Divide the devices of one machine that hosts both roles: (trainer's, rollout's).

    Each role gets devices of its own if there are enough; otherwise they share them.

    >>> role_devices(["0", "1", "2"], 1, 2), role_devices(["0"], 1, 1)
    ((['0'], ['1', '2']), (['0'], ['0']))
    """
    begin = trainer if len(visible) >= trainer + rollout else 0
    return list(visible[:trainer]), list(visible[begin : begin + rollout])


def server_devices(visible: Sequence[str], index: int, tensor_parallel: int) -> list[str]:
    """Return the devices of the node's vLLM server `index`.

    Raises ValueError if the node has too few.

    >>> server_devices(["4", "5", "6", "7"], 1, 2)
    ['6', '7']
    """
    devices = list(visible[index * tensor_parallel : (index + 1) * tensor_parallel])
    if len(devices) < tensor_parallel:
        raise ValueError(
            f"server {index} needs {tensor_parallel} GPUs (rollout.tensor_parallel), but this "
            f"node's visible devices are {', '.join(visible) or 'none'}: lower rollout.servers or "
            "rollout.tensor_parallel, or request more GPUs (roles.rollout.gpus_per_node)"
        )
    return devices


def local_device(local_rank: int, device_count: int) -> int:
    """Return the CUDA device index of a trainer rank that sees `device_count` devices.

    A rank sees one device under --gpus-per-task, and every device of its node otherwise. Raises
    ValueError if the node has fewer devices than ranks.
    """
    if device_count == 1:
        return 0
    if local_rank >= device_count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node shows {device_count} devices; lower "
            "roles.trainer.ranks_per_node or request more GPUs (roles.trainer.gpus_per_node)"
        )
    return local_rank


def keep_own_instance(environment: MutableMapping[str, str], local_rank: int) -> None:
    """Leave a trainer rank its own entry of a list of MIG instances. Call it before CUDA is used.

    CUDA shows a process only the first instance of its list, which all ranks would share.

    >>> variables = {"CUDA_VISIBLE_DEVICES": "MIG-aa,MIG-bb"}
    >>> keep_own_instance(variables, 1)
    >>> variables
    {'CUDA_VISIBLE_DEVICES': 'MIG-bb'}
    """
    visible = visible_devices(environment, 0)
    if visible and visible[0].startswith("MIG-"):
        environment[VISIBLE] = visible[local_device(local_rank, len(visible))]


def driver_version() -> str | None:
    """Return what the NVIDIA driver says of itself; None without one."""
    try:
        return DRIVER_VERSION.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def query_gpus(*fields: str) -> list[list[str]]:
    """Return these fields of each GPU of this machine, by nvidia-smi; [] without a driver."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(", ") for line in text.strip().splitlines()]


def local_cpus(
    entries: Sequence[str],
    gpus: Path = NVIDIA_DEVICES,
    pci: Path = PCI_DEVICES,
    nodes: Path = Path("/dev"),
) -> set[int]:
    """Return the CPUs of the NUMA nodes that GPUs of the visible list are attached to.

    Empty where that is not known: for MIG instances, and in containers without the driver's /proc.
    """
    found: set[int] = set()
    try:
        slots = sorted(gpus.iterdir())  # by PCI address, as equal GPUs are numbered
        said = {slot.name: _information(slot) for slot in slots}
        uuids = {each["GPU UUID"]: slot for slot, each in said.items()}
        # The driver lists all GPUs; an index counts those that the job's cgroup lets this process
        # open.
        minors = {slot: nodes / f"nvidia{each['Device Minor']}" for slot, each in said.items()}
        own = [slot for slot, node in minors.items() if os.access(node, os.R_OK | os.W_OK)]
        for entry in entries:
            slot = own[int(entry)] if entry.isdigit() else uuids[entry]
            found |= _cpu_list((pci / slot / "local_cpulist").read_text())
    except (OSError, LookupError, ValueError):
        return set()
    return found


def stay_near(entries: Sequence[str]) -> None:
    """Bind this process, and those that it starts, to the CPUs near its GPUs.

    Of the CPUs that it may use; where these are all far from its GPUs, it keeps them.
    """
    if near := os.sched_getaffinity(0) & local_cpus(entries):
        os.sched_setaffinity(0, near)


def _information(slot: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in (slot / "information").read_text().splitlines())
    return {name: value.strip() for name, _, value in lines}


def _cpu_list(text: str) -> set[int]:
    """Parse the kernel's form of a set of CPUs.

    >>> sorted(_cpu_list("0-2,8"))
    [0, 1, 2, 8]
    """
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def require_gpus(role: str, gpus_per_node: int) -> None:
    """Raise ValueError, with what torch found, if the role asks for GPUs and there are none."""
    if not gpus_per_node:
        return
    # Ask NVML: a CUDA driver initialized here would not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if torch.cuda.is_available():
        return
    driver = driver_version() or "no NVIDIA driver is loaded on this node"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    raise ValueError(
        f"roles.{role}.gpus_per_node={gpus_per_node}, but torch {torch.__version__} finds no GPU. "
        f"torch is built for {built}; driver: {driver}; {VISIBLE}={os.environ.get(VISIBLE)!r}. "
        "Install the role's CUDA packages (make setup DEVICE=cuda) or a driver that supports them, "
        "or request GPUs"
    )
