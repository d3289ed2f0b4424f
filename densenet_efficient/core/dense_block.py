"""The dense block's algorithm, forward and backward.

``docs/design.md`` derives it. One channels-last feature buffer F ``[N, *spatial, C_total]`` per
block is the block's output: layer l reads its first ``C_l`` channels and writes its ``k`` new ones
after them (or, newest first, reads the last ones and writes in front of them). Batch statistics
belong to channels and are taken once, when a channel is written. In backward one gradient buffer E
of F's shape starts as the gradient of the output, every layer adds ``a dz`` to its inputs, and the
batch-norm terms P and Q, two vectors shared by all consumers of a channel, are applied when
backward reaches the layer that produced it.

    forward, layer l                          backward, layer l (from the last to the first)
    norm1 = fold(stats[:C_l])                 dy  = E[slice] - P - (F[slice] - mean) Q
    b     = relu(norm1 F[:C_l]) W1^T          dz2 = conv3x3^T(dy, W2) [norm2 b > 0]
    norm2 = fold(stats of b)                  db  = a2 dz2 - p2 - (b - mean2) q2
    F[slice] = conv3x3(relu(norm2 b))         dz1 = (db W1) [norm1 F > 0];  E[:C_l] += a1 dz1

F and the statistics are kept for backward, and b of as many of the last layers as the specification
says (``kept_layers``); that of the others is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.dtypes import accumulation_dtype
from . import arena, folds, replay, weights
from .dense_layer import Correction, Incoming
from .dropout import drop
from .exchange import correction_of
from .layout import flat
from .specs import PARAMETERS_PER_LAYER, BlockSpec, norm_elements, scratch_table
from .tail import layer_call


@dataclass
class Kept:
    """What a block's forward pass leaves for its backward pass, and for running statistics.

    features: F ``[N, *spatial, C_total]``. table: the statistics ``[2, C_total + sum of K]`` of F
    and of every b. bottlenecks: every b that is kept, in order. norms: all norms as folded, see
    `folds`; None where backward folds them again.
    """

    spec: BlockSpec
    features: Tensor
    table: Tensor
    bottlenecks: list[Tensor] = field(default_factory=list)
    norms: Tensor | None = None

    @property
    def stats(self) -> Tensor:
        """Those of F ``[2, C_total]``."""
        return self.table[:, : self.spec.out_channels]

    def bottleneck_stats(self) -> Sequence[Tensor]:
        """Those of every b ``[2, K]``."""
        widths = [layer.bottleneck for layer in self.spec.layers]
        return self.table[:, self.spec.out_channels :].split(widths, dim=1)


def block_forward(
    spec: BlockSpec,
    x: Tensor,
    known_stats: Tensor | None,
    parameters: Sequence[Tensor | None],
    y: Tensor,
) -> Kept:
    """The block's forward pass.

    x ``[N, C_0, *spatial]``; known_stats ``[2, C_0]`` of x where its producer took them; y
    ``[N, C_total, *spatial]``, channels last in memory, is written whole: F.
    """
    features = y.movedim(1, -1)
    rows = scratch_table(spec, features.shape[:-1], x.dtype, backward=False)
    with arena.lease(rows, x.device) as scratch:
        table, norms, *bottlenecks = replay.run(
            spec, _forward, (weights.are_shared(x.device),), x, known_stats, features, scratch,
            parameters,
        )  # fmt: skip
    assert table is not None
    return Kept(spec, features, table, bottlenecks, norms)  # type: ignore[arg-type]


def _forward(
    spec: BlockSpec,
    shares_weights: bool,
    x: Tensor,
    known_stats: Tensor | None,
    features: Tensor,
    scratch: dict[str, Tensor],
    parameters: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Fills F and returns the statistics' table, the folded norms, then every b that is kept."""
    image = features.shape[:-1]
    columns = spec.out_channels + sum(layer.bottleneck for layer in spec.layers)
    acc = accumulation_dtype(x.dtype)
    kept = Kept(spec, features, torch.zeros((2, columns), dtype=acc, device=x.device))
    kept.norms = torch.empty(norm_elements(spec), dtype=acc, device=x.device)
    stats, bottleneck_stats, exchange = kept.stats, kept.bottleneck_stats(), spec.exchange
    fold = folds.Folds(spec, stats, bottleneck_stats, parameters, kept.norms)

    first = features[..., spec.inputs(0)]
    first.copy_(x.movedim(1, -1))
    if spec.batch_stats:
        first_stats = stats[:, spec.inputs(0)]
        if known_stats is not None:
            first_stats.copy_(known_stats)
        else:
            spec.operators.channel_stats(flat(first), first_stats)
        if exchange is not None and not (known_stats is not None and spec.known_shared):
            exchange.moments(first_stats)

    own = weights.by_layer(spec, parameters, x.dtype, len(image) - 1, shares_weights)
    is_folded = False  # the next norm1
    for index, (layer_spec, of_layer) in enumerate(zip(spec.layers, own, strict=True)):
        layer = layer_call(spec, index, parameters, of_layer, x.dtype)
        inputs, slot = features[..., spec.inputs(index)], spec.slot(index)
        new = features[..., slot]
        new_stats = stats[:, slot] if spec.batch_stats else None
        dropped = layer_spec.drop_rate > 0
        fused_stats = None if dropped else new_stats
        fold1 = fold.first(index)
        norm1 = fold1.norm if is_folded else fold1.run(spec.operators)
        is_folded = exchange is None and not dropped and _uses_batch(spec, index + 1)
        following = fold.first(index + 1) if is_folded else None
        if layer_spec.bottleneck:
            if spec.keeps(index):
                shape = (*image, layer_spec.bottleneck)
                b = torch.empty(shape, dtype=x.dtype, device=x.device)
                kept.bottlenecks.append(b)
            else:
                b = _front(scratch["bottleneck"], layer_spec.bottleneck)
            assert layer_spec.norm2 is not None
            b_stats = bottleneck_stats[index]
            wanted = b_stats if layer_spec.norm2.running is None else None
            fold2 = fold.second(index)
            drops = layer_spec.bottleneck_drop_rate > 0
            folds_itself = wanted is not None and exchange is None and not drops
            if drops:
                layer.conv1_forward(inputs, norm1, b, None, None)
                drop(spec, index, b, scratch, bottleneck=True)
                if wanted is not None:
                    spec.operators.channel_stats(flat(b), wanted)
            else:
                layer.conv1_forward(inputs, norm1, b, wanted, fold2 if folds_itself else None)
            if exchange is not None and wanted is not None:
                exchange.moments(wanted)
            norm2 = fold2.norm if folds_itself else fold2.run(spec.operators)
            layer.conv2_forward(b, norm2, new, fused_stats, following)
        else:
            layer.conv1_forward(inputs, norm1, new, fused_stats, following)
        if dropped:
            drop(spec, index, new, scratch)
            if new_stats is not None:
                spec.operators.channel_stats(flat(new), new_stats)
        if exchange is not None and new_stats is not None:
            exchange.moments(new_stats)
    return [kept.table, kept.norms, *kept.bottlenecks]


