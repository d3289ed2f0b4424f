"""Autograd's view of the stages: a Function each for the dense block, the transition, the stem.

The Functions hold no algorithm: the block's is in `core.dense_block`, the others are
one operator forward and one backward. Each returns its result and the result's channel statistics,
which the next stage's norm uses instead of a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ops.fallback import accumulation_dtype
from . import layout, ownership
from .dense_block import block_backward, block_forward
from .specs import BlockCall, NormCall


def first_order(
    gradients: tuple[Any, ...], saved: Sequence[Tensor | None], what: str
) -> tuple[Any, ...]:
    """Make differentiating ``gradients`` a clear error where a graph of them was asked for.

    saved: the tensors they depend on, so that the error is met on the way to any of them.
    """
    if not torch.is_grad_enabled():
        return gradients
    message = (
        f"{what} has first derivatives only: its backward pass cannot be differentiated again. "
        "Use densenet_efficient.reference (or the model before convert) for double backward."
    )
    anchors = [tensor for tensor in saved if tensor is not None and tensor.requires_grad]
    error = torch._C._functions.DelayedError(message, 1 + len(anchors))

    def guarded(gradient: Tensor) -> Tensor:
        outputs = error(gradient.detach().requires_grad_(), *anchors)
        return outputs[0] if anchors else outputs  # type: ignore[return-value]

    return tuple(guarded(g) if isinstance(g, Tensor) else g for g in gradients)


def no_forward_mode(what: str) -> None:
    """Raise for forward-mode automatic differentiation."""
    raise RuntimeError(
        f"{what} does not support forward-mode automatic differentiation (jvp); use "
        "densenet_efficient.reference (or the model before convert) for it."
    )


def gradient_buffer(held: list[Tensor], may_own: bool) -> Tensor:
    """E ``[N, *spatial, C]`` from the incoming gradient ``[N, C, *spatial]``: the only element of
    ``held``, taken over in place where its layout and its ownership allow, copied otherwise (and
    always where a graph of the gradient is recorded)."""
    with torch.no_grad():
        if may_own and _is_buffer(held[0].movedim(1, -1)) and ownership.is_sole_owner(held):
            return held[0].movedim(1, -1)
        gradient = held[0].movedim(1, -1)
        e = layout.empty(gradient.shape[:-1], gradient.shape[-1], gradient.dtype, gradient.device)
        return e.copy_(gradient)


def _is_buffer(x: Tensor) -> bool:
    """Whether x [N, *spatial, C] lies in memory as a new buffer of ours would."""
    return layout.row_stride(x) == layout.row_length(x.shape[-1], x.dtype, x.device)


class DenseBlockFunction(torch.autograd.Function):
    """Autograd's view of a block: (call, x, known_stats, *parameters) -> (y, stats, *inner).

    y ``[N, C_total, *spatial]`` is F seen channels first; stats ``[2, C_total]`` and the inner
    tensors (statistics of every b; in ``store`` mode every b) carry no gradient.
    """

    @staticmethod
    def forward(call: BlockCall, x: Tensor, known_stats: Tensor | None, *parameters):
        """See :func:`block_forward`."""
        with torch.autocast(x.device.type, enabled=False):
            features, stats, inner, kept = block_forward(call, x, known_stats, parameters)
        return features.movedim(-1, 1), stats, *inner, *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep F, the statistics, in ``store`` mode every b, and the parameters."""
        call, _, _, *parameters = inputs
        y, *inner = output
        ctx.call = call
        ctx.inner = len(inner)
        ctx.mark_non_differentiable(*inner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *inner, *parameters)

    @staticmethod
    def backward(ctx, *gradients):
        """See :func:`block_backward`."""
        nothing = (None,) * len(ctx.needs_input_grad)
        if gradients[0] is None:
            return nothing
        held = [gradients[0]]
        del gradients
        call: BlockCall = ctx.call
        y, stats, *rest = ctx.saved_tensors
        inner, parameters = rest[: ctx.inner - 1], rest[ctx.inner - 1 :]
        layers = sum(1 for layer in call.layers if layer.bottleneck)
        # Hooks on saved tensors may have brought them back in another layout.
        features = layout.channels_last(y)
        kept = [b.contiguous() for b in inner[layers:]]
        e = gradient_buffer(held, may_own=not torch.is_grad_enabled())
        held.clear()
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            dx, computed = block_backward(
                call, e, features, stats, inner[:layers], kept, parameters,
                ctx.needs_input_grad[3:],
            )  # fmt: skip
            gradient = dx.movedim(-1, 1) if ctx.needs_input_grad[1] else None
        return first_order(
            (None, gradient, None, *computed), [y, *parameters], "EfficientDenseBlock"
        )

    @staticmethod
    def jvp(ctx, *tangents):
        """Forward-mode differentiation is refused."""
        no_forward_mode("EfficientDenseBlock")


