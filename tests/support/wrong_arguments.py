"""Wrong calls of an operator, made from a right one by changing one argument.

Every change is one that no call of that operator may have, whatever its sizes, so that the operator
must refuse it by name before it writes anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densenet_efficient.ops import compiled
from densenet_efficient.ops.interface import Operators
from tools.op_cases import OPERATORS, Case, accumulates

REFUSAL = RuntimeError
"""What an operator raises. PyTorch's dispatcher raises a kind of it, too."""
DISPATCHER = "arguments from the 'Sparse"
LEADING = {"norm_fold": ("stats",), "norm_correction": ("norm",)}
"""What gives the shapes that the others are held to, where it is not x and weight."""
ARGUMENTS = {
    op: tuple(inspect.signature(getattr(Operators, op)).parameters)[1:] for op in OPERATORS
}


@dataclass(frozen=True)
class WrongCall:
    """op, its arguments, the one that is wrong, and how."""

    op: str
    argument: str
    what: str
    arguments: tuple[Any, ...]

    def refuse(self) -> str:
        """The operator's message; fails unless it refuses the call and leaves all as it was."""
        before = [bits(value) for value in self.arguments]
        try:
            getattr(compiled, self.op)(*self.arguments)
        except REFUSAL as error:
            message = str(error)
        else:
            raise AssertionError(f"{self.op} took {self.argument}: {self.what}")
        after = [bits(value) for value in self.arguments]
        assert before == after, f"{self.op} changed something after {self.argument}: {self.what}"
        assert self.op in message, message
        leading = LEADING.get(self.op, ("x", "weight"))
        names = "|".join(ARGUMENTS[self.op] if self.argument in leading else (self.argument,))
        named = re.search(rf"(:|and|with) ({names})\b|'({names})'", message)
        assert named or DISPATCHER in message, message
        return message


def bits(value: Any) -> Any:
    """What must be equal before and after: a tensor's own memory, all of it, or the value."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout is not torch.strided or value.is_meta:
        return (value.shape, value.dtype)
    memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())  # type: ignore[call-overload]
    return memory.numpy().tobytes()


def _other_dtypes(value: Tensor) -> Iterator[Tensor]:
    for dtype in (torch.float64, torch.float32, torch.int64, torch.complex64, torch.bool):
        if dtype != value.dtype:
            yield value.nan_to_num().to(dtype)


def _spread(value: Tensor) -> Tensor:
    """The same values, with a gap between neighbouring channels."""
    return value.repeat_interleave(2, dim=-1)[..., ::2]


def _uneven(value: Tensor) -> Tensor:
    """Rows of two images further apart than those within one."""
    whole = value.new_zeros(value.shape[0], value.shape[1] + 1, *value.shape[2:])
    whole[:, :-1] = value
    return whole[:, :-1]


def _tensor_changes(
    case: Case, name: str, value: Tensor, accumulated: bool
) -> Iterator[tuple[str, Any]]:
    written, optional = name in case.written, name in ("gamma", "beta", "stats", "dweight", "y")
    if not optional or (name == "y" and case.op.endswith("forward")):
        yield "None", None
    yield "a number", 3
    yield "a list", [value]
    yield "on the meta device", value.to("meta")
    yield "sparse", value.nan_to_num().to_sparse()
    for other in _other_dtypes(value):
        lead = name == "x" and other.dtype.is_floating_point
        yield f"{other.dtype}", other if not lead else other.to(torch.int32)
    yield "a dimension more", value.unsqueeze(0)
    if value.dim() > 1:
        yield "a dimension less", value.select(0, 0)
    free: Collection[int] = ()  # the dimensions along which another size may be right as well
    if name == "x" and case.op == "channel_stats":
        free = (0,)
    elif name == "x" and case.op in ("stem_forward", "transition_forward"):
        free = range(1, value.dim() - 1)  # two sizes are pooled to one
    elif name == "correction" and accumulated:
        free = (1,)
    for dim in range(value.dim()):
        if dim in free:
            continue
        longer = torch.cat([value, value.narrow(dim, 0, 1)], dim) if value.shape[dim] else value
        if longer is not value:
            yield f"one more along dimension {dim}", longer
    yield "no channels", value[..., :0]
    if value.dim() > 1 and name not in ("weight",) and value.shape[-1] > 1:
        yield "a gap between channels", _spread(value)
    rows = value.numel() > 0  # without any, no distance is wrong
    if rows and value.dim() > 2 and name not in ("weight", "dweight") and min(value.shape[:2]) > 1:
        yield "rows at uneven distances", _uneven(value)
    if rows and value.dim() > 1 and name != "weight" and value.shape[0] > 1:
        yield "one row repeated", value[:1].expand(value.shape)
    if written:
        yield "a negative view", torch._neg_view(value)
        for other, tensor in case.arguments.items():
            same = isinstance(tensor, Tensor) and other != name and tensor.numel()
            if same and value.numel() and tensor.dtype == value.dtype:
                yield from _overlapping(value, other, tensor)


def _overlapping(value: Tensor, other: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """Something of value's shape in memory that begins with the other argument's last element."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.untyped_storage()
    begin = tensor.storage_offset() + last
    if begin + value.numel() <= storage.nbytes() // tensor.element_size():
        strides = torch.empty(value.shape, device="meta").stride()
        yield (
            f"beginning inside {other}",
            value.new_empty(0).set_(storage, begin, value.shape, strides),
        )
    if tensor.shape == value.shape and tensor.stride() == value.stride():
        yield f"the same memory as {other}", tensor


def wrong_calls(case: Case) -> Iterator[WrongCall]:
    """Every wrong call that can be made from `case`."""
    given = case.arguments
    accumulated = bool(given.get("accumulate")) and not accumulates(case.op, given)

    def changed(name: str, what: str, value: Any) -> WrongCall:
        return WrongCall(case.op, name, what, tuple((given | {name: value}).values()))

    for name, value in given.items():
        if isinstance(value, Tensor):
            for what, other in _tensor_changes(case, name, value, accumulated):
                yield changed(name, what, other)
        elif name == "count":
            for wrong in (-1, 1.5, float("nan"), "7", None, 2**70):
                yield changed(name, repr(wrong), wrong)
        elif name == "eps":
            for wrong in (None, "1e-5"):
                yield changed(name, repr(wrong), wrong)
    if given.get("correction") is not None and case.op == "norm_relu_conv3x3_backward":
        yield changed("y", "None with a correction", None)
