"""What must hold of a module before it can be converted, and the inputs that it is checked on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations as plain_type

from ..nn.layers import CONVOLUTIONS, LayerParts, in_channels, per_axis
from ..nn.norms import BATCH_NORMS, activation_problem, is_batch_norm


class Unsupported(ValueError):
    """Why one module cannot be converted; the message starts with a module's name."""


def convolution_dims(convolution: nn.Module) -> int:
    """1, 2 or 3."""
    return CONVOLUTIONS.index(plain_type(convolution)) + 1


def input_channels(module: nn.Module) -> int:
    """Of a convolution or norm, as its weight has them, which alone PyTorch's forward reads; a
    weight that is computed is not evaluated here, and the attribute believed."""
    weight = module._parameters.get("weight")
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if weight is None else in_channels(module)
    return module.num_features if weight is None else len(weight)  # type: ignore[return-value]


def random_probe(channels: int, dims: int, size: int = 5) -> Tensor:
    """[2, channels, size, size + 1, ...], the same numbers every time, torch's own random state
    untouched. Odd and uneven sides tell edges and axes apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *range(size, size + dims), generator=generator)


def check_relu(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is exactly torch's ReLU."""
    if plain_type(module) is not nn.ReLU:
        raise Unsupported(f"{name} is {type(module).__name__}; only ReLU is supported")


def check_batch_norm(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is a batch norm, and nothing but a ReLU follows inside
    where it includes its activation."""
    if plain_type(module) not in BATCH_NORMS and not is_batch_norm(module):
        raise Unsupported(f"{name} is {type(module).__name__}; only batch norms are supported")
    problem = activation_problem(module)
    if problem is not None:
        raise Unsupported(f"{name} {problem}; only ReLU is supported")


def check_convolution(name: str, module: nn.Module) -> None:
    """Raises `Unsupported` unless the module is torch's own convolution, ungrouped, of stride 1."""
    if plain_type(module) not in CONVOLUTIONS:
        raise Unsupported(f"{name} is {type(module).__name__}; only convolutions are supported")
    assert isinstance(module, CONVOLUTIONS)
    stride = per_axis(module.stride, convolution_dims(module))
    if module.groups != 1 or set(stride) != {1} or module.padding_mode != "zeros":
        raise Unsupported(
            f"{name} has groups {module.groups}, stride {stride} and padding mode "
            f"{module.padding_mode!r}; supported are 1, 1 and 'zeros'"
        )


def check_layer_parts(name: str, parts: LayerParts) -> None:
    """Raises `Unsupported`, naming the part, unless norms and convolutions are torch's own."""
    check_batch_norm(f"{name}: norm1", parts.norm1)
    check_convolution(f"{name}: conv1", parts.conv1)
    second = [part for part in (parts.conv2, parts.tail) if part is not None]
    if len(second) != (0 if parts.norm2 is None else 1):
        raise Unsupported(f"{name} has only one of norm2 and conv2, or conv2 and a tail")
    if parts.norm2 is not None:
        check_batch_norm(f"{name}: norm2", parts.norm2)
    if parts.conv2 is not None:
        check_convolution(f"{name}: conv2", parts.conv2)
    if parts.tail is not None:
        check_tail(f"{name}: the tail", parts.tail)


def check_tail(name: str, tail: nn.Module) -> None:
    """Raises `Unsupported` for a tail that may not run twice: with buffers, which a forward may
    update, or dropout."""
    for path, module in tail.named_modules():
        if module._buffers or isinstance(module, nn.modules.dropout._DropoutNd):
            raise Unsupported(f"{name} must be without buffers and dropout, but {path} has them")


def check_kinds(module: nn.Module) -> None:
    """Raises `Unsupported` for what no adapter can convert: scripted, quantised or
    quantisation-aware, and uninitialised lazy modules, inside or at the top."""
    for name, inner in module.named_modules():
        where = name or type(inner).__name__
        if isinstance(inner, torch.jit.ScriptModule):
            raise Unsupported(f"{where} is a script module; convert before scripting")
        home = type(inner).__module__
        if home.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")) or (
            getattr(inner, "qconfig", None) is not None
        ):
            raise Unsupported(f"{where} is quantised or prepared for quantisation")
        for tensor in (*inner._parameters.values(), *inner._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                raise Unsupported(f"{where} is lazy and not initialised; run one batch first")
