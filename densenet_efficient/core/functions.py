"""Autograd's view of the algorithms: a Function each for the dense block, the transition, the stem.

The Functions hold no algorithm: it is in `dense_block` and `pooling`, and for everything that is
no ordinary first derivative in `differentiable`. What a forward pass finds besides its output, the
statistics, goes into a `Result` that the caller hands in.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from . import differentiable, eager, layout, max_pool, pooling, specs
from .dense_block import Kept, block_backward, block_forward
from .gradients import gradient_buffer
from .specs import BlockSpec, PoolSpec
from .stem_conv import StemConvCall, StemConvFunction


@dataclass
class Result:
    """What a forward pass found.

    stats: ``[2, C]`` of its output, None where they are not wanted. used: ``[2, C]`` of its input,
    those its norm used (transition, stem). table: what holds all statistics taken in this call
    (dense block).
    """

    stats: Tensor | None = None
    used: Tensor | None = None
    table: Tensor | None = None

    def has_overflowed(self) -> bool:
        """Whether a statistic has; see the function."""
        return has_overflowed(self.used if self.table is None else self.table)


def has_overflowed(table: Tensor | None) -> bool:
    """Whether a statistic is infinite or NaN. Asked on the CPU only, where it costs no wait and
    where PyTorch, which sums in float64 there, may have a finite answer."""
    if table is None or table.device.type != "cpu":
        return False
    if math.isfinite(table.sum().item()):  # one pass, nearly always
        return False
    return not bool(torch.isfinite(table).all())


def _is_first_order(gradient: Tensor, spec: BlockSpec | PoolSpec) -> bool:
    """Whether this is an ordinary backward pass, whose results nobody differentiates again.
    RuntimeError where it is not and the spec's statistics are shared between processes."""
    if not torch.is_grad_enabled() and eager.is_ordinary(gradient) and not eager.is_transformed():
        return True
    if spec.exchange is not None:
        raise RuntimeError(
            "SyncBatchNorm has first derivatives only, as in PyTorch: create_graph and batched "
            "gradients need norms whose statistics are not shared between processes"
        )
    return False


