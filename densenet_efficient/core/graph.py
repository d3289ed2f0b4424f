"""The block as operators that a compiled graph can hold: functional, with shapes that can be known
beforehand and with a derivative.

    dense_block            x, statistics, parameters       ->  F, statistics, bottlenecks
    dense_block_backward   gradient of F, what was kept    ->  gradients

They hold no algorithm. What a call is, apart from its tensors, is a string (`encoding`). Nothing is
written that was handed in: backward begins with a copy of the gradient, which a compiled graph may
use elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ..ops import dispatch
from ..ops.dtypes import accumulation_dtype
from . import capture, eager, layout, running, sharing
from .dense_block import Kept, block_backward, block_forward
from .dense_layer import empty_gradient
from .encoding import decode
from .functions import has_overflowed
from .specs import BlockSpec, NormSpec

NAMESPACE = "densenet_efficient_graph"


def constant_statistics(running: Sequence[Tensor], x: Tensor) -> Tensor:
    """[2, sum of C]: mean and variance of every norm that uses its running statistics, a copy of
    what they are at this call. running: mean and variance of each, in order."""
    acc = accumulation_dtype(x.dtype)
    if not running:
        return torch.empty((2, 0), dtype=acc, device=x.device)
    pairs = zip(running[::2], running[1::2], strict=True)
    return torch.cat([torch.stack(pair).to(acc) for pair in pairs], 1)


def _block_spec(call: str, x: Tensor, constants: Tensor, seed: Tensor | None) -> BlockSpec:
    """The call's specification with everything that the string leaves out."""
    spec: BlockSpec = decode(call)
    operators = dispatch.choose(x.device, x.dtype, x.dim() - 2).operators
    layers = spec.layers
    if constants.shape[1]:
        columns = iter(constants.split(_constant_widths(spec), 1))
        layers = tuple(_with_constants(layer, columns) for layer in layers)
    if seed is not None and capture.is_captured(x.device):
        raise RuntimeError(
            "dropout of a compiled block cannot be part of a CUDA graph, whose every replay would "
            "draw the same masks: leave torch.compile out of what is captured"
        )
    number = 0 if seed is None else int(seed)
    return dataclasses.replace(spec, layers=layers, operators=operators, seed=number)


def _constant_widths(spec: BlockSpec) -> list[int]:
    widths = []
    for layer in spec.layers:
        for norm, width in ((layer.norm1, layer.in_channels), (layer.norm2, layer.bottleneck)):
            if norm is not None and norm.running is not None:
                widths.append(width)
    return widths


def _with_constants(layer: Any, columns: Iterator[Tensor]) -> Any:
    def filled(norm: NormSpec | None) -> NormSpec | None:
        if norm is None or norm.running is None:
            return norm
        return dataclasses.replace(norm, running=next(columns))

    norm1 = filled(layer.norm1)
    return dataclasses.replace(layer, norm1=norm1, norm2=filled(layer.norm2))


def spread(given: str, tensors: Iterable[Any], missing: Any = None) -> list[Any]:
    """The tensors where ``given`` has a 1, ``missing`` where it has a 0."""
    present = iter(tensors)
    return [next(present) if flag == "1" else missing for flag in given]


