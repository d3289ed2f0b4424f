"""What a step is surrounded by: each procedure takes a model and a leaf x and returns every tensor
that is to be the same for the plain module and for ours."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Results = dict[str, Tensor]
Procedure = Callable[[nn.Module, Tensor], Results]


def weights(y: Tensor, seed: int = 0) -> Tensor:
    """A gradient for y, in memory as PyTorch would make it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def backward(y: Tensor, seed: int = 0, **options: Any) -> None:
    if y.requires_grad:
        y.backward(weights(y, seed), **options)


def collected(model: nn.Module, **tensors: Tensor | None) -> Results:
    """Those tensors, every gradient of a parameter, and every buffer."""
    found = {name: value for name, value in tensors.items() if value is not None}
    found |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in found.items()}


def ordinary(model: nn.Module, x: Tensor) -> Results:
    y = model(x)
    backward(y)
    return collected(model, y=y, x=x.grad)


def without_grad(model: nn.Module, x: Tensor) -> Results:
    with torch.no_grad():
        return collected(model, y=model(x))


def inference(model: nn.Module, x: Tensor) -> Results:
    with torch.inference_mode():
        return collected(model, y=model(x))


def _checkpointed(reentrant: bool) -> Procedure:
    def run(model: nn.Module, x: Tensor) -> Results:
        y = checkpoint(model, x, use_reentrant=reentrant)
        backward(y)
        return collected(model, y=y, x=x.grad)

    return run


def _within(context: Callable[[], AbstractContextManager[Any]]) -> Procedure:
    def run(model: nn.Module, x: Tensor) -> Results:
        with context():
            y = model(x)
        backward(y)
        return collected(model, y=y, x=x.grad)

    return run


def casting() -> AbstractContextManager[Any]:
    """Saved tensors come back contiguous, from another dtype."""
    return saved_tensors_hooks(
        lambda t: (t.dtype, t.double() if t.is_floating_point() else t),
        lambda packed: packed[1].to(packed[0]).contiguous(),
    )


def deep_copies(model: nn.Module, x: Tensor) -> Results:
    """A copy before the step, one between forward and backward, and the model afterwards."""
    twin = copy.deepcopy(model)
    y = model(x)
    later = copy.deepcopy(model)
    backward(y)
    first = collected(model, y=y, x=x.grad)
    rest = {}
    for name, other in (("twin", twin), ("later", later)):
        step = ordinary(other, x.detach().clone().requires_grad_())
        rest |= {f"{name}.{key}": value for key, value in step.items()}
    return first | rest


def two_forwards(model: nn.Module, x: Tensor) -> Results:
    first, second = model(x), model(x.flip(0) * 0.5)
    backward(first)
    backward(second, 1)
    return collected(model, first=first, second=second, x=x.grad)


def never_backward(model: nn.Module, x: Tensor) -> Results:
    model(x * 2)
    kept = model(x * 3)
    step = ordinary(model, x)
    return step | {"kept": kept.detach().clone()}


def retained(model: nn.Module, x: Tensor) -> Results:
    y = model(x)
    backward(y, retain_graph=True)
    backward(y, 1)
    return collected(model, y=y, x=x.grad)


def interleaved(model: nn.Module, x: Tensor) -> Results:
    twin = copy.deepcopy(model)
    other = (x.detach() * 0.5).requires_grad_()
    y, z = model(x), twin(other)
    backward(y)
    backward(z, 1)
    return collected(model, y=y, x=x.grad) | {
        f"twin.{k}": v for k, v in collected(twin, y=z, x=other.grad).items()
    }


def threads(model: nn.Module, x: Tensor) -> Results:
    """Two copies, each in a thread of its own, two steps each."""
    found: list[Results] = [{}, {}]

    def run(index: int, own: nn.Module, x: Tensor) -> None:
        ordinary(own, x)
        found[index] = ordinary(own, x)

    started = []
    for index in range(2):
        leaf = (x.detach() * (index + 1)).requires_grad_(x.requires_grad)
        started.append(threading.Thread(target=run, args=(index, copy.deepcopy(model), leaf)))
        started[-1].start()
    for thread in started:
        thread.join()
    return {f"{index}.{k}": v for index, step in enumerate(found) for k, v in step.items()}


def in_place(model: nn.Module, x: Tensor) -> Results:
    y = model(x)
    y.mul_(0.5)
    y += 1
    backward(y)
    return collected(model, y=y, x=x.grad)


def data_in_place(model: nn.Module, x: Tensor) -> Results:
    y = model(x)
    y.data.fill_(torch.nan)
    backward(y)
    return collected(model, x=x.grad)


def accumulated(model: nn.Module, x: Tensor) -> Results:
    ordinary(model, x)
    return ordinary(model, x)


def tensor_hooks(model: nn.Module, x: Tensor) -> Results:
    seen: list[Tensor] = []
    y = model(x)
    if y.requires_grad:
        y.retain_grad()
        y.register_hook(lambda gradient: gradient * 0.5)
        y.register_hook(lambda gradient: seen.append(gradient.clone()))
    backward(y)
    return collected(model, y=y, x=x.grad, dy=y.grad if y.requires_grad else None) | {
        f"seen{i}": gradient for i, gradient in enumerate(seen)
    }


def gradients_as_values(model: nn.Module, x: Tensor) -> Results:
    """torch.autograd.grad, without touching .grad."""
    y = model(x)
    leaves = {"x": x, **dict(model.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not y.requires_grad:
        return collected(model, y=y)
    found = torch.autograd.grad(y, list(leaves.values()), weights(y), allow_unused=True)
    named = {f"{n}.grad": g for n, g in zip(leaves, found, strict=True) if g is not None}
    return collected(model, y=y, **named)


def twice_differentiated(model: nn.Module, x: Tensor) -> Results:
    if not x.requires_grad:
        return ordinary(model, x)
    y = model(x)
    (dx,) = torch.autograd.grad(y, x, weights(y), create_graph=True)
    backward(dx, 1)
    return collected(model, y=y, x=x.grad, **{"first.grad": dx})


def hooked(index: int) -> Procedure:
    """A hook somewhere inside that changes an output, and a step after it was removed."""

    def run(model: nn.Module, x: Tensor) -> Results:
        inside = list(model.modules())
        handle = inside[index % len(inside)].register_forward_hook(lambda *args: args[2] * 0.5)
        first = ordinary(model, x)
        handle.remove()
        return {f"hooked.{name}": value for name, value in first.items()} | ordinary(model, x)

    return run


PROCEDURES: dict[str, Procedure] = {
    "ordinary": ordinary,
    "no_grad": without_grad,
    "inference_mode": inference,
    "checkpoint, reentrant": _checkpointed(True),
    "checkpoint": _checkpointed(False),
    "save_on_cpu": _within(save_on_cpu),
    "casting saved-tensor hooks": _within(casting),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "deep copies": deep_copies,
    "two forwards": two_forwards,
    "never a backward": never_backward,
    "retain_graph": retained,
    "interleaved": interleaved,
    "threads": threads,
    "in place": in_place,
    "in place through data": data_in_place,
    "accumulated": accumulated,
    "tensor hooks": tensor_hooks,
    "autograd.grad": gradients_as_values,
    "double backward": twice_differentiated,
    **{f"hook {index}": hooked(index) for index in (0, 1, 2, 5, 11)},
}
