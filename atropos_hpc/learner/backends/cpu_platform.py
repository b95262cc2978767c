"""verl on a machine without an accelerator.

verl asks a platform object for everything that depends on the device, and decides which one while its modules are imported. So
importing this module settles the matter, and every file here that imports verl imports this one first. With CUDA it changes
nothing; without, verl gets a platform named "cpu" that computes in host memory and communicates over gloo.
"""

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ON_CPU = not torch.cuda.is_available()
if ON_CPU:
    os.environ["VERL_PLATFORM"] = "cpu"

from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402  the variable above comes first
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402


class _Device(str):
    """The name of the device for `.to()`; where verl formats it as a number behind "cpu:", it reads 0."""

    def __format__(self, spec: str) -> str:
        return "0"


def _device_module() -> types.ModuleType:
    """torch.cpu, with the answers that only torch.cuda has: no memory is counted, nothing needs to be emptied."""
    module = types.ModuleType("verl_cpu_device")
    vars(module).update(
        {name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")}
    )

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device"):
        setattr(module, name, nothing)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(module, name, zero)
    vars(module).update(
        mem_get_info=lambda *args: (0, 0),
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        is_available=lambda: True,
        get_device_name=lambda *args: "cpu",
    )
    return module


_DEVICE_MODULE = _device_module()


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """Chosen through VERL_PLATFORM, or not at all."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return ON_CPU

    def current_device(self) -> Any:
        return _Device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    @contextmanager
    def nvtx_range(self, message: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
