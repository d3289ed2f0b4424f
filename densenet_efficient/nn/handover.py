"""How an output leaves a module of ours: a tensor like any other, which only the next module of
ours knows more about.

A block keeps its feature buffer for the backward pass, and hands it to the caller as well. The
caller may write to what it got, through whatever path; so it gets a copy-on-write clone, which
shares the buffer's memory until somebody writes to either. The clone carries the channel statistics
of its values, valid as long as it shares that memory. A caller whose input was contiguous gets a
contiguous output, as from the original modules, at the price of a copy; between two modules of
ours the output stays channels last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.exchange import Exchange
from ..core.functions import MatchLayoutFunction, NewFeaturesFunction

_data_address = torch._C._data_address  # type: ignore[attr-defined]
_is_cow_tensor = torch._C._is_cow_tensor  # type: ignore[attr-defined]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_STATS = "_densenet_efficient_stats"


class _Caller(threading.local):
    contiguous: bool | None = None
    private: bool = False


_caller = _Caller()


@contextmanager
def asking_for(contiguous: bool, private: bool = False) -> Iterator[None]:
    """While one module is called by one of ours: whether its output is to be contiguous or channels
    last (without this the module decides by its input), and whether the next module of ours alone
    will see the output and its gradient."""
    before = _caller.contiguous, _caller.private
    try:
        _caller.contiguous, _caller.private = contiguous, private
        yield
    finally:
        _caller.contiguous, _caller.private = before


def asked_for() -> tuple[bool | None, bool]:
    """What a calling module of ours wants, or (None, False) where somebody else calls; asked once a
    call, so that what the asking module calls itself is somebody else's call."""
    wanted = _caller.contiguous, _caller.private
    _caller.contiguous, _caller.private = None, False
    return wanted


def prefers_contiguous(x: Tensor) -> bool:
    """Whether the original modules would answer x with contiguous memory."""
    return x.is_contiguous() and not _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() in _FORMATS and x.is_contiguous(memory_format=_FORMATS[x.dim()])


def match_layout(x: Tensor) -> Tensor:
    """x, whose gradient will come back in contiguous memory."""
    return MatchLayoutFunction.apply(x) if x.requires_grad else x


def new_features(y: Tensor, stats: Tensor | None, new: slice) -> tuple[Tensor, Tensor | None]:
    """The channels that a block's layers added to y, and their statistics; a copy, for a caller
    who takes dense memory for granted."""
    return NewFeaturesFunction.apply(y, new.start, new.stop), None if stats is None else stats[
        :, new
    ]


def new_features_in_graph(
    y: Tensor, stats: Tensor | None, new: slice
) -> tuple[Tensor, Tensor | None]:
    """`new_features` of PyTorch's operators alone."""
    copy = y[:, new].contiguous(memory_format=_FORMATS.get(y.dim(), torch.contiguous_format))
    return copy, None if stats is None else stats[:, new]


def as_dtype(x: Tensor, stats: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x and the statistics of its values in another dtype; None where they are no longer theirs."""
    if x.dtype == dtype:
        return x, stats
    exact = torch.promote_types(x.dtype, dtype) == dtype
    return x.to(dtype), stats if exact and dtype != torch.float64 else None


def hand_over(
    y: Tensor, stats: Tensor | None, contiguous: bool, exchange: Exchange | None = None
) -> Tensor:
    """y ``[N, C, *spatial]``, which the caller must not write to, as a tensor that it may write to,
    with the statistics ``[2, C]`` of its values: of this process, or of all that exchanged
    them."""
    given = torch._lazy_clone(y.contiguous() if contiguous else y)
    if stats is not None:
        setattr(given, _STATS, (stats, _data_address(given), exchange))
    return given


def known_stats(x: Tensor, group: Any = None) -> tuple[Tensor | None, Exchange | None]:
    """The statistics that x was handed over with, for a module that shares them with a group of
    processes or keeps to its own, and the exchange that made them the group's already. None where
    there are none of use, or somebody has written to x since."""
    entry = getattr(x, _STATS, None)
    if entry is None or not _is_cow_tensor(x):
        return None, None
    stats, address, exchange = entry
    if _data_address(x) != address or (exchange is not None and exchange.group is not group):
        return None, None
    return stats, exchange
