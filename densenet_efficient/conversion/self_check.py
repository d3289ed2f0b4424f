"""The numerical self-check, on a small random input: before a module is made efficient, its view
must give the source's output in eval mode, and in a training step its output, gradients, running
statistics and dropout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..nn.dense_block import DenseBlockExecution
from ..nn.execution import ORIGINAL, Efficient
from ..nn.residual_dense_block import ResidualDenseBlockExecution
from ..nn.transition import TransitionExecution
from .checks import Unsupported

# Largest difference over the largest value. A wrong order of channels gives errors of order one;
# these bounds leave room for another order of summation, and for TF32 next to float32.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-2,
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}
_CHECKED = (DenseBlockExecution, TransitionExecution, ResidualDenseBlockExecution)
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_view(source: nn.Module, view: Efficient, probe: Callable[[nn.Module], Tensor]) -> str:
    """Raises `Unsupported` unless the view is the source over again. Returns what the report should
    say of it: that it is on the meta device, where there are no outputs to compare, or that it will
    run its original forward, and why; mostly nothing. Training flags, running statistics and
    torch's random state are left as they are, and no hook is called."""
    like = max(source.parameters(), key=Tensor.dim)  # norms may be more precise than convolutions
    if like.dtype not in _TOLERANCE:
        raise Unsupported(f"the weights are {like.dtype}; floating point is expected")
    if like.is_meta:
        return "on the meta device, unchecked"
    x = probe(source).to(like.device, like.dtype)
    with _undisturbed(like.device, source, view):
        with torch.no_grad():
            with _own_statistics(source):
                expected = _run("it", source, x, lambda: source(x.clone()))
            got = _run("the efficient module", view, x, lambda: view(x.clone()))
        _compare("output", expected, got, like.dtype)
        if not isinstance(view, _CHECKED):
            return ""
        chosen = view.path(x)
        if chosen.kind == ORIGINAL:
            return f"runs its original forward: {chosen.reason}"
        _check_training(source, view, x)
    return ""


def _check_training(
    source: nn.Module,
    view: DenseBlockExecution | TransitionExecution | ResidualDenseBlockExecution,
    x: Tensor,
) -> None:
    """One training step of either, without dropout, and the dropout of the source as recorded.

    In float64, whatever the weights are in: in lower precision a value that is normalised to almost
    0 may be rounded to either side of it, and ReLU then passes a whole gradient on or none. Among a
    network's values there is often one."""
    for module in source.modules():
        module.training = True
    view.training = True
    precise = x if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64
    with _DropoutRecorder() as dropout, _own_statistics(source):
        expected = _training_step("it", source, precise, after_forward=dropout.stop)
    _check_dropout(dropout.calls, _declared_dropout(view))
    with _without_dropout(view):
        got = _training_step("the efficient module", view, precise)
    largest = max(value.abs().max().item() for value in expected.values())
    rounding = _TOLERANCE[torch.float64] * largest if precise.dtype == torch.float64 else 0.0
    for name, value in expected.items():
        _compare(f"{name} of a training step", value, got[name], x.dtype, rounding)


def _declared_dropout(view: Efficient) -> list[tuple[float, bool]]:
    """The dropouts of a training step as the adapter has them, in order."""
    if not isinstance(view, DenseBlockExecution):
        return []
    return [
        (rate, parts.channelwise_dropout)
        for parts in view.parts()
        for rate in (parts.bottleneck_drop_rate, parts.drop_rate)
    ]


@contextlib.contextmanager
def _without_dropout(view: Efficient) -> Iterator[None]:
    state, named = view._efficient, view._efficient.parts
    assert named is not None
    rates = {} if isinstance(view, ResidualDenseBlockExecution) else {"drop_rate": 0.0}
    if isinstance(view, DenseBlockExecution):
        rates["bottleneck_drop_rate"] = 0.0
    view._efficient = dataclasses.replace(
        state, parts=lambda module: dataclasses.replace(named(module), **rates), last_call=None
    )
    try:
        yield
    finally:
        view._efficient = state