class DenseBlockFunction(torch.autograd.Function):
    """A block: (spec, x, known stats of x, result, *parameters) -> F ``[N, C_total, *spatial]``,
    and where processes share them the statistics ``[2, C_total]`` of F, for a norm after the block
    that leaves its correction to this backward pass.

    Saved for backward: F, its statistics and those of every b, on a GPU the folded norms, and every
    b that the specification keeps.
    """

    @classmethod
    def apply(cls, spec: BlockSpec, x: Tensor, known_stats, result: Result, *parameters):
        """As of any Function, which asks of every argument whether it is a tensor: there are
        hundreds."""
        if eager.is_transformed():
            return super().apply(spec, x, known_stats, result, *parameters)
        # A tensor that a transform of torch.func made and left behind stands for the one inside.
        given = [None if p is None else unwrap_if_dead(p) for p in (x, known_stats, *parameters)]
        apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        return apply(spec, given[0], given[1], result, *given[2:])

    @staticmethod
    def forward(ctx, spec: BlockSpec, x: Tensor, known_stats, result: Result, *parameters):
        """See `dense_block.block_forward`."""
        y = layout.empty((x.shape[0], *x.shape[2:]), spec.out_channels, x.dtype, x.device)
        with eager.without_autocast(x.device):
            kept = block_forward(spec, x, known_stats, parameters, y)
        result.stats = kept.stats if spec.batch_stats else None
        result.table = kept.table
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        norms = kept.norms if specs.keeps_norms(y.device) else None
        ctx.save_for_backward(y, kept.table, norms, *kept.bottlenecks, *parameters)
        return y if spec.exchange is None else (y, kept.stats.clone())

    @staticmethod
    def backward(ctx, *gradients):
        """See `dense_block.block_backward`."""
        held = list(gradients)
        del gradients
        dstats = held.pop() if len(held) == 2 else None
        if held[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        spec: BlockSpec = ctx.spec
        wanted = ctx.needs_input_grad[4:]
        y, table, norms, *others = ctx.saved_tensors  # checkpointing allows it once
        bottlenecks, parameters = others[: -len(wanted)], others[-len(wanted) :]
        if not _is_first_order(held[0], spec):
            x = y[:, spec.inputs(0)]
            found = differentiable.gradients(
                lambda x, *parameters: differentiable.dense_block(spec, x, parameters),
                (x, *parameters),
                held[0],
            )
            return _where(ctx.needs_input_grad, (None, found[0], None, None, *found[1:]))
        # Hooks on saved tensors may have brought them back in another layout.
        bottlenecks = [b.contiguous() for b in bottlenecks]
        norms = None if norms is None else norms.contiguous()
        table = layout.neighbouring(table)
        kept = Kept(spec, layout.channels_last(y), table, bottlenecks, norms)
        e = gradient_buffer(held)
        held.clear()
        with eager.without_autocast(y.device):
            dx, computed = block_backward(spec, e, kept, parameters, wanted, dstats)
        return None, dx.movedim(-1, 1) if ctx.needs_input_grad[1] else None, None, None, *computed


class TransitionFunction(torch.autograd.Function):
    """Norm, ReLU, pooling by 2 and 1x1 convolution.

    (spec, x, known stats of x, result, gamma, beta, weight, bias) -> y. x ``[N, C, *spatial]``,
    weight ``[K, C, 1, ...]``, y ``[N, K, *(spatial // 2)]``. Only x is kept: the feature buffer of
    the block before. Where the known stats are differentiable, they get a gradient.
    """

    @staticmethod
    def forward(ctx, spec: PoolSpec, x: Tensor, known, result: Result, gamma, beta, weight, bias):
        """See `pooling.transition_forward`."""
        with eager.without_autocast(x.device):
            rows = layout.channels_last(x)
            stats = pooling.norm_statistics(spec, rows, known)
            y, y_stats = pooling.transition_forward(spec, rows, stats, gamma, beta, weight, bias)
        result.stats, result.used = y_stats, stats
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, stats, gamma, beta, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        """See `pooling.transition_backward`."""
        if dy is None:
            return (None,) * 8
        spec: PoolSpec = ctx.spec
        x, stats, gamma, beta, weight, bias = ctx.saved_tensors
        wanted, dstats = ctx.needs_input_grad, None
        if not _is_first_order(dy, spec):
            dx, dgamma, dbeta, dweight, dbias = differentiable.gradients(
                lambda *inputs: differentiable.transition(spec, *inputs),
                (x, gamma, beta, weight, bias),
                dy,
            )
        else:
            with eager.without_autocast(dy.device):
                dx, (dgamma, dbeta, dweight, dbias), dstats = pooling.transition_gradients(
                    spec, dy, layout.channels_last(x), stats, (gamma, beta, weight, bias),
                    wanted[4:], defer=wanted[2],
                )  # fmt: skip
        return _where(wanted, (None, dx, dstats, None, dgamma, dbeta, dweight, dbias))


class StemFunction(torch.autograd.Function):
    """Norm, ReLU and max-pooling (kernel 3, stride 2, padding 1).

    (spec, x, made by, result, gamma, beta) -> y. x ``[N, C, *spatial]`` is the stem convolution's
    output. It is kept, unless the call that made it is given, which backward makes again; the
    convolution keeps what that takes anyway.
    """

    @staticmethod
    def forward(
        ctx, spec: PoolSpec, x: Tensor, made_by: StemConvCall | None, result: Result, gamma, beta
    ):
        """See `pooling.stem_forward`."""
        with eager.without_autocast(x.device):
            rows = layout.channels_last(x)
            stats = pooling.norm_statistics(spec, rows, None)
            y, y_stats = pooling.stem_forward(spec, rows, stats, gamma, beta)
        result.stats, result.used = y_stats, stats
        ctx.spec = spec
        ctx.made_by = None if made_by is None else made_by[:2]
        ctx.set_materialize_grads(False)
        kept = (x,) if made_by is None else made_by[2:]
        ctx.save_for_backward(stats, gamma, beta, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        """See `pooling.stem_backward`."""
        if dy is None:
            return (None,) * 6
        spec: PoolSpec = ctx.spec
        stats, gamma, beta, *kept = ctx.saved_tensors
        made_by = None if ctx.made_by is None else StemConvCall(*ctx.made_by, *kept)
        if not _is_first_order(dy, spec):
            with torch.enable_grad():
                x = kept[0] if made_by is None else StemConvFunction.apply(*made_by)
            dx, dgamma, dbeta = differentiable.gradients(
                lambda *inputs: differentiable.stem(spec, *inputs), (x, gamma, beta), dy
            )
        else:
            found = (
                nullcontext(layout.channels_last(kept[0])) if made_by is None else made_by.again()
            )
            with eager.without_autocast(dy.device), found as rows:
                dx, (dgamma, dbeta) = pooling.stem_gradients(
                    spec, dy, rows, stats, (gamma, beta), ctx.needs_input_grad[4:]
                )
        return _where(ctx.needs_input_grad, (None, dx, None, None, dgamma, dbeta))


class NewFeaturesFunction(torch.autograd.Function):
    """Some channels of a block's output, dense in memory: (y, first, last) -> y[:, first:last].
    Its gradient is the block's gradient buffer already, of differentiable operators."""

    @staticmethod
    def forward(ctx, y: Tensor, first: int, last: int) -> Tensor:
        """A copy, channels last."""
        ctx.channels, ctx.new = y.shape[1], slice(first, last)
        image = (y.shape[0], *y.shape[2:])
        return layout.empty(image, last - first, y.dtype, y.device).copy_(y[:, first:last])

    @staticmethod
    def backward(ctx, dy: Tensor):
        """dy in a new buffer that is 0 elsewhere."""
        image = (dy.shape[0], *dy.shape[2:])
        if eager.is_ordinary(dy) and not eager.is_transformed():
            e = layout.empty(image, ctx.channels, dy.dtype, dy.device).zero_()
        else:
            e = dy.new_zeros((dy.shape[0], ctx.channels, *dy.shape[2:]))
        e[:, ctx.new] = dy
        return e, None, None


class PointwiseFunction(torch.autograd.Function):
    """A 1x1 convolution of a block's output: (x, weight, bias) -> y. x ``[N, C, *spatial]``, weight
    ``[K, C, 1, ...]``, bias ``[K]`` or None, y ``[N, K, *spatial]``. Unlike PyTorch's it only reads
    x's memory, which is the block's feature buffer, and sends the block's gradient buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A matrix product, channels last."""
        ctx.save_for_backward(x, weight, bias)
        return differentiable.pointwise(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        """The products with the weight and with x, and the sum."""
        x, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() or not eager.is_ordinary(dy) or eager.is_transformed():
            return _where(
                wanted,
                tuple(differentiable.gradients(differentiable.pointwise, (x, weight, bias), dy)),
            )
        rows, matrix = layout.flat(layout.channels_last(dy)), weight.flatten(1)
        dx = dweight = dbias = None
        if wanted[0]:
            dx = layout.empty((x.shape[0], *x.shape[2:]), x.shape[1], x.dtype, x.device)
            torch.mm(rows, matrix, out=layout.flat(dx.movedim(1, -1)))
        if wanted[1]:
            dweight = torch.mm(rows.t(), layout.flat(layout.channels_last(x))).view(weight.shape)
        if wanted[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


class MaxPoolFunction(torch.autograd.Function):
    """Dropout and max-pooling by 2: (x, drop rate) -> y. A byte for each value of y is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, drop_rate: float) -> Tensor:
        """See `max_pool.max_pool_forward`."""
        y, places = max_pool.max_pool_forward(x, drop_rate)
        ctx.spatial, ctx.drop_rate = x.shape[2:], drop_rate
        ctx.save_for_backward(places)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        """See `max_pool.max_pool_backward`."""
        (places,) = ctx.saved_tensors
        return max_pool.max_pool_backward(dy, places, ctx.spatial, ctx.drop_rate), None


class SharedNormFunction(torch.autograd.Function):
    """A norm by itself whose statistics processes share: (spec, x, known stats of x, result, gamma,
    beta) -> y as x. Where the known stats are differentiable, they get a gradient."""

    @staticmethod
    def forward(ctx, spec: PoolSpec, x: Tensor, known, result: Result, gamma, beta):
        """See `pooling.norm_forward`."""
        rows = layout.channels_last(x)
        result.used = stats = pooling.norm_statistics(spec, rows, known)
        y = pooling.norm_forward(spec, rows, stats, gamma, beta)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, stats, gamma, beta)
        return y

    @staticmethod
    def backward(ctx, dy):
        """See `pooling.norm_backward`."""
        if dy is None:
            return (None,) * 6
        spec: PoolSpec = ctx.spec
        x, stats, gamma, beta = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        _is_first_order(dy, spec)
        dx, dnorm, dstats = pooling.norm_backward(
            spec, dy.movedim(1, -1), layout.channels_last(x), stats, gamma, beta, defer=wanted[2]
        )
        dgamma, dbeta = pooling.like((*dnorm,), (gamma, beta), wanted[4:])
        return _where(wanted, (None, dx.movedim(-1, 1), dstats, None, dgamma, dbeta))


def _where(wanted: tuple[bool, ...], gradients: tuple[Tensor | None, ...]) -> tuple:
    return tuple(g if need else None for need, g in zip(wanted, gradients, strict=True))


class MatchLayoutFunction(torch.autograd.Function):
    """x, whose gradient comes back in contiguous memory, as that of a contiguous tensor does from
    PyTorch's own operators."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """The same tensor."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """A copy where the gradient lies otherwise."""
        return gradient.contiguous()
