"""Count the bytes of tensors that live at a time, as torch's dispatcher sees them being made."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """The storages on one device that are alive while this mode is entered: now, and at most.

    `track_existing` adds those that were made before. Storages in `ignored` do not count. What a
    kernel allocates and frees inside is not seen.
    """

    def __init__(self, device: str = "cpu", ignored: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._device = device
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._ignored = ignored

    def __enter__(self) -> "PeakMemory":
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP2 frees and fills storages in this way, past the dispatcher."""
            found = self._resize(storage, size)
            self._count(storage)
            self.peak = max(self.peak, self.live)
            return found

        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def track_existing(self) -> None:
        """Add the storages of all tensors that Python knows."""
        for storage in existing():
            self._count(storage)

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            for storage in _storages(tensor):
                self._count(storage)
        self.peak = max(self.peak, self.live)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored or storage.device.type != self._device:
            return
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key)
        self._sizes[key] = size
        self.live += size - (known or 0)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def existing() -> list[torch.UntypedStorage]:
    """Return the storages of all tensors that Python knows."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [storage for tensor in tensors for storage in _storages(tensor)]


def _storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    if not isinstance(tensor, torch.Tensor):
        return
    if is_traceable_wrapper_subclass(tensor):  # a DTensor, or a nested tensor
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        with contextlib.suppress(NotImplementedError):  # some have none
            yield tensor.untyped_storage()
