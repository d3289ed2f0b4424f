"""The transition and the stem as operators that a compiled graph can hold; see `graph`.

transition            x, statistics, parameters        ->  y, its statistics, those used
transition_backward   gradient of y, what was kept     ->  gradients
stem, stem_backward   likewise
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef, custom_op

from ..ops import dispatch
from ..ops.dtypes import accumulation_dtype
from . import eager, layout, pooling
from .encoding import decode
from .graph import NAMESPACE, constant_statistics, doubled, is_beyond, separate, spread
from .specs import PoolSpec

Forward = Callable[..., tuple[Tensor, Tensor | None]]
Backward = Callable[..., tuple[Tensor, list[Tensor | None]]]
OutputShape = Callable[[PoolSpec, Any, Any], tuple[int, ...]]


def _spec(call: str, x: Tensor, constants: Tensor | None = None) -> PoolSpec:
    spec: PoolSpec = decode(call)
    operators = dispatch.choose(x.device, x.dtype, x.dim() - 2).operators
    norm = spec.norm
    if constants is not None and constants.shape[1]:
        norm = dataclasses.replace(norm, running=constants)
    return dataclasses.replace(spec, norm=norm, operators=operators)


def _define(
    name: str, forward: Forward, backward: Backward, image_of: OutputShape
) -> tuple[CustomOpDef, CustomOpDef]:
    """The operators ``name`` and ``name_backward``.

    forward: (spec, x ``[N, *spatial, C]``, statistics, *parameters) -> y and its statistics.
    backward: (spec, dy, x, statistics, parameters, wanted) -> dx and the parameters' gradients.
    image_of: (spec, x, parameters) -> ``(N, *spatial, K)`` of y.
    """

    @custom_op(
        f"{NAMESPACE}::{name}",
        mutates_args=(),
        schema="(str call, str given, Tensor x, Tensor? known, Tensor[] running, "
        "Tensor[] parameters) -> (Tensor, Tensor, Tensor)",
    )
    def operator(
        call: str,
        given: str,
        x: Tensor,
        known: Tensor | None,
        running: list[Tensor],
        parameters: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        constants = constant_statistics(running, x)
        y, stats, used = run(call, given, x, known, constants, parameters)
        used = used.clone() if used is known else used
        if is_beyond(used, x):
            exact = run(call, given, *doubled(x, None, constants, parameters))
            for narrow, wide in zip((y, stats, used), exact, strict=True):
                narrow.copy_(wide)
        return y, stats, used

    def run(
        call: str,
        given: str,
        x: Tensor,
        known: Tensor | None,
        constants: Tensor,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = _spec(call, x, constants)
        with eager.without_autocast(x.device):
            rows = layout.channels_last(x)
            used = pooling.norm_statistics(spec, rows, known)
            y, stats = forward(spec, rows, used, *spread(given, parameters))
        return y, used.new_empty((2, 0)) if stats is None else stats, used

    @operator.register_fake
    def _(call: str, given: str, x: Any, known: Any, running: Any, parameters: Any) -> Any:
        spec: PoolSpec = decode(call)
        *image, channels = image_of(spec, x, spread(given, parameters))
        stats = x.new_empty((2, x.shape[1]), dtype=accumulation_dtype(x.dtype))
        y = layout.empty(image, channels, x.dtype, x.device)
        return y, stats.new_empty((2, channels if spec.want_stats else 0)), stats

    @custom_op(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        schema="(str call, str given, Tensor dy, Tensor x, Tensor used, Tensor[] parameters, "
        "bool[] wanted) -> (Tensor, Tensor[])",
    )
    def gradient(
        call: str,
        given: str,
        dy: Tensor,
        x: Tensor,
        used: Tensor,
        parameters: list[Tensor],
        wanted: list[bool],
    ) -> tuple[Tensor, list[Tensor]]:
        dx, gradients = run_backward(call, given, dy, x, used, parameters, wanted)
        if is_beyond(used, x):
            x, _, used, parameters = doubled(x, None, used, parameters)
            spec = _spec(call, x)
            if spec.norm.running is None:
                used = pooling.norm_statistics(spec, layout.channels_last(x), None)
            exact, found = run_backward(call, given, dy.double(), x, used, parameters, wanted)
            dx.copy_(exact)
            gradients = [g.to(narrow.dtype) for g, narrow in zip(found, gradients, strict=True)]
        return dx, gradients

    def run_backward(
        call: str,
        given: str,
        dy: Tensor,
        x: Tensor,
        used: Tensor,
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor]]:
        every, needs = spread(given, parameters), spread(given, wanted, False)
        with eager.without_autocast(dy.device):
            rows = layout.channels_last(x)
            dx, gradients = backward(_spec(call, x), dy, rows, used, every, needs)
        return dx, separate(gradients)

    @gradient.register_fake
    def _(call: str, given: str, dy: Any, x: Any, used: Any, parameters: Any, wanted: Any) -> Any:
        length = x.shape[1] if name == "stem" else None  # dense, as a convolution wants it
        dx = layout.empty((x.shape[0], *x.shape[2:]), x.shape[1], x.dtype, x.device, length)
        needed = [p for p, need in zip(parameters, wanted, strict=True) if need]
        return dx, [p.new_empty(p.shape) for p in needed]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, given, x, _, running, parameters = inputs
        _, stats, used = output
        ctx.call, ctx.given, ctx.running = call, given, len(running)
        ctx.mark_non_differentiable(stats, used)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, used, *parameters)

    def differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        wanted = ctx.needs_input_grad[-1]
        dx, gradients = None, [None] * len(wanted)
        if dy is not None:
            x, used, *parameters = ctx.saved_tensors
            dx, found = gradient(ctx.call, ctx.given, dy, x, used, parameters, wanted)
            gradients = spread("".join("01"[need] for need in wanted), found)
        return None, None, dx, None, [None] * ctx.running, gradients

    operator.register_autograd(differentiate, setup_context=keep)
    return operator, gradient


def _transition_image(spec: PoolSpec, x: Any, parameters: Any) -> tuple[int, ...]:
    spatial = (size // 2 if spec.pools else size for size in x.shape[2:])
    return (x.shape[0], *spatial, parameters[2].shape[0])


def _transition_gradients(*args: Any) -> tuple[Tensor, list[Tensor | None]]:
    dx, gradients, _ = pooling.transition_gradients(*args)
    return dx, gradients


def _stem_image(spec: PoolSpec, x: Any, parameters: Any) -> tuple[int, ...]:
    return (x.shape[0], *((size + 1) // 2 for size in x.shape[2:]), x.shape[1])


transition, transition_backward = _define(
    "transition", pooling.transition_forward, _transition_gradients, _transition_image
)
stem, stem_backward = _define("stem", pooling.stem_forward, pooling.stem_gradients, _stem_image)
