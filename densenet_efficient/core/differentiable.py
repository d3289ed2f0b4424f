"""The block, the transition and the stem once more, through PyTorch's differentiable operators.

The backward passes of `functions` give first derivatives to ordinary eager tensors. Everything
else that PyTorch asks of a backward pass (a graph of the gradients for double backward, batched
gradients under `torch.func.vmap`, a tensor subclass) is answered by differentiating these, at the
memory and speed of the plain modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import pools
from ..ops.convolution import ConvOptions
from . import eager
from .dropout import draw_mask, mask_shape
from .specs import PARAMETERS_PER_LAYER, BlockSpec, NormSpec, PoolSpec


def _norm_relu(x: Tensor, spec: NormSpec, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    mean, var = (None, None) if spec.running is None else spec.running
    batch = spec.running is None
    gamma = None if gamma is None else gamma.contiguous()  # see `nn.norms.batch_norm`
    return F.relu(F.batch_norm(x, mean, var, gamma, beta, batch, 0.0, spec.eps))


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions | None
) -> Tensor:
    if options is None:
        dims = x.dim() - 2
        padding = tuple(size // 2 for size in weight.shape[2:])
        options = ConvOptions(padding, (1,) * dims)
    bias = None if bias is None else bias.to(x.dtype)
    return options.forward(x, weight.to(x.dtype), bias)


def dense_block(spec: BlockSpec, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """x ``[N, C_0, *spatial]`` -> ``[N, C_total, *spatial]``, with the call's dropout masks."""
    features = x
    for index, layer in enumerate(spec.layers):
        start = index * PARAMETERS_PER_LAYER
        gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2 = parameters[
            start : start + PARAMETERS_PER_LAYER
        ]
        assert weight1 is not None
        new = _norm_relu(features, layer.norm1, gamma1, beta1)
        new = _convolution(new, weight1, bias1, layer.conv1)
        if layer.bottleneck_drop_rate > 0:
            new = _dropped(spec, index, new, bottleneck=True)
        if layer.norm2 is not None and layer.tail is not None:
            z = _norm_relu(new, layer.norm2, gamma2, beta2)
            new = layer.tail.call(z, parameters[spec.tail_parameters(index)])
        elif layer.norm2 is not None and weight2 is not None:
            new = _norm_relu(new, layer.norm2, gamma2, beta2)
            new = _convolution(new, weight2, bias2, layer.conv2)
        if layer.drop_rate > 0:
            new = _dropped(spec, index, new)
        features = torch.cat((new, features) if spec.newest_first else (features, new), 1)
    return features


def _dropped(spec: BlockSpec, index: int, x: Tensor, bottleneck: bool = False) -> Tensor:
    shape = mask_shape(spec, index, (x.shape[0], *x.shape[2:], x.shape[1]))
    mask = torch.empty(shape, dtype=x.dtype, device=x.device)
    return x * draw_mask(spec, index, mask, bottleneck).movedim(-1, 1)


def transition(
    spec: PoolSpec,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x ``[N, C, *spatial]`` -> ``[N, K, *(spatial // 2)]``; without pooling ``*spatial``."""
    y = _convolution(_norm_relu(x, spec.norm, gamma, beta), weight, bias, None)
    if not spec.pools:
        return y
    return pools.AVG_POOL[x.dim() - 2](y, 2, 2)


def stem(spec: PoolSpec, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """x ``[N, C, *spatial]`` -> ``[N, C, *ceil(spatial / 2)]``."""
    return pools.MAX_POOL[x.dim() - 2](_norm_relu(x, spec.norm, gamma, beta), 3, 2, 1)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution: x ``[N, C, *spatial]``, weight ``[K, C, 1, ...]`` -> y
    ``[N, K, *spatial]``."""
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor
) -> list[Tensor | None]:
    """Of ``function(*inputs)`` with respect to those inputs that require them, for the output's
    gradient dy. Where gradients are being recorded, they are themselves differentiable."""
    create_graph = torch.is_grad_enabled()

    def own(x: Tensor | None) -> Tensor | None:
        """An input of this function alone: one may depend on another, as a block's input, read off
        its output, depends on the parameters."""
        if x is None:
            return None
        return x.view_as(x) if create_graph else x.detach().requires_grad_(x.requires_grad)

    with torch.enable_grad():
        inputs = [own(x) for x in inputs]
        with eager.without_autocast(dy.device):
            y = function(*inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
