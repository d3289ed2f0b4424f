"""How an output leaves a module of ours: a tensor like any other, which only the next module of
ours knows more about.

A block keeps its feature buffer for the backward pass, and hands it to the caller as well. The
caller may write to what it got, through whatever path; so it gets a copy-on-write clone, which
shares the buffer's memory until somebody writes to either (core/sharing.py). The clone carries the
channel statistics of its values, valid as long as it shares that memory. A transition or norm that
one of our modules calls next is lent the buffer itself, since it does not write to it. A caller
whose input was contiguous gets a contiguous output, as from the original modules, at the price of a
copy; between two modules of ours the output stays channels last.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import sharing
from ..core.exchange import Exchange
from ..core.functions import MatchLayoutFunction, NewFeaturesFunction

_data_address = torch._C._data_address  # type: ignore[attr-defined]
_is_cow_tensor = torch._C._is_cow_tensor  # type: ignore[attr-defined]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_STATS = "_densenet_efficient_stats"
_LENT = "_densenet_efficient_lent"
_PRIVATE = "_densenet_efficient_private"


class Asked(NamedTuple):
    """What a calling module of ours wants of an output.

    contiguous: that it is contiguous or channels last; None: as the module decides by its input.
    to_ours: nobody sees the output before the next module of ours does. lent: that module alone
    will see it and its gradient, and will not write to it. plain: that an original forward, and
    whoever hangs on its modules, finds contiguous memory. shown: that the gradient of the input is
    contiguous, since somebody may see it.
    """

    contiguous: bool | None = None
    lent: bool = False
    to_ours: bool = False
    plain: bool = False
    shown: bool = False


NOTHING = Asked()


class _Caller(threading.local):
    asked = NOTHING


_caller = _Caller()


class asking_for:
    """A context: while one module is called by one of ours."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    def __enter__(self) -> None:
        self._before, _caller.asked = _caller.asked, self._asked

    def __exit__(self, *error: object) -> None:
        _caller.asked = self._before


def asked_for() -> Asked:
    """What a calling module of ours wants; nothing where somebody else calls. Asked once a call, so
    that what the asking module calls itself is somebody else's call."""
    asked, _caller.asked = _caller.asked, NOTHING
    return asked


def prefers_contiguous(x: Tensor) -> bool:
    """Whether the original modules would answer x with contiguous memory: unless x has the strides
    of channels last, or is a slice of what has them. PyTorch takes what is both for contiguous, as
    the images of one channel are."""
    if x.dim() not in _FORMATS:
        return True
    if x.is_contiguous() and not x.is_contiguous(memory_format=_FORMATS[x.dim()]):
        return True
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        stride = x.stride(dim)
        ambiguous = stride == 0 if dim == 1 else dim == 0 and least == x.stride(1)
        if stride < least or ambiguous:
            return True
        least = stride * x.shape[dim] if x.shape[dim] > 1 else stride
    return False


def match_layout(x: Tensor) -> Tensor:
    """x, whose gradient will come back in contiguous memory."""
    return MatchLayoutFunction.apply(x) if x.requires_grad else x


def enter(x: Tensor, asked: Asked) -> tuple[Tensor, bool]:
    """x for the operators, its gradient in the memory that is asked for, and whether the output is
    to be contiguous."""
    contiguous, shown = asked.contiguous, asked.shown
    if contiguous is None:
        contiguous = shown = prefers_contiguous(x)
    return match_layout(x) if shown else x, contiguous


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
    y: Tensor, stats: Tensor | None, asked: Asked, exchange: Exchange | None = None
) -> Tensor:
    """y ``[N, C, *spatial]``, which the caller must not write to, as a tensor that it may write to
    (unless it asked to be lent y), with the statistics ``[2, C]`` of its values: of this process,
    or of all that exchanged them."""
    given = y.contiguous() if asked.contiguous else y
    if asked.lent:
        setattr(given, _LENT, True)
    else:
        given = sharing.share(given)
    if asked.to_ours:
        setattr(given, _PRIVATE, True)
    if stats is not None:
        # Without copy-on-write nothing would tell of a write through `.data`, nor of any write to a
        # tensor of inference mode.
        trusted = asked.to_ours and not _is_cow_tensor(given) and not given.is_inference()
        version = given._version if trusted else None
        setattr(given, _STATS, (stats, _data_address(given), version, exchange))
    return given


def own(x: Any, asked: Asked = NOTHING) -> Any:
    """x for somebody who may write to it, in the memory that is asked for: a copy of what was
    lent."""
    lent = isinstance(x, Tensor) and getattr(x, _LENT, False)  # a tracer's proxy has any attribute
    x = x.clone() if lent else x
    return x.contiguous() if asked.plain else x


def is_private(x: Tensor) -> bool:
    """Whether x comes from a module of ours, and nobody sees it before the next one does."""
    return bool(getattr(x, _PRIVATE, False))


def known_stats(x: Tensor, group: Any = None) -> tuple[Tensor | None, Exchange | None]:
    """The statistics that x was handed over with, for a module that shares them with a group of
    processes or keeps to its own, and the exchange that made them the group's already. None where
    there are none of use, or somebody has written to x since."""
    entry = getattr(x, _STATS, None)
    if entry is None:
        return None, None
    stats, address, version, exchange = entry
    untouched = _is_cow_tensor(x) if version is None else x._version == version
    if not untouched or _data_address(x) != address:
        return None, None
    if exchange is not None and exchange.group is not group:
        return None, None
    return stats, exchange