def _uses_batch(spec: BlockSpec, index: int) -> bool:
    """Whether there is such a layer, and its norm1 uses the batch's statistics."""
    return index < len(spec.layers) and spec.layers[index].norm1.running is None


def block_backward(
    spec: BlockSpec,
    gradient: Tensor,
    kept: Kept,
    parameters: Sequence[Tensor | None],
    wanted: Sequence[bool],
    stats_gradient: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The block's backward pass.

    gradient E ``[N, *spatial, C_total]`` is consumed: it holds the outside gradient of F and is
    overwritten. wanted: which parameters need a gradient. stats_gradient: ``[2, C_total]``, of F's
    statistics from a norm outside. Returns the gradient of the block's input, a channel slice of E,
    and the parameters' gradients in their own dtypes.
    """
    rows = scratch_table(spec, kept.features.shape[:-1], gradient.dtype, backward=True)
    device = gradient.device
    options = tuple(wanted), weights.are_shared(device), folds.are_together(device)
    with arena.lease(rows, device) as scratch:
        gradients = replay.run(
            spec, _backward, options, gradient, kept.features, kept.table, kept.norms,
            kept.bottlenecks, stats_gradient, scratch, parameters,
        )  # fmt: skip
    return gradient[..., spec.inputs(0)], gradients


def _backward(
    spec: BlockSpec,
    wanted: Sequence[bool],
    shares_weights: bool,
    folds_together: bool,
    gradient: Tensor,
    features: Tensor,
    table: Tensor,
    norms: Tensor | None,
    bottlenecks: list[Tensor],
    stats_gradient: Tensor | None,
    scratch: dict[str, Tensor],
    parameters: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Overwrites the gradient and returns those of the parameters."""
    kept = Kept(spec, features, table, bottlenecks)
    operators, stats = spec.operators, kept.stats
    if norms is None:
        norms = stats.new_empty(norm_elements(spec))
        fold = folds.Folds(spec, stats, kept.bottleneck_stats(), parameters, norms)
        fold.run_all(table, folds_together)
    of_layers = folds.norms_in(spec, norms)
    image, exchange = features.shape[:-1], spec.exchange
    count = image.numel() if exchange is None else exchange.total
    correction = torch.zeros((4, spec.out_channels), dtype=stats.dtype, device=stats.device)
    correction[0].fill_(1)
    correction[3].copy_(stats[0])
    if stats_gradient is not None:
        correction[1:3].copy_(correction_of(stats_gradient, count))
    # Of one layer at a time.
    corrections2 = stats.new_empty((4, max(layer.bottleneck for layer in spec.layers)))
    dnorms = folds.norms_in(spec, stats.new_empty(norm_elements(spec, rows=2)), rows=2)
    gradients: list[Tensor | None] = [None] * len(parameters)
    left = list(bottlenecks)

    own = weights.by_layer(
        spec, parameters, features.dtype, len(image) - 1, shares_weights, backward=True
    )
    for index, of_layer in zip(reversed(range(len(spec.layers))), own, strict=True):
        layer_spec = spec.layers[index]
        start = index * PARAMETERS_PER_LAYER
        layer = layer_call(spec, index, parameters, of_layer, features.dtype, wanted)
        before, slot = spec.inputs(index), spec.slot(index)
        outer = Incoming(gradient[..., slot])
        if spec.batch_stats:
            if exchange is not None:
                exchange.sums(correction[1:3, slot])
            outer = Incoming(gradient[..., slot], features[..., slot], correction[:, slot])
        if layer_spec.drop_rate > 0:
            outer = outer.apply_correction(operators)
            drop(spec, index, outer.dy, scratch)

        inputs, d_inputs = features[..., before], gradient[..., before]
        (norm1, norm2), (dnorm1, dnorm2) = of_layers[index], dnorms[index]
        if layer_spec.bottleneck:
            width = layer_spec.bottleneck
            if spec.keeps(index):
                b = left.pop()
            else:
                b = _front(scratch["bottleneck"], width)
                layer.conv1_forward(inputs, norm1, b, None, None)
                if layer_spec.bottleneck_drop_rate > 0:
                    drop(spec, index, b, scratch, bottleneck=True)
            dz2 = _front(scratch["bottleneck gradient"], width)
            correction2 = corrections2[:, :width]
            assert layer_spec.norm2 is not None
            constant = layer_spec.norm2.running is not None
            then = Correction(0 if constant else count, correction2)
            layer.conv2_backward(outer, b, norm2, dz2, dnorm2, then)
            if exchange is not None and not constant:
                exchange.sums(correction2[1:3])
            # Constant statistics bring nothing of b, where float16 may hold infinities, and 0 times
            # one is no number. Any other values will do.
            dropped = layer_spec.bottleneck_drop_rate > 0
            outer = Incoming(dz2, dz2 if constant and not dropped else b, correction2)
            if dropped:
                outer.apply_correction(operators)
                drop(spec, index, dz2, scratch, bottleneck=True)
                correction2.zero_()[0].fill_(1)
        own_batch = layer_spec.norm1.running is None
        shared = Correction(count, correction[:, before]) if own_batch else None
        layer.conv1_backward(outer, inputs, norm1, d_inputs, dnorm1, shared)
        gradients[start : start + PARAMETERS_PER_LAYER] = layer.parameter_gradients()
        gradients[spec.tail_parameters(index)] = layer.tail_gradients

    first = spec.inputs(0)
    d_first = gradient[..., first]
    if spec.batch_stats:
        if exchange is not None:
            exchange.sums(correction[1:3, first])
        operators.norm_correction_apply(
            flat(d_first), flat(features[..., first]), correction[:, first]
        )
    return gradients


def _front(buffer: Tensor, channels: int) -> Tensor:
    """The first channels of every pixel of a scratch buffer, packed."""
    if buffer.shape[-1] == channels:
        return buffer
    image = buffer.shape[:-1]
    return buffer.view(-1)[: image.numel() * channels].view(*image, channels)
