"""How many bytes of tensors live at the same time while something runs, on any device, without its allocator's help."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their birth to their death; what was there before is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes: list[int] = []
        """Bytes of every storage alive at the peak."""
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in before:
                self._born(tensor)
        if self.now > self.peak:
            self.peak, self.sizes = self.now, list(self._known.values())
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _born(self, tensor: torch.Tensor) -> None:
        key, storage = self._key(tensor), tensor.untyped_storage()
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = size
        self.now += size

        def died() -> None:
            self._known.pop(key, None)
            self.now -= size

        weakref.finalize(storage, died)


def peak_of(work: Callable[[], Any]) -> LiveBytes:
    """What the tensors made by a piece of work took at the same time: its ``peak``, and their ``sizes`` then."""
    with LiveBytes() as live:
        work()
    return live
