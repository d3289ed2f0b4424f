"""The dense block's algorithm, forward and backward.

Read it beside ``docs/design.md``. One channels-last feature buffer F ``[N, *spatial, C_total]`` per
block is the block's output: layer l reads its first ``C_l`` channels and writes its ``k`` new ones
behind them. Batch statistics belong to channels and are taken once, when a channel is written. In
backward one gradient buffer E of F's shape starts as the gradient of the output, every layer adds
``a dz`` to its inputs, and the batch-norm terms P and Q, two vectors shared by all consumers of a
channel, are applied when backward reaches the layer that produced it.

    forward, layer l                          backward, layer l (from the last to the first)
    norm1 = fold(stats[:C_l])                 dy  = E[slice] - P - (F[slice] - mean) Q
    b     = relu(norm1 F[:C_l]) W1^T  (A)     dz2 = conv3x3^T(dy, W2) [norm2 b > 0]
    norm2 = fold(stats of b)                  db  = a2 dz2 - p2 - (b - mean2) q2
    F[slice] = conv3x3(relu(norm2 b)) (B)     dz1 = (db W1) [norm1 F > 0];  E[:C_l] += a1 dz1

``store`` keeps b of every layer for backward; ``recompute`` keeps F and the statistics only and
runs stage A again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..ops import fallback
from ..ops.fallback import accumulation_dtype
from . import arena, layout
from .layout import flat
from .specs import PARAMETERS_PER_LAYER, BlockCall, LayerCall, scratch_table


def _front(buffer: Tensor, channels: int) -> Tensor:
    """The first channels of every pixel of a scratch buffer, packed."""
    if buffer.shape[-1] == channels:
        return buffer
    image = buffer.shape[:-1]
    return buffer.view(-1)[: image.numel() * channels].view(*image, channels)


@dataclass
class _Layer:
    """A layer's tensors of one call: parameters in kernel dtypes, derived vectors on demand."""

    call: LayerCall
    stages: ModuleType
    gamma1: Tensor | None
    beta1: Tensor | None
    weight1: Tensor
    bias1: Tensor | None
    gamma2: Tensor | None
    beta2: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None

    def fold1(self, stats: Tensor) -> Tensor:
        """norm1 [4, C_l] from the statistics of F."""
        call = self.call
        source = stats[:, : call.in_channels] if call.norm1.running is None else call.norm1.running
        return self._fold(source, self.gamma1, self.beta1, call.norm1.eps)

    def fold2(self, stats: Tensor) -> Tensor:
        """norm2 [4, K] from the statistics of b."""
        assert self.call.norm2 is not None
        running = self.call.norm2.running
        return self._fold(
            stats if running is None else running, self.gamma2, self.beta2, self.call.norm2.eps
        )

    def _fold(self, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
        norm = stats.new_empty((4, stats.shape[1]))
        self.stages.norm_fold(stats, gamma, beta, eps, norm)
        return norm

    def conv1_forward(self, x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
        """b from F[:C_l]; for a plain layer the new features."""
        if self.call.conv1 is not None:
            fallback.norm_relu_conv_forward(x, norm, self.weight1, self.bias1, self.call.conv1, y)
            self._take_stats(y, stats)
        elif self.call.bottleneck:
            weight = self.weight1.view(self.weight1.shape[:2])
            self.stages.norm_relu_conv1x1_forward(flat(x), norm, weight, flat(y), stats)
        else:
            self.stages.norm_relu_conv3x3_forward(x, norm, self.weight1, y, stats)

    def conv2_forward(self, b: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
        """The new features from b."""
        assert self.weight2 is not None
        if self.call.conv2 is not None:
            fallback.norm_relu_conv_forward(b, norm, self.weight2, self.bias2, self.call.conv2, y)
            self._take_stats(y, stats)
        else:
            self.stages.norm_relu_conv3x3_forward(b, norm, self.weight2, y, stats)

    def _take_stats(self, y: Tensor, stats: Tensor | None) -> None:
        if stats is not None:
            self.stages.channel_stats(flat(y), stats)


def _layer(
    call: BlockCall, index: int, parameters: Sequence[Tensor | None], dtype: torch.dtype
) -> _Layer:
    """A layer's tensors, its parameters cast to what the kernels take; made when it is reached, so
    that one layer's casts exist at a time."""
    acc = accumulation_dtype(dtype)
    start = index * PARAMETERS_PER_LAYER
    gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2 = parameters[
        start : start + PARAMETERS_PER_LAYER
    ]
    return _Layer(
        call.layers[index],
        call.stages,
        _cast(gamma1, acc),
        _cast(beta1, acc),
        _cast(weight1, dtype),  # type: ignore[arg-type]
        _cast(bias1, dtype),
        _cast(gamma2, acc),
        _cast(beta2, acc),
        _cast(weight2, dtype),
        _cast(bias2, dtype),
    )


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _dropout_mask(call: BlockCall, index: int, y: Tensor, scratch: dict[str, Tensor]) -> Tensor:
    """The layer's mask, 0 or 1 / (1 - p), for y [N, *spatial, k]; the same on every call."""
    layer = call.layers[index]
    keep = 1.0 - layer.drop_rate
    generator = torch.Generator(y.device).manual_seed(call.seed + index)
    if layer.channelwise_dropout:
        shape = (y.shape[0], *(1 for _ in y.shape[1:-1]), y.shape[-1])
        mask = scratch["dropout mask"].view(-1)[: y.shape[0] * y.shape[-1]].view(shape)
    else:
        mask = _front(scratch["dropout mask"], layer.growth)
    mask.bernoulli_(keep, generator=generator)
    return mask.div_(keep) if keep > 0 else mask


def block_forward(
    call: BlockCall, x: Tensor, known_stats: Tensor | None, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The block's forward pass.

    x ``[N, C_0, *spatial]``; known_stats ``[2, C_0]`` of x where the stage before took them.
    Returns F ``[N, *spatial, C_total]``, its stats ``[2, C_total]``, the stats ``[2, K]`` of every
    layer's b, and every b (``store``) or an empty list.
    """
    image = (x.shape[0], *x.shape[2:])
    features = layout.empty(image, call.out_channels, x.dtype, x.device)
    acc = accumulation_dtype(x.dtype)
    stats = torch.zeros((2, call.out_channels), dtype=acc, device=x.device)
    bottleneck_stats: list[Tensor] = []
    kept: list[Tensor] = []

    first = features[..., : call.in_channels]
    first.copy_(x.movedim(1, -1))
    if call.batch_stats:
        if known_stats is not None:
            stats[:, : call.in_channels].copy_(known_stats)
        else:
            call.stages.channel_stats(flat(first), stats[:, : call.in_channels])

    with arena.lease(scratch_table(call, image, x.dtype, backward=False), x.device) as scratch:
        for index in range(len(call.layers)):
            layer = _layer(call, index, parameters, x.dtype)
            channels, growth = layer.call.in_channels, layer.call.growth
            inputs = features[..., :channels]
            new = features[..., channels : channels + growth]
            dropped = layer.call.drop_rate > 0
            new_stats = stats[:, channels : channels + growth] if call.batch_stats else None
            fused_stats = None if dropped else new_stats
            norm1 = layer.fold1(stats)
            if layer.call.bottleneck:
                width = layer.call.bottleneck
                if call.memory == "store":
                    b = torch.empty((*image, width), dtype=x.dtype, device=x.device)
                    kept.append(b)
                else:
                    b = _front(scratch["bottleneck"], width)
                assert layer.call.norm2 is not None
                b_stats = stats.new_empty((2, width))
                bottleneck_stats.append(b_stats)
                wanted = b_stats if layer.call.norm2.running is None else None
                layer.conv1_forward(inputs, norm1, b, wanted)
                layer.conv2_forward(b, layer.fold2(b_stats), new, fused_stats)
            else:
                layer.conv1_forward(inputs, norm1, new, fused_stats)
            if dropped:
                new.mul_(_dropout_mask(call, index, new, scratch))
                if new_stats is not None:
                    call.stages.channel_stats(flat(new), new_stats)
    return features, stats, bottleneck_stats, kept


def _empty_gradient(weight: Tensor, wanted: bool, acc: torch.dtype) -> Tensor | None:
    return torch.empty(weight.shape, dtype=acc, device=weight.device) if wanted else None


def block_backward(
    call: BlockCall,
    gradient: Tensor,
    features: Tensor,
    stats: Tensor,
    bottleneck_stats: Sequence[Tensor],
    kept: Sequence[Tensor],
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The block's backward pass.

    gradient E ``[N, *spatial, C_total]`` is consumed: it holds the outside gradient of F and is
    overwritten. wanted: which parameters need a gradient. Returns the gradient of the block's
    input, a channel slice of E, and the parameters' gradients in their own dtypes.
    """
    stages = call.stages
    image = features.shape[:-1]
    count = image.numel()
    acc = stats.dtype
    correction = torch.zeros((4, call.out_channels), dtype=acc, device=stats.device)
    correction[0].fill_(1)
    correction[3].copy_(stats[0])
    gradients: list[Tensor | None] = [None] * len(parameters)

    table = scratch_table(call, image, features.dtype, backward=True)
    with arena.lease(table, features.device) as scratch:
        for index in reversed(range(len(call.layers))):
            layer = _layer(call, index, parameters, features.dtype)
            channels, growth = layer.call.in_channels, layer.call.growth
            slot = slice(channels, channels + growth)
            inputs, d_inputs = features[..., :channels], gradient[..., :channels]
            new, d_new = features[..., slot], gradient[..., slot]
            fix: Tensor | None = correction[:, slot] if call.batch_stats else None
            start = index * PARAMETERS_PER_LAYER
            need = wanted[start : start + PARAMETERS_PER_LAYER]
            if layer.call.drop_rate > 0:
                if fix is not None:
                    stages.norm_correction_apply(flat(d_new), flat(new), fix)
                    fix = None
                d_new.mul_(_dropout_mask(call, index, new, scratch))
            fixed = None if fix is None else new

            norm1 = layer.fold1(stats)
            dnorm1 = norm1.new_empty((2, channels))
            dweight1 = _empty_gradient(layer.weight1, need[2], acc)
            dbias1 = None if layer.bias1 is None else _empty_gradient(layer.bias1, need[3], acc)
            dnorm2 = dweight2 = dbias2 = None
            if layer.call.bottleneck:
                width = layer.call.bottleneck
                assert layer.call.norm2 is not None and layer.weight2 is not None
                norm2 = layer.fold2(bottleneck_stats[index])
                if call.memory == "store":
                    b = kept[index]
                else:
                    b = _front(scratch["bottleneck"], width)
                    layer.conv1_forward(inputs, norm1, b, None)
                dz2 = _front(scratch["bottleneck gradient"], width)
                dnorm2 = norm2.new_empty((2, width))
                dweight2 = _empty_gradient(layer.weight2, need[6], acc)
                if layer.bias2 is not None:
                    dbias2 = _empty_gradient(layer.bias2, need[7], acc)
                if layer.call.conv2 is not None:
                    fallback.norm_relu_conv_backward(
                        d_new, fixed, fix, b, norm2, layer.weight2, layer.call.conv2, False, dz2,
                        dweight2, dbias2, dnorm2,
                    )  # fmt: skip
                else:
                    stages.norm_relu_conv3x3_backward(
                        d_new, fixed, fix, b, norm2, layer.weight2, False, dz2, dweight2, dnorm2
                    )
                fix2 = torch.empty_like(norm2)
                stages.norm_correction(
                    dnorm2, norm2, count if layer.call.norm2.running is None else 0, False, fix2
                )
                if layer.call.conv1 is not None:
                    fallback.norm_relu_conv_backward(
                        dz2, b, fix2, inputs, norm1, layer.weight1, layer.call.conv1, True,
                        d_inputs, dweight1, dbias1, dnorm1,
                    )  # fmt: skip
                else:
                    shape = layer.weight1.shape[:2]
                    stages.norm_relu_conv1x1_backward(
                        flat(dz2), flat(b), fix2, flat(inputs), norm1,
                        layer.weight1.view(shape), flat(d_inputs),
                        None if dweight1 is None else dweight1.view(shape), dnorm1,
                    )  # fmt: skip
            elif layer.call.conv1 is not None:
                fallback.norm_relu_conv_backward(
                    d_new, fixed, fix, inputs, norm1, layer.weight1, layer.call.conv1, True,
                    d_inputs, dweight1, dbias1, dnorm1,
                )  # fmt: skip
            else:
                stages.norm_relu_conv3x3_backward(
                    d_new,
                    fixed,
                    fix,
                    inputs,
                    norm1,
                    layer.weight1,
                    True,
                    d_inputs,
                    dweight1,
                    dnorm1,
                )
            if layer.call.norm1.running is None:
                stages.norm_correction(dnorm1, norm1, count, True, correction)

            computed = [dnorm1[0], dnorm1[1], dweight1, dbias1]
            computed += [None, None] if dnorm2 is None else [dnorm2[0], dnorm2[1]]
            computed += [dweight2, dbias2]
            for offset, value in enumerate(computed):
                parameter = parameters[start + offset]
                if parameter is not None and need[offset] and value is not None:
                    gradients[start + offset] = _cast(value, parameter.dtype)

    d_first = gradient[..., : call.in_channels]
    if call.batch_stats:
        stages.norm_correction_apply(
            flat(d_first),
            flat(features[..., : call.in_channels]),
            correction[:, : call.in_channels],
        )
    return d_first, gradients