def _training_step(
    name: str, module: nn.Module, x: Tensor, after_forward: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Output, updated buffers and gradients, of a module with copies of its parameters and buffers
    in x's dtype. The buffers are those of a forward pass alone: checkpointing inside the source may
    update them twice in a backward pass. No hook on a parameter is called."""
    copies = {key: p.detach().to(x.dtype, copy=True) for key, p in module.named_parameters()}
    for key, p in module.named_parameters():
        copies[key].requires_grad_(p.requires_grad)

    def fresh_buffers() -> dict[str, Tensor]:
        return {
            key: buffer.to(x.dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
            for key, buffer in module.named_buffers()
        }

    updated = fresh_buffers()
    with torch.no_grad():
        tensors = copies | updated
        output = _call_with(
            module, tensors, lambda: _run(name, module, x, lambda: module(x.clone()))
        )
        found = {"output": output}
    after_forward()
    found |= updated
    wanted = {"the input": x.clone().requires_grad_()}
    wanted |= {key: p for key, p in copies.items() if p.requires_grad}

    def gradients_of_a_step() -> tuple[Tensor | None, ...]:
        y = _run(name, module, x, lambda: module(wanted["the input"].clone()))
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)

    with torch.enable_grad():  # checkpointing calls the module again in the backward pass
        gradients = _call_with(module, copies | fresh_buffers(), gradients_of_a_step)
    for key, gradient in zip(wanted, gradients, strict=True):
        if gradient is not None:
            found[f"gradient of {key}"] = gradient
    return found


class _Caller(nn.Module):
    """Calls what it is given, so that `functional_call` exchanges a module's tensors for the length
    of any function."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        """What the function returns."""
        return function()


def _call_with(module: nn.Module, tensors: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    """function(), while the module has other parameters and buffers."""
    others = {f"module.{key}": tensor for key, tensor in tensors.items()}
    return torch.func.functional_call(_Caller(module), others, (function,))


class _OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A SyncBatchNorm for the length of a check."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any, as SyncBatchNorm."""


@contextlib.contextmanager
def _own_statistics(source: nn.Module) -> Iterator[None]:
    """Synchronised norms normalise by the batch of this process, which may be the only one that
    checks; those of PyTorch also refuse the CPU."""
    norms = [module for module in source.modules() if type(module) is nn.SyncBatchNorm]
    for norm in norms:
        norm.__class__ = _OwnBatchNorm  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm


class _DropoutRecorder(TorchFunctionMode):
    """Lets every dropout pass its input on, and notes (p, whether whole channels are dropped)."""

    _ELEMENTWISE = (F.dropout, torch.dropout)
    _CHANNELWISE = (F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, bool]] = []
        self._stopped = False

    def stop(self) -> None:
        """Notes no further calls."""
        self._stopped = True

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in self._ELEMENTWISE or func in self._CHANNELWISE:
            names = ("input", "p", "training")
            given = {**dict(zip(names, args, strict=False)), **options}
            drops = given.get("training", True) and given.get("p", 0.5) > 0
            if drops and not self._stopped:
                self.calls.append((float(given.get("p", 0.5)), func in self._CHANNELWISE))
            return given["input"].clone()
        return func(*args, **options)


def _check_dropout(found: list[tuple[float, bool]], declared: list[tuple[float, bool]]) -> None:
    expected = [call for call in declared if call[0] > 0]
    if found != expected:
        raise Unsupported(
            f"it drops out {_dropout_text(found)} in training, the adapter says "
            f"{_dropout_text(expected)}"
        )


def _dropout_text(calls: list[tuple[float, bool]]) -> str:
    kinds = sorted({f"{p:g} of {'channels' if whole else 'values'}" for p, whole in calls})
    return f"{len(calls)} times ({', '.join(kinds)})" if calls else "nothing"


def _run(name: str, module: nn.Module, x: Tensor, call: Callable[[], Tensor]) -> Tensor:
    try:
        return call()
    except Exception as error:
        text = f"{name} fails on a random input of shape {list(x.shape)}: {error}"
        raise Unsupported(text) from error


def _compare(
    what: str, expected: Tensor, got: Tensor, dtype: torch.dtype, rounding: float = 0.0
) -> None:
    """Unsupported where shapes differ, or values by more than the tolerance and than `rounding`,
    which is what may be left of a gradient in which everything cancels."""
    if got.shape != expected.shape:
        raise Unsupported(
            f"the self-check gave {what} of shape {list(got.shape)} instead of "
            f"{list(expected.shape)}"
        )
    if not torch.isfinite(expected).all():
        raise Unsupported(f"its {what} is not finite, so it cannot be checked")
    size = expected.double().abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    if not error <= _TOLERANCE[dtype] * size + rounding:
        raise Unsupported(
            f"the self-check failed: {what}: largest difference {error:.3g}, largest value "
            f"{size:.3g}"
        )


@contextlib.contextmanager
def _undisturbed(device: torch.device, *roots: nn.Module) -> Iterator[None]:
    """Eval mode, no autocast, no hooks and no other processes; then everything as it was, the
    random state included."""
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    saved = []
    for module in modules:
        saved.append((module, {name: module.__dict__[name] for name in ("training", *_CALL_HOOKS)}))
        module.training = False
        if type(module) is nn.SyncBatchNorm and dist.is_available():
            saved[-1][1]["process_group"] = module.process_group
            module.process_group = dist.GroupMember.NON_GROUP_MEMBER
        for name in _CALL_HOOKS:
            module.__dict__[name] = type(module.__dict__[name])()
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(False),
        ):
            yield
    finally:
        for module, state in saved:
            module.__dict__.update(state)
