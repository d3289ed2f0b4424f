"""What the dense block, the transition and the feature extractor have in common: the decision how
one call runs, made in one place from what is true at that call.

What the operators are not known to do right (another mode of execution, another kind of tensor, a
hook, a replaced module) runs the original forward, the reason at hand.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import eager
from ..ops import dispatch
from ..ops.dispatch import Dispatch
from ..ops.dtypes import FLOATING
from . import watch
from .norms import process_group

ORIGINAL = "original"
EMPTY = "the input is empty"
# On the CPU PyTorch sums in float64 and may stay finite where float32 does not.
OVERFLOW = "the statistics of this batch are not finite in float32"
FEWEST = 8
FEW = f"batch statistics of fewer than {FEWEST} values, in which most of a gradient cancels"


class _Recorder(threading.local):
    entries: list[tuple[nn.Module, str, Dispatch]] | None = None


_recorder = _Recorder()


@contextmanager
def recording() -> Iterator[list[tuple[nn.Module, str, Dispatch]]]:
    """Collects (module, part of it, dispatch) of every call of this thread, in order."""
    before, _recorder.entries = _recorder.entries, []
    try:
        yield _recorder.entries
    finally:
        _recorder.entries = before


def record(module: nn.Module, part: str, chosen: Dispatch, norms: Iterable[nn.Module] = ()) -> None:
    """Notes how a call runs, and with how many processes its norms share their statistics in
    training, where somebody is `recording`."""
    if _recorder.entries is None:
        return
    groups = (process_group(norm, training=True) for norm in norms)
    group = next((group for group in groups if group is not None), None)
    if group is not None:
        others = f"in training, statistics are shared between {group.size()} processes"
        chosen = replace(chosen, reason=f"{chosen.reason}; {others}")
    _recorder.entries.append((module, part, chosen))


@dataclass
class State:
    """What an efficient module knows beyond what its children are.

    structure: the children that the execution was made for. warned: the last reason for an original
    forward that was told. parts: of a dense block or a transition. memory, kept_layers, layers,
    with_input, newest_first: of a dense block, see `nn.dense_block`. last_call: what the next call
    of a block or a transition need not find again; not copied, and not stored.
    """

    structure: watch.Structure
    warned: str | None = None
    memory: str = ""
    kept_layers: int = 0
    parts: Callable[[nn.Module], Any] | None = None
    layers: Callable[[nn.Module], Any] | None = None
    with_input: Callable[[nn.Module], bool] | None = None
    newest_first: bool = False
    last_call: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process the classes of the structure are not known yet."""
        self.__dict__.update(state)
        watch.know_all(self.structure)


class Efficient(nn.Module):
    """A module whose children are ordinary modules and whose execution is ours.

    Its class derives from the one whose forward is the original (`original_class`), so that
    `isinstance` goes on working, and adds one attribute, `_efficient`: names of other libraries'
    blocks are theirs.
    """

    original_class: ClassVar[type[nn.Module]]
    _efficient: State

    def _adopt(self, **state: Any) -> None:
        """Takes the present children as those that the execution is made for."""
        self._efficient = State(watch.structure_of(self.named_children()), **state)

    def _patch(self) -> str | None:
        """What somebody replaced in PyTorch or in a class of ours or of the children."""
        watch.know(self.original_class)
        return watch.patch()

    def _change(self) -> str | None:
        """What is not as the execution expects it, inside this module."""
        return self._patch() or watch.change(self._watched(), self._efficient.structure)

    def _watched(self) -> dict[str, nn.Module | None]:
        """The children that the execution replaces, by name."""
        return self._modules

    def _input_problem(self, x: Any) -> str | None:
        """`input_problem`, except that no images are an input like any other where processes share
        statistics: the others wait for this one's part of them."""
        reason = input_problem(x)
        if (
            reason is EMPTY
            and 0 not in x.shape[1:]
            and any(process_group(module) is not None for module in self.modules())
        ):
            return None
        return reason

    def _run_original(self, chosen: Dispatch, *args: Any) -> Any:
        """The original forward; a reason that lies in the model warns when it is new. ValueError
        where input and parameters do not meet on the meta device, which PyTorch would let pass, and
        where there is no original: SyncBatchNorm on the CPU. TypeError for what is no tensor."""
        check_is_tensor(args[0])
        check_synchronised(self, args[0], chosen.reason)
        record(self, "", chosen)
        first = next(self.parameters(), None)
        x = args[0]
        if type(x) is Tensor and first is not None and x.is_meta != first.is_meta:
            raise ValueError(f"input must be on {first.device} like the parameters, got {x.device}")
        in_input = chosen.reason is FEW or input_problem(x) is not None
        if chosen.reason != self._efficient.warned and not in_input:
            self._efficient.warned = chosen.reason
            warnings.warn(
                f"{type(self).__name__} runs its original forward: {chosen.reason}", stacklevel=4
            )
        return self._original(*args)

    def _original(self, *args: Any) -> Any:
        return self.original_class.forward(self, *args)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__}: script the plain model, after "
            "densenet_efficient.unconvert(model), or one of densenet_efficient.reference"
        )


