"""The operators of a block or a transition, called without Python: recorded when a call comes for
the second time, and made again in one go by ``csrc/replay.cpp`` whenever one like it comes.

What such a module does depends on its specification and on the layouts of the tensors it is given,
and never on their values. So its algorithm runs once on tensors without memory; what it calls, on
which part of which tensor, becomes a program. Anything that no program can hold (an operator of
PyTorch's other than a copy, a filling or a new tensor) leaves the algorithm to run as it is
written.
"""

from __future__ import annotations

import collections
import enum
import functools
import operator
import struct
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import compiled
from ..ops.dtypes import FLOATING
from ..ops.interface import CPU_NAMES, NAMES
from .specs import BlockSpec, PoolSpec

aten = torch.ops.aten

Tensors = Tensor | Sequence[Tensor | None] | dict[str, Tensor] | None
Given = Sequence[Tensors]
Results = Sequence[Tensor | None]

MOST_PROGRAMS = 16
"""Kept for one module: shapes that alternate, training and evaluation."""

_OPERATORS = (*NAMES, *CPU_NAMES)
_DTYPES = {dtype: code for code, dtype in enumerate(FLOATING)}
_NEW = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default}
_NEW |= {aten.new_empty.default, aten.new_empty_strided.default}
_ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
_COPIES = {aten._to_copy.default, aten.clone.default}
_MAKE, _COPY, _FILL, _CALL, _DROP, _COPY_ALL, _VIEW = range(7)
_DONE, _OTHER_LAYOUT, _NO_MEMORY = range(3)


_Reference = tuple[int, ...]
"""A tensor or a view of one: the number of the tensor, and the rest as in a program."""

_Step = list[int | _Reference]
"""An instruction."""


class NoProgram(Exception):
    """What no program can hold was called."""


class _Without(enum.Enum):
    """Why there is no program: the call has come once, or no program can hold it."""

    YET = enum.auto()
    ANY = enum.auto()