@dataclass(frozen=True)
class PoolCall:
    """One call of a transition or a stem.

    norm: as in a block. stages: `ops.compiled` or
    `ops.fallback`. want_stats: whether to take the result's statistics.
    """

    norm: NormCall
    stages: ModuleType
    want_stats: bool

    def statistics(self, x: Tensor, known: Tensor | None) -> Tensor:
        """[2, C] for the norm of x [N, *spatial, C]: constant, known, or taken here."""
        if self.norm.running is not None:
            return self.norm.running
        if known is not None:
            return known
        acc = accumulation_dtype(x.dtype)
        stats = torch.empty((2, x.shape[-1]), dtype=acc, device=x.device)
        self.stages.channel_stats(layout.flat(x), stats)
        return stats

    def fold(self, stats: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """norm [4, C] from statistics [2, C]."""
        norm = stats.new_empty((4, stats.shape[1]))
        gamma, beta = (None if t is None else t.detach().to(stats.dtype) for t in (gamma, beta))
        self.stages.norm_fold(stats, gamma, beta, self.norm.eps, norm)
        return norm

    def count(self, x: Tensor) -> int:
        """Rows the statistics were taken over; 0 for constant ones."""
        return x.numel() // x.shape[-1] if self.norm.running is None else 0


def _empty_gradient(x: Tensor, row_length: int) -> Tensor:
    """For x [N, *spatial, C], uninitialised memory seen channels first, rows ``row_length`` apart.
    Not a view: the block before may then own it (see `core.ownership`)."""
    *image, channels = x.shape
    first, *others, last = layout.strides(image, row_length)
    shape, steps = (image[0], channels, *image[1:]), (first, last, *others)
    return torch.empty_strided(shape, steps, dtype=x.dtype, device=x.device)


def _like(gradient: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    return gradient.to(parameter.dtype) if parameter is not None and wanted else None


class TransitionFunction(torch.autograd.Function):
    """Norm, ReLU, pooling by 2 and 1x1 convolution.

    (call, x, known stats of x, gamma, beta, weight) -> (y, stats of y, stats of x used).
    x ``[N, C, *spatial]``, weight ``[K, C, 1, ...]``, y ``[N, K, *(spatial // 2)]``. Only x is
    kept, which is the feature buffer of the block before.
    """

    @staticmethod
    def forward(call: PoolCall, x: Tensor, stats, gamma, beta, weight):
        """See ``transition_forward`` in `ops.compiled`."""
        with torch.autocast(x.device.type, enabled=False):
            x = layout.channels_last(x)
            image = (x.shape[0], *(size // 2 for size in x.shape[1:-1]))
            y = layout.empty(image, weight.shape[0], x.dtype, x.device)
            stats = call.statistics(x, stats)
            norm = call.fold(stats, gamma, beta)
            y_stats = norm.new_zeros((2, weight.shape[0]))
            kernel = weight.detach().to(x.dtype).reshape(weight.shape[:2])
            call.stages.transition_forward(x, norm, kernel, y, y_stats if call.want_stats else None)
        return y.movedim(-1, 1), y_stats, stats.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep x, its statistics and the parameters."""
        call, x, _, gamma, beta, weight = inputs
        _, y_stats, stats = output
        ctx.call = call
        ctx.mark_non_differentiable(y_stats, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, stats, gamma, beta, weight)

    @staticmethod
    def backward(ctx, dy, *_):
        """See ``transition_backward`` in `ops.compiled`."""
        if dy is None:
            return (None,) * 6
        call: PoolCall = ctx.call
        x, stats, gamma, beta, weight = saved = ctx.saved_tensors  # checkpointing allows it once
        wanted = ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = layout.channels_last(x)
            norm = call.fold(stats, gamma, beta)
            dx = _empty_gradient(x, layout.row_length(x.shape[-1], x.dtype, x.device))
            dnorm = norm.new_empty((2, x.shape[-1]))
            kernel = weight.detach().to(x.dtype).reshape(weight.shape[:2])
            dweight = norm.new_empty(kernel.shape) if wanted[5] else None
            call.stages.transition_backward(
                layout.channels_last(dy),
                x,
                norm,
                kernel,
                call.count(x),
                dx.movedim(1, -1),
                dweight,
                dnorm,
            )
        return first_order(
            (
                None,
                dx if wanted[1] else None,
                None,
                _like(dnorm[0], gamma, wanted[3]),
                _like(dnorm[1], beta, wanted[4]),
                None if dweight is None else dweight.view(weight.shape).to(weight.dtype),
            ),
            saved,
            "EfficientTransition",
        )

    @staticmethod
    def jvp(ctx, *tangents):
        """Forward-mode differentiation is refused."""
        no_forward_mode("EfficientTransition")


class StemFunction(torch.autograd.Function):
    """Norm, ReLU and max-pooling (kernel 3, stride 2, padding 1).

    (call, x, gamma, beta) -> (y, stats of y, stats of x used).
    x ``[N, C, *spatial]`` is the stem convolution's output and the only tensor kept.
    """

    @staticmethod
    def forward(call: PoolCall, x: Tensor, gamma, beta):
        """See ``stem_forward`` in `ops.compiled`."""
        with torch.autocast(x.device.type, enabled=False):
            x = layout.channels_last(x)
            image = (x.shape[0], *(-(-size // 2) for size in x.shape[1:-1]))
            y = layout.empty(image, x.shape[-1], x.dtype, x.device)
            stats = call.statistics(x, None)
            norm = call.fold(stats, gamma, beta)
            y_stats = norm.new_zeros((2, x.shape[-1]))
            call.stages.stem_forward(x, norm, y, y_stats if call.want_stats else None)
        return y.movedim(-1, 1), y_stats, stats.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep x and its statistics."""
        call, x, gamma, beta = inputs
        _, y_stats, stats = output
        ctx.call = call
        ctx.mark_non_differentiable(y_stats, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, stats, gamma, beta)

    @staticmethod
    def backward(ctx, dy, *_):
        """See ``stem_backward`` in `ops.compiled`."""
        if dy is None:
            return (None,) * 4
        call: PoolCall = ctx.call
        x, stats, gamma, beta = saved = ctx.saved_tensors  # checkpointing allows it once
        wanted = ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = layout.channels_last(x)
            norm = call.fold(stats, gamma, beta)
            dx = _empty_gradient(x, x.shape[-1])  # the framework's convolution wants it dense
            dnorm = norm.new_empty((2, x.shape[-1]))
            out = dx.movedim(1, -1)
            call.stages.stem_backward(layout.channels_last(dy), x, norm, call.count(x), out, dnorm)
        return first_order(
            (
                None,
                dx if wanted[1] else None,
                _like(dnorm[0], gamma, wanted[2]),
                _like(dnorm[1], beta, wanted[3]),
            ),
            saved,
            "EfficientStem",
        )

    @staticmethod
    def jvp(ctx, *tangents):
        """Forward-mode differentiation is refused."""
        no_forward_mode("EfficientStem")