def input_problem(x: Any) -> str | None:
    """Why the original forward must answer x, in words: another mode than eager execution, another
    kind of input. None where the operators can."""
    mode = eager.unusual_mode()
    if mode is not None:
        return mode
    if not isinstance(x, Tensor):
        return f"the input is a {type(x).__name__}"
    if not eager.is_ordinary(x):
        return f"the input is a {type(x).__name__} of layout {x.layout} on {x.device}"
    if x.numel() == 0:
        return EMPTY
    return None


def has_few_values(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a block that takes batch statistics of x, in a dtype, must not leave what they bring
    to a gradient until later: between two values it is all of the gradient, and the sum that waits
    for it would be rounded where little is left of it. A single value is refused anyway."""
    return dtype != torch.float64 and x.dim() > 2 and 1 < x.numel() // x.shape[1] < FEWEST


def check_is_tensor(x: Any) -> None:
    """TypeError unless x is a tensor, something that stands for one, as a tracer's does, or a list
    of them."""
    parts = x if isinstance(x, (list, tuple)) and x else [x]
    for part in parts:
        if not isinstance(part, Tensor) and not hasattr(type(part), "__torch_function__"):
            kind = "None" if part is None else type(part).__name__
            inside = f" in a {type(x).__name__}" if part is not x else ""
            raise TypeError(f"input must be a tensor or a list of tensors, got {kind}{inside}")


def check_synchronised(module: nn.Module, x: Any, reason: str) -> None:
    """ValueError where the original forward of a module, for the reason at hand, would have to
    share statistics between processes on the CPU, where PyTorch's SyncBatchNorm does not."""
    cpu = isinstance(x, Tensor) and x.device.type == "cpu"
    if cpu and any(process_group(child) is not None for child in module.modules()):
        raise ValueError(
            "input must be on a GPU for the original forward of SyncBatchNorm, got one on cpu: "
            f"{type(module).__name__} cannot run on the operators, because {reason}"
        )


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The dtype of PyTorch's convolutions of x: autocast's, or x's own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def pooling_dtype(x: Tensor, dims: int) -> torch.dtype:
    """The dtype of PyTorch's pooling of a convolution of x: on the CPU autocast pools images of
    three dimensions in float32."""
    dtype = convolution_dtype(x)
    on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.promote_types(dtype, torch.float32) if on_cpu and dims == 3 else dtype


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype the operators run in, that of PyTorch's concatenation of x with convolutions of x.
    Norms and concatenations that autocast leaves in float32 are not rounded to less here."""
    return torch.promote_types(x.dtype, convolution_dtype(x))


def choose(x: Tensor, dims: int, dtype: torch.dtype | None = None) -> Dispatch:
    """Which operators run a module of ``dims`` image dimensions on x, in its `working_dtype` or the
    one given."""
    dtype = dtype or working_dtype(x)
    chosen = dispatch.choose(x.device, dtype, dims)
    if dtype != convolution_dtype(x):
        reason = f"{chosen.reason}, in which autocast leaves the norms of this input"
        return replace(chosen, reason=reason)
    return chosen


def check_input(x: Tensor, dims: int, channels: int, weight: Tensor, name: str) -> None:
    """ValueError for a wrong rank, number of channels or device; TypeError for a dtype that is not
    floating or differs from the weight's outside autocast."""
    if x.dim() != dims + 2:
        shape = ["N", "C", "D", "H", "W"][:2] + ["D", "H", "W"][3 - dims :]
        raise ValueError(
            f"input must have {dims + 2} dimensions [{', '.join(shape)}], got shape {list(x.shape)}"
        )
    if x.shape[1] != channels:
        raise ValueError(f"input must have {channels} channels, got shape {list(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"input must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"input must be on {weight.device} like {name}.weight, got {x.device}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"input must be {weight.dtype} like {name}.weight, got {x.dtype}")
