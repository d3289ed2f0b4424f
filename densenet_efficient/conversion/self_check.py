"""The numerical self-check: before a replacement is kept, it must hold the source's very tensors
under the source's keys and give the source's output on a small random input in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from ..nn.dense_block import EfficientDenseBlock
from .adapters import Unsupported

# Largest difference over the largest output. A wrong order of channels gives errors of order one;
# these bounds leave room for another order of summation, and for TF32 beside float32.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-2,
    torch.bfloat16: 1e-1,
    torch.float16: 2e-2,
}
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_replacement(
    source: nn.Module, replacement: nn.Module, probe: Callable[[nn.Module], Tensor]
) -> str:
    """Raises `Unsupported` unless the replacement is the source over again. Returns what the report
    should say of it: that it is on the meta device, where there are no outputs to compare, or that
    it will run its original forward, and why; mostly nothing. Training flags, running statistics
    and torch's random state are left as they are, and no hook is called."""
    _check_same_tensors(source, replacement)
    like = next(source.parameters())
    if like.dtype not in _TOLERANCE:
        raise Unsupported(f"the weights are {like.dtype}; floating point is expected")
    if like.is_meta:
        return "on the meta device, unchecked"
    x = probe(source).to(like.device, like.dtype)
    with (
        torch.no_grad(),
        torch.autocast(like.device.type, enabled=False),
        _at_rest(source, replacement),
    ):
        expected = _run("it", source, x)
        actual = _run("the replacement", replacement, x)
        path = replacement.path(x) if isinstance(replacement, EfficientDenseBlock) else None
    if actual.shape != expected.shape:
        raise Unsupported(
            f"the self-check gave shape {list(actual.shape)} instead of {list(expected.shape)}"
        )
    if not torch.isfinite(expected).all():
        raise Unsupported("its output is not finite, so it cannot be checked")
    size = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    if not error <= _TOLERANCE[like.dtype] * size:
        raise Unsupported(
            f"the self-check failed: largest difference {error:.3g}, largest output {size:.3g}"
        )
    if path is not None and path.kind == "original":
        return f"runs its original forward: {path.reason}"
    return ""


def _run(name: str, module: nn.Module, x: Tensor) -> Tensor:
    try:
        return module(x.clone()).double()
    except Exception as error:
        text = f"{name} fails on a random input of shape {list(x.shape)}: {error}"
        raise Unsupported(text) from error


def _check_same_tensors(source: nn.Module, replacement: nn.Module) -> None:
    def tensors(module: nn.Module) -> list[tuple[str, int]]:
        parameters = module.named_parameters(remove_duplicate=False)
        buffers = module.named_buffers(remove_duplicate=False)
        return [(name, id(tensor)) for name, tensor in chain(parameters, buffers)]

    keys = list(source.state_dict(keep_vars=True))
    if tensors(source) != tensors(replacement) or keys != list(replacement.state_dict()):
        raise Unsupported("the replacement does not hold the same parameters under the same keys")


@contextlib.contextmanager
def _at_rest(*roots: nn.Module) -> Iterator[None]:
    """Eval mode without hooks, then everything as it was."""
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    saved = []
    for module in modules:
        saved.append((module, {name: module.__dict__[name] for name in ("training", *_CALL_HOOKS)}))
        module.training = False
        for name in _CALL_HOOKS:
            module.__dict__[name] = type(module.__dict__[name])()
    try:
        yield
    finally:
        for module, state in saved:
            module.__dict__.update(state)