class Programs:
    """The programs of one module, by what they depend on besides its layers and the layouts of the
    other tensors. To record one takes longer than to run without it, so that shapes which never
    come again have none."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Program | _Without] = {}

    def run(self, function: Callable[..., Results], key: Hashable, given: Given) -> Results:
        """``function(*given)``, from the second time on by its program, if it has one."""
        program = self._kept.get(key)
        if program is _Without.YET:
            program = self._kept[key] = record(function, given) or _Without.ANY
        if isinstance(program, Program):
            results = program.run(_flat(given))
            if results is not None:
                return results
        if program is not _Without.ANY:
            if len(self._kept) >= MOST_PROGRAMS:  # another thread adds, too
                self._kept.clear()
            self._kept[key] = _Without.YET
        return function(*given)


def run(
    spec: BlockSpec | PoolSpec,
    function: Callable[..., Results],
    options: tuple[Any, ...],
    *given: Tensors,
) -> Results:
    """``function(spec, *options, *given)``: tensors that are new, or views of new ones.

    given: tensors, and lists and dictionaries of them; the first is one. Nothing is recorded where
    the specification holds what may differ from call to call, and under a dispatch mode, which is
    to see every operator.
    """
    call = functools.partial(function, spec, *options)
    usual = spec.operators is compiled and spec.exchange is None
    seen = torch._C._len_torch_dispatch_stack() > 0
    if spec.programs is None or not usual or seen:
        return call(*given)
    first = given[0]
    assert isinstance(first, Tensor)
    absent = tuple(value is None for value in given)
    layout = first.dtype, first.shape, first.stride()
    key = (function.__name__, spec.variant, options, absent, layout)
    return spec.programs.run(call, key, given)


def _flat(given: Given) -> list[Tensor]:
    found: list[Tensor] = []
    for value in given:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            values = value.values() if isinstance(value, dict) else value
            found += [tensor for tensor in values if tensor is not None]
    return found


def _mapped(function: Callable[[Tensor], Tensor], value: Tensors) -> Tensors:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: function(tensor) for name, tensor in value.items()}
    return [None if tensor is None else function(tensor) for tensor in value]


class Program:
    """A recorded run: whole numbers in the format of ``csrc/replay.cpp``, and for each result its
    position among the tensors that come out, -1 for None."""

    def __init__(self, numbers: Sequence[int], results: Sequence[int]) -> None:
        self._numbers = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        self._results = taker(results)

    def run(self, given: list[Tensor]) -> Sequence[Tensor | None] | None:
        """The results; None where a tensor has another layout than when this was recorded."""
        status, found = torch.ops.densenet_efficient_calls.replay.default(self._numbers, given)
        if status == _OTHER_LAYOUT:
            return None
        if status == _NO_MEMORY:
            raise torch.OutOfMemoryError(f"no memory on {given[0].device}")
        found.append(None)
        return self._results(found)


def taker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the elements at some places of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda found: [found[place] for place in places]


def record(function: Callable[..., Results], given: Given) -> Program | None:
    """The program of a function of tensors, which runs on tensors without memory; None where there
    is none."""
    try:
        with _Recorder() as recorder:
            hollow = [_mapped(_hollow, value) for value in given]
            recorder.begin(_flat(hollow))
            return recorder.end(function(*hollow))
    except NoProgram:
        return None


def _hollow(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._recording = False
        self._tensors: list[Tensor] = []  # alive, so that no other gets the identity of one
        self._number: dict[int, int] = {}  # of a tensor, by its storage
        self._steps: list[_Step] = []

    def begin(self, given: list[Tensor]) -> None:
        for tensor in given:
            self._know(tensor)
        self._given, self._recording = len(given), True

    def end(self, results: Sequence[Tensor | None]) -> Program:
        self._recording = False
        found = [result for result in results if result is not None]
        returned = [self._reference(result) for result in found]
        steps, tensors = _with_views(self._steps, len(self._tensors))
        last = {reference[0] for reference in returned}
        reversed_steps: list[_Step] = []
        for step in reversed(steps):
            for number in (part[0] for part in step if isinstance(part, tuple)):
                if number >= self._given and number not in last:
                    last.add(number)
                    reversed_steps.append([_DROP, number])
            reversed_steps.append(step)
        program = [self._given]
        for tensor in self._tensors[: self._given]:
            program += _layout(tensor)
        program += [tensors - self._given, len(reversed_steps)]
        for step in reversed(reversed_steps):
            program += _numbers(step)
        program += [len(returned), *_numbers(returned)]
        places = iter(range(len(found)))
        return Program(program, [-1 if result is None else next(places) for result in results])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._recording:
            return func(*args, **kwargs)
        if func.namespace == "densenet_efficient":
            self._call(func, args)
            return None
        if func == aten.copy_.default:
            self._step(_COPY, args[0], args[1])
            return args[0]
        if func == aten._foreach_copy_.default:
            self._step(_COPY_ALL, len(args[0]), *args[0], *args[1])
            return None
        if func == aten.fill_.Scalar:
            self._step(_FILL, args[0], float(args[1]))
            return args[0]
        if func == aten.zero_.default:
            self._step(_FILL, args[0], 0.0)
            return args[0]
        makes = func in _NEW or func in _ZEROS or func in _COPIES
        if not makes and not _is_view(func):
            raise NoProgram(func)
        found = func(*args, **kwargs)
        if makes:
            self._steps.append([_MAKE, self._know(found), *_layout(found)])
            if func in _ZEROS:
                self._step(_FILL, found, 0.0)
            if func in _COPIES:
                self._step(_COPY, found, args[0])
        return found

    def _know(self, tensor: Tensor) -> int:
        number = self._number[tensor.untyped_storage()._cdata] = len(self._tensors)
        self._tensors.append(tensor)
        return number

    def _step(self, *parts: Any) -> None:
        self._steps.append(
            [self._reference(p) if isinstance(p, Tensor) else _bits(p) for p in parts]
        )

    def _call(self, called: Any, arguments: tuple[Any, ...]) -> None:
        expected = called._schema.arguments
        name = called._schema.name.partition("::")[2]
        step: _Step = [_CALL, _OPERATORS.index(name), len(expected)]
        left_out = expected[len(arguments) :]  # those that have their defaults
        values = (*arguments, *(argument.default_value for argument in left_out))
        for argument, value in zip(expected, values, strict=True):
            if value is None:
                step.append(0)
            elif isinstance(value, Tensor):
                optional = isinstance(argument.type, torch.OptionalType)
                step += [1 + optional, self._reference(value)]
            elif isinstance(value, (list, tuple)):
                tensors = argument.type.getElementType().kind() == "TensorType"
                step += [4 if tensors else 5, len(value)]
                step += map(self._reference if tensors else _bits, value)
            else:
                number = float(value) if argument.type.kind() == "FloatType" else value
                step += [3, _bits(number)]
        self._steps.append(step)

    def _reference(self, tensor: Tensor) -> _Reference:
        number = self._number.get(tensor.untyped_storage()._cdata)
        if number is None or tensor.dtype != self._tensors[number].dtype or tensor.is_neg():
            raise NoProgram(tensor)
        whole, own = self._tensors[number], (tensor.shape, tensor.stride(), tensor.storage_offset())
        if own == (whole.shape, whole.stride(), whole.storage_offset()):
            return number, -1
        offset = tensor.storage_offset() - whole.storage_offset()
        return number, tensor.dim(), offset, *tensor.shape, *tensor.stride()


def _with_views(steps: list[_Step], tensors: int) -> tuple[list[_Step], int]:
    """The steps with views that are used more than once made only once, as tensors whose numbers
    follow the given number of them; and how many tensors there are then."""
    uses = collections.Counter(part for step in steps for part in step if isinstance(part, tuple))
    made: dict[_Reference, _Reference] = {}
    found: list[_Step] = []
    for step in steps:
        for part in step:
            if isinstance(part, tuple) and part[1] >= 0 and uses[part] > 1 and part not in made:
                made[part] = tensors + len(made), -1
                found.append([_VIEW, made[part][0], part])
        found.append([made.get(part, part) if isinstance(part, tuple) else part for part in step])
    return found, tensors + len(made)


def _numbers(step: Sequence[int | _Reference]) -> list[int]:
    """A step as a program holds it."""
    return [n for part in step for n in (part if isinstance(part, tuple) else (part,))]


def _layout(tensor: Tensor) -> list[int]:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise NoProgram(tensor.dtype)
    return [code, tensor.dim(), *tensor.shape, *tensor.stride()]


def _bits(value: float) -> int:
    """A number as the 64 bits that an operator's argument takes."""
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return int(value)


def _is_view(called: Any) -> bool:
    """Whether an operator's result is its first argument's memory, and nothing is written."""
    returned = called._schema.returns
    return bool(returned) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returned
    )
