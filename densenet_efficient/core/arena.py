"""Scratch memory shared by all blocks of all models: a declarative table, one slab per stream.

A call's working memory is a table of `Buffer` rows. `lease` lays a table out in one slab for the
length of a forward or backward call and takes it back afterwards, so a model needs the scratch of
its largest block only. Nothing lives in a slab between two calls: two models may be interleaved,
two forwards may precede a backward, a backward may never come. Slabs belong to a device and a
stream; a second thread on the same stream gets a slab of its own. While a CUDA graph is captured,
scratch comes from PyTorch's allocator instead, whose graph-private pool keeps it alive as long as
the graph; so it does outside ordinary eager execution, since only ordinary tensors enter the pool.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import eager

ALIGNMENT = 256
"""Every buffer starts at a multiple of this many bytes of its slab."""


@dataclass(frozen=True)
class Buffer:
    """One row of a memory table.

    name: what the buffer holds. shape, dtype: of the tensor. lifetime: ``"output"`` (handed to the
    caller and kept for backward), ``"kept"`` (from forward to backward), ``"scratch"`` (one call,
    shared by all blocks), ``"gradient"`` (of parameters, the step's result) or ``"transient"``
    (until the next operator has run, from PyTorch's allocator).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lifetime: str

    @functools.cached_property
    def bytes(self) -> int:
        """Size in bytes, without alignment."""
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Of a contiguous tensor."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


def slab_bytes(table: Iterable[Buffer]) -> int:
    """Bytes of the slab that holds every row of ``table``."""
    return sum(_aligned(row.bytes) for row in table)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_lock = threading.Lock()
_free: dict[tuple[torch.device, int], list[Tensor]] = {}


def _after_fork() -> None:
    """A child process starts with a lock that nobody holds, and without the parent's slabs, whose
    pages it would only copy."""
    global _lock
    _lock = threading.Lock()
    _free.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class lease:
    """A context: uninitialised tensors for the rows of ``table``, by name, until it ends."""

    def __init__(self, table: Sequence[Buffer], device: torch.device) -> None:
        self._rows, self._device = table, device

    def __enter__(self) -> dict[str, Tensor]:
        if not self._rows:
            return {}
        self._key = _key(self._device)
        self._slab = _take(self._key, slab_bytes(self._rows), self._device)
        views: dict[str, Tensor] = {}
        offset, whole = 0, self._slab
        for row in self._rows:
            if row.dtype != whole.dtype:
                whole = whole.view(row.dtype)
            place = offset // row.dtype.itemsize
            views[row.name] = whole.as_strided(row.shape, row.strides, place)
            offset += _aligned(row.bytes)
        return views

    def __exit__(self, *error: object) -> None:
        if self._rows and self._key is not None and eager.is_ordinary(self._slab):
            with _lock:
                _free.setdefault(self._key, []).append(self._slab)


def _key(device: torch.device) -> tuple[torch.device, int] | None:
    """Whose slab this is; None where slabs must not outlive the call."""
    if eager.unusual_mode() is not None:
        return None
    if device.type != "cuda":
        return device, 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return device, torch.cuda.current_stream(device).cuda_stream


def _take(key: tuple[torch.device, int] | None, size: int, device: torch.device) -> Tensor:
    slab = None
    if key is not None:
        with _lock:
            stack = _free.get(key)
            slab = stack.pop() if stack else None
        if slab is not None and slab.numel() < size:
            slab = None  # freed before its larger successor is allocated
    if slab is None:
        slab = torch.empty(size, dtype=torch.uint8, device=device)
    return slab


def reserved_bytes(device: torch.device | str | None = None) -> int:
    """Bytes of idle slabs, of one device or of all."""
    wanted = None if device is None else torch.device(device)
    with _lock:
        return sum(
            slab.numel()
            for (owner, _), stack in _free.items()
            for slab in stack
            if wanted is None or owner == wanted
        )


def release(device: torch.device | str | None = None) -> None:
    """Gives idle slabs back to PyTorch's allocator; the next step allocates them anew. ValueError
    for what is no device."""
    try:
        wanted = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be such as cpu or cuda:0, got {device!r}") from None
    with _lock:
        for owner, stream in list(_free):
            if wanted is None or owner == wanted:
                del _free[owner, stream]