def _image(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


def is_beyond(table: Tensor, x: Tensor) -> bool:
    """Whether statistics of finite values are not finite in float32: then the call is computed once
    more in float64, in which PyTorch sums on the CPU."""
    return has_overflowed(table) and x.dtype != torch.float64 and bool(x.isfinite().all())


def doubled(
    x: Tensor, known: Tensor | None, constants: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    """What an operator reads, in float64."""
    return x.double(), known, constants.double(), [p.double() for p in parameters]


def separate(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that there are; each in memory of its own, as operators of a graph must return them."""
    seen: set[int] = set()
    found = []
    for gradient in gradients:
        if gradient is not None:
            key = gradient.untyped_storage()._cdata
            found.append(gradient.clone() if key in seen else gradient)
            seen.add(key)
    return found


@custom_op(
    f"{NAMESPACE}::dense_block",
    mutates_args=(),
    schema="(str call, str given, Tensor x, Tensor? known, Tensor[] running, Tensor[] parameters, "
    "Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def dense_block(
    call: str,
    given: str,
    x: Tensor,
    known: Tensor | None,
    running: list[Tensor],
    parameters: list[Tensor],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """F ``[N, C_total, *spatial]``, channels last in memory; the table of the statistics taken; the
    constant statistics used ``[2, ...]``; the bottlenecks kept.

    call: an encoded `BlockSpec`. given: a 0 or 1 for every place of a parameter. running: mean and
    variance of every norm that uses its running ones. seed: of the dropout, where there is any.
    """
    constants = constant_statistics(running, x)
    features, kept = _forward(call, given, x, known, constants, parameters, seed)
    if is_beyond(kept.table, x):
        wide, exact = _forward(call, given, *doubled(x, None, constants, parameters), seed)
        features.copy_(wide)
        kept.table.copy_(exact.table)
        for b, exact_b in zip(kept.bottlenecks, exact.bottlenecks, strict=True):
            b.copy_(exact_b)
    return features, kept.table, constants, kept.bottlenecks


def _forward(
    call: str,
    given: str,
    x: Tensor,
    known: Tensor | None,
    constants: Tensor,
    parameters: Sequence[Tensor],
    seed: Tensor | None,
) -> tuple[Tensor, Kept]:
    spec = _block_spec(call, x, constants, seed)
    features = layout.empty(_image(x), spec.out_channels, x.dtype, x.device)
    with eager.without_autocast(x.device):
        return features, block_forward(spec, x, known, spread(given, parameters), features)


@dense_block.register_fake
def _(call: str, given: str, x: Any, known: Any, running: Any, parameters: Any, seed: Any) -> Any:
    spec: BlockSpec = decode(call)
    acc = accumulation_dtype(x.dtype)
    features = layout.empty(_image(x), spec.out_channels, x.dtype, x.device)
    widths = [layer.bottleneck for layer in spec.layers]
    table = x.new_empty((2, spec.out_channels + sum(widths)), dtype=acc)
    constants = x.new_empty((2, sum(_constant_widths(spec))), dtype=acc)
    kept = [width for index, width in enumerate(widths) if spec.keeps(index)]
    return features, table, constants, [x.new_empty((*_image(x), w)) for w in kept]


@custom_op(
    f"{NAMESPACE}::dense_block_backward",
    mutates_args=(),
    schema="(str call, str given, Tensor dy, Tensor features, Tensor table, Tensor constants, "
    "Tensor[] bottlenecks, Tensor[] parameters, Tensor? seed, bool[] wanted) "
    "-> (Tensor, Tensor[])",
)
def dense_block_backward(
    call: str,
    given: str,
    dy: Tensor,
    features: Tensor,
    table: Tensor,
    constants: Tensor,
    bottlenecks: list[Tensor],
    parameters: list[Tensor],
    seed: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of those parameters that are wanted."""
    spec = _block_spec(call, features, constants, seed)
    kept = Kept(spec, layout.channels_last(features), table, [b.contiguous() for b in bottlenecks])
    dx, gradients = _backward(given, dy, kept, parameters, wanted)
    x = features[:, spec.inputs(0)]
    if is_beyond(table, x):
        x, known, constants, doubles = doubled(x, None, constants, parameters)
        _, kept = _forward(call, given, x, known, constants, doubles, seed)
        exact, found = _backward(given, dy.double(), kept, doubles, wanted)
        dx.copy_(exact)
        gradients = [g.to(narrow.dtype) for g, narrow in zip(found, gradients, strict=True)]
    return dx, gradients


def _backward(
    given: str, dy: Tensor, kept: Kept, parameters: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    e = layout.empty(_image(dy), dy.shape[1], dy.dtype, dy.device)
    e.copy_(dy)
    needs = spread(given, wanted, False)
    with eager.without_autocast(dy.device):
        dx, gradients = block_backward(
            kept.spec, e.movedim(1, -1), kept, spread(given, parameters), needs
        )
    return dx.movedim(-1, 1), separate(gradients)


@dense_block_backward.register_fake
def _(
    call: str, given: str, dy: Any, features: Any, table: Any, constants: Any, bottlenecks: Any,
    parameters: Any, seed: Any, wanted: Any,
) -> Any:  # fmt: skip
    spec: BlockSpec = decode(call)
    e = layout.empty(_image(features), spec.out_channels, features.dtype, features.device)
    needed = [p for p, need in zip(parameters, wanted, strict=True) if need]
    gradients = [empty_gradient(parameter, parameter.dtype) for parameter in needed]
    return e[:, spec.inputs(0)], gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call, given, _, _, running, parameters, seed = inputs
    features, table, constants, bottlenecks = output
    ctx.call, ctx.given, ctx.running = call, given, len(running)
    ctx.kept, ctx.seeded = len(bottlenecks), seed is not None
    ctx.mark_non_differentiable(table, constants, *bottlenecks)
    ctx.set_materialize_grads(False)
    seeds = [seed] if ctx.seeded else []
    ctx.save_for_backward(features, table, constants, *bottlenecks, *seeds, *parameters)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    *_, wanted, _ = ctx.needs_input_grad
    dx, gradients = None, [None] * len(wanted)
    if dy is not None:
        features, table, constants, *others = ctx.saved_tensors
        bottlenecks, others = others[: ctx.kept], others[ctx.kept :]
        seed = others.pop(0) if ctx.seeded else None
        dx, found = dense_block_backward(
            ctx.call, ctx.given, dy, features, table, constants, bottlenecks, others, seed, wanted
        )
        gradients = spread("".join("01"[need] for need in wanted), found)
    return None, None, dx, None, [None] * ctx.running, gradients, None


dense_block.register_autograd(_differentiate, setup_context=_keep)


@custom_op(
    f"{NAMESPACE}::update_running_statistics",
    mutates_args=("means", "variances", "batches"),
    schema="(str columns, Tensor table, SymInt count, Tensor(a!)[] means, Tensor(b!)[] variances, "
    "Tensor(c!)[] batches) -> ()",
)
def update_running_statistics(
    columns: str,
    table: Tensor,
    count: int,
    means: list[Tensor],
    variances: list[Tensor],
    batches: list[Tensor],
) -> None:
    """Mixes statistics of a batch of ``count`` values a channel into running ones.

    columns: encoded, for every norm: the first of the table's columns that are its statistics, its
    momentum, and which of running moments and counter it has.
    """
    moments = iter(zip(means, variances, strict=True))
    counters = iter(batches)
    norms, starts = [], []
    for first, momentum, has_moments, has_counter in json.loads(columns):
        mean, variance = next(moments) if has_moments else (None, None)
        counter = next(counters) if has_counter else None
        norms.append((mean, variance, counter, momentum))
        starts.append(first)
    running.update(running.Running(*zip(*norms, strict=True)), table, starts, count)


@update_running_statistics.register_fake
def _(columns: Any, table: Any, count: Any, means: Any, variances: Any, batches: Any) -> None:
    return None


@custom_op(f"{NAMESPACE}::hand_over", mutates_args=(), schema="(Tensor x) -> Tensor")
def hand_over(x: Tensor) -> Tensor:
    """x for a caller that may write to it, while x is kept for backward: a copy on write."""
    return sharing.share(x)


@hand_over.register_fake
def _(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


hand_over.register_autograd(lambda ctx, dy: dy)
