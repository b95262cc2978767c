"""A verl platform for machines without an accelerator.

verl asks a platform object for everything that depends on the device, and chooses the platform
while its modules are imported. Importing this module makes the choice, so it must come before
anything else of verl: import verl through `verl_api`. With CUDA it changes nothing. Without, verl
gets a platform named "cpu" that computes in host memory and communicates over gloo.
"""

import os
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

ON_CPU = not torch.cuda.is_available()
if ON_CPU:
    os.environ["VERL_PLATFORM"] = "cpu"

from verl.plugin.platform.platform_base import PlatformBase  # noqa: E402  after the variable
from verl.plugin.platform.platform_manager import PlatformRegistry  # noqa: E402


class _Device(str):
    """The device's name for `.to()`. verl also formats it as an index behind "cpu:", which is 0."""

    def __format__(self, spec: str) -> str:
        return "0"


def _constant(value: Any) -> Callable[..., Any]:
    """Return a function that returns the value, whatever its arguments."""
    return lambda *_args, **_options: value


def _device_module() -> types.ModuleType:
    """Return torch.cpu with the functions that only torch.cuda has. Memory is not counted."""
    module = types.ModuleType("verl_cpu_device")
    public = (name for name in dir(torch.cpu) if not name.startswith("_"))
    vars(module).update({name: getattr(torch.cpu, name) for name in public})
    actions = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device")
    vars(module).update(dict.fromkeys(actions, _constant(None)))
    memory = ("memory_allocated", "memory_reserved")
    counters = [f"{prefix}{name}" for name in memory for prefix in ("", "max_")]
    vars(module).update(dict.fromkeys(counters, _constant(0)))
    vars(module).update(
        mem_get_info=_constant((0, 0)),
        is_available=_constant(True),
        get_device_name=_constant("cpu"),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """verl's questions about the device, and the answers of a CPU."""

    device_name = property(_constant("cpu"))
    vendor_name = property(_constant("cpu"))
    device_module = property(_constant(_device_module()))
    is_available = _constant(True)
    is_platform_available = _constant(ON_CPU)
    current_device = _constant(_Device("cpu"))
    device_count = _constant(1)
    get_device_capability = _constant((None, None))
    communication_backend_name = _constant("gloo")
    visible_devices_envvar = _constant("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _constant("CPU")
    ray_noset_envvars = _constant([])
    is_ipc_supported = _constant(False)
    nvtx_range = _constant(nullcontext())
    set_device = synchronize = empty_cache = set_allocator_settings = _constant(None)
    profiler_start = profiler_stop = cudart = _constant(None)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
