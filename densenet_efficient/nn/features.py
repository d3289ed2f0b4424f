"""The executor of a whole feature extractor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..core import eager, graph_pooling
from ..core.functions import Result, StemFunction
from ..core.specs import PoolSpec
from ..ops import dispatch
from ..ops.dispatch import Dispatch
from . import execution, first_convolution, graph, handover, watch
from .architecture import STEM, plain_outputs
from .dense_block import DenseBlockExecution
from .execution import ORIGINAL, OVERFLOW, Efficient
from .graph import GraphPlan
from .layers import CONVOLUTIONS, image_dims, in_channels
from .norms import (
    batch_norm,
    begin_exchange,
    check_count,
    features_of,
    includes_relu,
    is_batch_norm,
    norm_problem,
    norm_spec,
    update_running_statistics,
    uses_batch_statistics,
)
from .stage import StageExecution
from .transition import MAX_POOLS, TransitionExecution, once

_FORWARDS = (DenseBlockExecution.forward, StageExecution.forward, TransitionExecution.forward)


def _is_stem_pool(pool: nn.Module) -> bool:
    if type(pool) not in MAX_POOLS:
        return False
    options = [once(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return options == [3, 2, 1, 1] and not pool.ceil_mode and not pool.return_indices


class FeaturesExecution(Efficient):
    """The execution of a feature extractor whose forward runs its children in order: each is called
    as it is, and the stem is looked at anew in every call, so there is no structure to remember."""

    def _adopt(self) -> None:  # type: ignore[override]
        self._efficient = execution.State(structure=())

    def stem_path(self, x: Tensor) -> Dispatch:
        """How the norm, ReLU and pooling after the stem's convolution would run, and why; and, on a
        GPU, the convolution."""
        reason = self._input_problem(x) or self._patch()
        return self._stem_paths(x)[0] if reason is None else Dispatch(ORIGINAL, reason)

    def _stem_paths(self, x: Tensor) -> tuple[Dispatch, Dispatch]:
        """Of the stem, and of its convolution alone, for an input that has no problem."""
        reason = self._stem_problem()
        if reason is not None:
            return Dispatch(ORIGINAL, reason), Dispatch(ORIGINAL, reason)
        conv: Any = next(iter(self._modules.values()))
        stem = execution.choose(x, image_dims(conv), execution.convolution_dtype(x))
        first = first_convolution.choose(conv, x)
        if first.reason != dispatch.NO_STEM_CONVOLUTION:
            own = f"PyTorch's, because {first.reason}" if first.kind == ORIGINAL else "by a kernel"
            stem = replace(stem, reason=f"{stem.reason}; its convolution is {own}")
        return stem, first

    def stem_children(self) -> list[tuple[str, Any]]:
        """The first children, up to where the pooling would be: convolution, norm, ReLU unless the
        norm includes it, pooling."""
        children: list[tuple[str, Any]] = list(self._modules.items())
        return children[: 3 if len(children) > 1 and includes_relu(children[1][1]) else 4]

    def _stem_problem(self) -> str | None:
        children = self.stem_children()
        modules = [child for _, child in children]
        if (
            len(modules) < 3
            or type(modules[0]) not in CONVOLUTIONS
            or not is_batch_norm(modules[1])
        ):
            return "it does not begin with a convolution and a batch norm"
        if any(type(relu) is not nn.ReLU for relu in modules[2:-1]) or not _is_stem_pool(
            modules[-1]
        ):
            return "the norm is not followed by ReLU and max-pooling (3, 2, 1)"
        for name, child in children:
            reason = watch.own_change(child)
            if reason is not None:
                return f"{name} {reason}"
        reason = watch.change(modules[1]._modules, watch.structure_of(modules[1].named_children()))
        problem = reason or norm_problem(modules[1])
        return None if problem is None else f"{children[1][0]} {problem}"

    def forward(self, input: Tensor) -> Tensor:
        """x ``[N, C_in, *spatial]`` -> the last child's output."""
        if torch.compiler.is_compiling():
            if eager.is_exporting() or not graph.is_usual(input):
                return self._original(input)
            return self._in_graph(input, {}, ())
        return self._efficient_forward(input)

    def named_outputs(self, input: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """As the forward; returns the outputs of the children named in `wanted`, of the last part
        of the stem as "stem", and the last child's."""
        if torch.compiler.is_compiling():
            outputs: dict[str, Tensor] = {}
            if eager.is_exporting() or not graph.is_usual(input):
                return plain_outputs(self, input, wanted)
            self._in_graph(input, outputs, wanted)
            return outputs
        return self._named_outputs(input, wanted)

    def _named_outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        if self._input_problem(x) or self._patch():
            return plain_outputs(self, x, wanted)
        outputs: dict[str, Tensor] = {}
        self._run(x, outputs, wanted)
        return outputs

    @torch.compiler.disable(reason=graph.OUTSIDE)
    def _efficient_forward(self, x: Tensor) -> Tensor:
        reason = self._input_problem(x) or self._patch()
        if reason is not None:
            execution.check_synchronised(self, x, reason)
            return self.original_class.forward(self, x)
        return self._run(x, {}, ())

    def _run(self, x: Tensor, outputs: dict[str, Tensor], wanted: Collection[str]) -> Tensor:
        contiguous = self._answers_contiguous(x)
        children: list[tuple[str, Any]] = list(self._modules.items())
        stem = first = Dispatch(ORIGINAL, "its relu0 is asked for")
        if "relu0" not in wanted:
            stem, first = self._stem_paths(x)
        if stem.kind != ORIGINAL:
            children = children[len(self.stem_children()) :]
            following = children[0][1] if children and "stem" not in wanted else None
            x = self._stem(x, (stem, first), contiguous, _sees_it_first(following))
            if "stem" in wanted:
                outputs["stem"] = x
        else:
            execution.record(self, "stem", stem)
        last_of_stem = [name for name in self._modules if name in STEM][-1:]
        shown = contiguous and not handover.is_private(x)
        for index, (name, child) in enumerate(children):
            keys = [name, *["stem"] * (name in last_of_stem)]
            taken = [key for key in keys if key in wanted]
            after = index + 1 < len(children) and not taken
            consumer = children[index + 1][1] if after else None
            x = self._call(child, consumer, x, contiguous, shown)
            shown = contiguous and not (handover.is_private(x) or _nobody_sees(child, consumer))
            outputs.update(dict.fromkeys(taken, x))
        if children:
            outputs[children[-1][0]] = x
        return x

    @staticmethod
    def _call(
        child: nn.Module, consumer: nn.Module | None, x: Tensor, contiguous: bool, shown: bool
    ) -> Tensor:
        """child(x), in contiguous memory where somebody else may ask for it. shown: whether
        somebody may see the gradient of x."""
        if is_batch_norm(child) and watch.own_change(child) is None and not watch.patch():
            y = batch_norm(child, x)  # type: ignore[arg-type]
            return y.contiguous() if contiguous else y
        if not isinstance(child, Efficient):
            execution.check_synchronised(
                child, x, watch.own_change(child) or "it is not one of ours"
            )
            return child(handover.own(x))
        if not _runs_our_forward(child):
            return child(handover.own(x))  # which may call another of ours, and write to its output
        to_ours = _sees_it_first(consumer) and watch.own_change(child) is None
        # A block may begin with others' modules.
        lent = to_ours and not isinstance(consumer, DenseBlockExecution)
        asked = handover.Asked(contiguous and not to_ours, lent, to_ours, contiguous, shown)
        with handover.asking_for(asked):
            return child(x)

    def _in_graph(self, x: Tensor, outputs: dict[str, Tensor], wanted: Collection[str]) -> Tensor:
        """`_run` as torch.compile traces it, the statistics handed on as a tensor."""
        contiguous = self._answers_contiguous(x)
        children: list[tuple[str, Any]] = list(self._modules.items())
        stem, stats = 0, None
        if "relu0" not in wanted:
            x, stats, stem = self._stem_in_graph(x, contiguous)
        if stem and "stem" in wanted:
            outputs["stem"] = graph.leave(x, contiguous)
        last_of_stem = [name for name in self._modules if name in STEM][-1:]
        for index, (name, child) in enumerate(children):
            if index < stem:
                continue
            keys = [name, *["stem"] * (name in last_of_stem)]
            taken = [key for key in keys if key in wanted]
            if _is_bare(child):
                following = children[index + 1][1] if index + 1 < len(children) else None
                private = following is not None and not taken and _is_bare(following)
                x, stats = child.in_graph(x, stats, None if private else contiguous)
            else:
                x, stats = child(x), None
            for key in taken:
                outputs[key] = x
        if children:
            outputs[children[-1][0]] = x
        return x

    def _stem_in_graph(self, x: Tensor, contiguous: bool) -> tuple[Tensor, Tensor | None, int]:
        """What the stem gives, its statistics, and how many children that was."""
        children = [child for _, child in self.stem_children()]
        plan = self._graph_plan(id(self))
        graph.guard(self, plan)
        if plan.kind == graph.ORIGINAL:
            return x, None, 0
        conv, norm, *rest = children
        execution.check_input(x, image_dims(conv), in_channels(conv), conv.weight, "conv0")
        answer = execution.pooling_dtype(x, image_dims(conv))
        x = first_convolution.by_pytorch(conv, x, conv.weight)
        if plan.kind == graph.EAGER:
            for child in (norm, *rest):
                x = child(x)
            return x, None, len(children)
        if plan.batch_stats:
            check_count(x.numel() // x.shape[1], tuple(x.shape))
        running, parameters = graph.tensors(self, plan)
        y, stats, used = graph_pooling.stem(plan.call, plan.given, x, None, running, parameters)
        graph.update(self, plan, used, x.numel() // x.shape[1])
        y, stats = handover.as_dtype(y, stats if plan.has_stats else None, answer)
        return y, stats, len(children)

    @torch.compiler.assume_constant_result
    def _graph_plan(self, ident: int) -> GraphPlan:
        """How `_stem_in_graph` runs. ident: guards on this very module."""
        inside = self.stem_children()
        reason = self._patch() or self._stem_problem()
        if reason is not None:
            return graph.make_plan(inside, graph.ORIGINAL)
        norm = inside[1][1]
        own = norm_spec(norm, torch.float32)
        return graph.make_plan(
            inside,
            graph.OPERATOR,
            PoolSpec(own, None, own.running is None),  # type: ignore[arg-type]
            [(norm, "weight"), (norm, "bias")],
            [(norm, own, 0, features_of(norm))],
            has_stats=own.running is None,
        )

    def _answers_contiguous(self, x: Tensor) -> bool:
        """Whether the original children would answer x with contiguous memory: it is contiguous,
        and no channels-last weight of the first convolution decides otherwise."""
        first = next(iter(self._modules.values()))
        weight: Any = getattr(first, "_parameters", {}).get("weight")
        known = type(weight) in (Tensor, nn.Parameter)  # a lazy one has no memory yet
        decides = known and not handover.prefers_contiguous(weight)
        return handover.prefers_contiguous(x) and not decides

    def _stem(
        self, x: Tensor, paths: tuple[Dispatch, Dispatch], contiguous: bool, to_ours: bool
    ) -> Tensor:
        chosen, first = paths
        conv, norm, *rest = [child for _, child in self.stem_children()]
        gamma, beta = norm.weight, norm.bias
        execution.check_input(x, image_dims(conv), in_channels(conv), conv.weight, "conv0")
        answer = execution.pooling_dtype(x, image_dims(conv))
        made_by = first_convolution.made_by(first, conv, x, self._modules.values())
        x = first_convolution.run(first, conv, x, contiguous)
        want, own = uses_batch_statistics(norm), norm_spec(norm, x.dtype)
        exchange = begin_exchange(own.group, x, None) if want else None
        count = x.numel() // x.shape[1] if exchange is None else exchange.total
        spec = PoolSpec(own, chosen.operators, want, exchange)
        result = Result()
        y = StemFunction.apply(spec, x, made_by, result, gamma, beta)
        if exchange is None and result.has_overflowed():
            execution.record(self, "stem", Dispatch(ORIGINAL, OVERFLOW))
            for child in (norm, *rest):
                x = child(x)
            return x
        execution.record(self, "stem", chosen, [norm])
        if want:
            assert result.used is not None
            update_running_statistics(norm, result.used, count)
        asked = handover.Asked(contiguous and not to_ours, to_ours=to_ours)
        return handover.hand_over(*handover.as_dtype(y, result.stats, answer), asked)


def _sees_it_first(consumer: nn.Module | None) -> bool:
    """Whether a module that is called next and is ours is the first to see its input, and alone."""
    if consumer is None or not (is_batch_norm(consumer) or _runs_our_forward(consumer)):
        return False
    return watch.own_change(consumer) is None and not _has_any_global_hook()


def _nobody_sees(child: nn.Module, consumer: nn.Module | None) -> bool:
    """Whether the output of a module of PyTorch's is seen by the next module alone."""
    if consumer is None or isinstance(child, Efficient) or child._modules:
        return False
    plain = type(child).__module__.startswith("torch.nn.")
    return plain and watch.own_change(child) is None and watch.own_change(consumer) is None


def _runs_our_forward(module: nn.Module) -> bool:
    """Whether a call of the module calls our forward, not one that somebody put in its place or in
    a subclass."""
    cls = type(module)
    own = cls.forward in _FORWARDS and cls.__call__ is nn.Module.__call__
    return own and "forward" not in vars(module)


def _is_bare(module: Any) -> bool:
    """Whether the module is ours and nobody waits at its door for what goes in or comes out."""
    return _runs_our_forward(module) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class EfficientFeatures(FeaturesExecution, nn.Sequential):
    """Runs a feature extractor's children in order, fusing the stem and handing statistics on.

    conv0 is PyTorch's, or on a GPU an operator (`nn.first_convolution`); norm0, ReLU and
    max-pooling after it become one operator that keeps only conv0's output. Dense blocks and
    transitions pass their channel statistics along, so that no norm between them takes a pass over
    its input. Children, names, order and keys are those of an ordinary Sequential, and may still be
    called one by one.
    """

    original_class = nn.Sequential

    def __init__(self, children: OrderedDict[str, nn.Module]) -> None:
        nn.Sequential.__init__(self, children)
        self._adopt()
