"""How a module of ours looks to torch.compile: operators of `core.graph`, and nothing opaque.

The decision how a call runs is made once, while Dynamo traces, and its result, a `GraphPlan`, is a
constant of the graph. Whatever it was made from, the options and modes of everything inside, is
compared again in code that Dynamo traces; so Dynamo guards on it, and traces anew when it changes.
Parameters and buffers are looked up in traced code, too, and become inputs of the graph.

`make_plan` runs as ordinary Python while Dynamo traces; the functions after it are traced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import eager, graph
from ..core.encoding import encode
from ..core.specs import NormSpec
from . import execution, handover
from .norms import BatchNorm, check_count, process_group, tracks

Path = tuple[str, ...]
Options = tuple[tuple[Path, tuple[tuple[str, Any], ...]], ...]
ORIGINAL, OPERATOR, EAGER = "original", "operator", "eager"
OUTSIDE = (
    "no graph holds norms that share their statistics between processes, or dense layers that end "
    "with a function of somebody else's"
)
"""Why Dynamo breaks its graph; its error under `fullgraph=True` says so."""


class GraphPlan(NamedTuple):
    """How a call runs in a graph.

    kind: ORIGINAL, the plain modules are traced; OPERATOR; or EAGER, outside any graph. options: of
    every module inside, by its way from this one. call: the encoded specification. given: a 0 or 1
    for every place of a parameter. parameters: those that there are. constant: norms that use their
    running statistics. moments, counters: norms whose running statistics, and whose number of
    batches, the call updates, and columns, encoded, how. drops: whether the call needs a seed.
    has_stats: whether it gives the statistics of its output. batch_stats: whether a norm uses those
    of the batch. name, channels: of the first convolution and the input, for errors. new: the
    channels that a block returns, None for all. drop_rate, pools, fused, largest: of a transition,
    whether it pools, in the operator or after it, and takes the largest.
    """

    kind: str
    options: Options
    call: str = ""
    given: str = ""
    parameters: tuple[tuple[Path, str], ...] = ()
    constant: tuple[Path, ...] = ()
    moments: tuple[Path, ...] = ()
    counters: tuple[Path, ...] = ()
    columns: str = ""
    drops: bool = False
    has_stats: bool = False
    batch_stats: bool = False
    name: str = ""
    channels: int = 0
    new: tuple[int, int] | None = None
    drop_rate: float = 0.0
    pools: bool = False
    fused: bool = False
    largest: bool = False


def make_plan(
    inside: Iterable[tuple[str, nn.Module]],
    kind: str,
    spec: Any = None,
    parameters: Sequence[tuple[nn.Module | None, str]] = (),
    norms: Sequence[tuple[BatchNorm, NormSpec, int, int]] = (),
    **others: Any,
) -> GraphPlan:
    """The plan of a call that was decided upon.

    inside: the modules that the decision looked at, by name. parameters: the module and the name of
    every parameter, in the order of the operator; None where there is no such module. norms:
    module, specification, and the columns of its statistics in the table that the operator gives,
    in order.
    """
    inside = list(inside)
    ways = {child: tuple(name.split(".")) if name else () for name, child in inside}
    options = tuple((way, tuple(_options_of(child))) for child, way in ways.items())
    if any(process_group(child) is not None for _, child in inside):
        return GraphPlan(EAGER, options)
    if kind == ORIGINAL:
        return GraphPlan(ORIGINAL, options)
    try:
        call = encode(spec)
    except TypeError:  # a layer that ends with a function of somebody else's
        return GraphPlan(EAGER, options)
    given = [m is not None and getattr(m, name) is not None for m, name in parameters]
    updated = [(n, first) for n, s, first, _ in norms if s.running is None and tracks(n)]
    columns, moments, counters = [], [], []
    for norm, first in updated:
        has = norm.running_mean is not None, norm.num_batches_tracked is not None
        columns.append((first, norm.momentum, *has))
        moments += [ways[norm]] * has[0]
        counters += [ways[norm]] * has[1]
    return GraphPlan(
        OPERATOR,
        options,
        call,
        "".join("01"[flag] for flag in given),
        tuple((ways[m], name) for (m, name), flag in zip(parameters, given, strict=True) if flag),  # type: ignore[index]
        tuple(ways[norm] for norm, spec, *_ in norms if spec.running is not None),
        tuple(moments),
        tuple(counters),
        json.dumps(columns),
        batch_stats=any(s.running is None for _, s, *_ in norms),
        **others,
    )


def _options_of(module: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and _is_option(value):
            yield name, value


def _is_option(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_option(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


@torch.compiler.assume_constant_result
def _transforms() -> bool:
    return eager.is_transformed() or eager.unusual_for_modules() is not None


# Traced by Dynamo


def is_usual(x: Any) -> bool:
    """Whether a graph may hold one of our operators for x: an ordinary tensor with values, and no
    transform of `torch.func`, forward-mode differentiation or hook for all modules."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.layout is torch.strided
        and not x.is_meta
        and x.numel() != 0
        and not _transforms()
    )


def forward(module: Any, given: Any, x: Any) -> Tensor:
    """The forward of a module of ours as torch.compile or torch.export traces it. given: its input.
    x: that as one tensor."""
    if eager.is_exporting() or not is_usual(x):
        return module.original_class.forward(module, given)
    return module.in_graph(x, None, handover.prefers_contiguous(x))[0]


def at(module: Any, way: Path) -> Any:
    """The module at the end of a way."""
    for name in way:
        module = module._modules[name]
    return module


def guard(module: nn.Module, plan: GraphPlan) -> None:
    """Compares the options that a plan was made from with what is there, which Dynamo then guards
    on. RuntimeError where they differ; not an assertion, which ``python -O`` leaves out."""
    for way, pairs in plan.options:
        child = at(module, way)
        for name, value in pairs:
            same = getattr(child, name) == value  # the Dynamo of torch 2.11 fails at != of tuples
            if not same:
                raise RuntimeError(
                    f"{name} of {'.'.join(way) or 'the module'} must be {value!r} as when it was "
                    f"traced, got {getattr(child, name)!r}"
                )


def tensors(module: nn.Module, plan: GraphPlan) -> tuple[list[Tensor], list[Tensor]]:
    """The constant statistics and the parameters of a call."""
    running = []
    for way in plan.constant:
        norm = at(module, way)
        running += [norm.running_mean, norm.running_var]
    return running, [getattr(at(module, way), name) for way, name in plan.parameters]


def check_input(x: Tensor, plan: GraphPlan, parameters: Sequence[Tensor]) -> None:
    """As for an eager call; and ValueError where batch statistics would be taken of one value."""
    weight = parameters[plan.given[:2].count("1")]
    execution.check_input(x, weight.dim() - 2, plan.channels, weight, plan.name)
    if plan.batch_stats:
        check_count(x.numel() // x.shape[1], tuple(x.shape))


def update(module: nn.Module, plan: GraphPlan, table: Tensor, count: int) -> None:
    """The running statistics of a call."""
    if not plan.moments and not plan.counters:
        return
    norms = [at(module, way) for way in plan.moments]
    graph.update_running_statistics(
        plan.columns,
        table,
        count,
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [at(module, way).num_batches_tracked for way in plan.counters],
    )


def seed(plan: GraphPlan) -> Tensor | None:
    """Of the dropout, drawn when the graph runs."""
    return torch.randint(1 << 48, (), device="cpu") if plan.drops else None


def leave(y: Tensor, contiguous: bool) -> Tensor:
    """y, which is kept for backward, for a caller that may write to it."""
    return y.contiguous() if contiguous else graph.hand_over(y)
