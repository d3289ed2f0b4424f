"""The drop-in dense block.

It holds ordinary layers and real BatchNorm modules as parameter holders, under the names and in the
order other libraries use, so state dicts, optimisers, hooks on parameters and surgery on a model go
on working; only the execution is ours. Where a call needs something that the operators cannot see
(a hook on an inner module, a replaced child), the original forward runs, and `path` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import gradients, running
from ..core import graph as core_graph
from ..core.functions import DenseBlockFunction, Result
from ..core.specs import BlockSpec, LayerSpec, NormSpec
from ..ops.dispatch import Dispatch
from . import execution, graph, handover
from .block_call import BlockCall, LastCall, look
from .execution import FEW, ORIGINAL, OVERFLOW
from .graph import GraphPlan
from .layers import (
    LayerParts,
    image_dims,
    layer_spec,
    parameter_places,
    standard_parts,
)
from .memory_mode import KeepsBottlenecks
from .norms import BatchNorm, begin_exchange, features_of
from .options import check_memory, check_modules
from .plain import PlainDenseBlock

Layers = Callable[[nn.Module], Mapping[str, nn.Module]]
Parts = Callable[[nn.Module], LayerParts]
Question = Callable[[nn.Module], bool]


class DenseBlockExecution(KeepsBottlenecks):
    """The execution of a dense block, whatever holds its layers.

    A class of this kind derives from `DenseBlockExecution` and from the class of the block, and its
    instances are prepared by `_adopt`.
    """

    def _adopt(  # type: ignore[override]
        self,
        parts: Parts,
        memory: str,
        layers: Layers | None = None,
        with_input: Question | None = None,
        newest_first: bool = False,
    ) -> None:
        """Takes the present layers over.

        parts: layer -> its modules. memory: see `EfficientDenseBlock`. layers: block -> its layers
        by name, in order; the children by default. with_input: block -> whether its input is part
        of its output; always by default. All are picklable functions of the modules alone: a call
        asks them again where a module has changed since the last one. newest_first: whether new
        channels stand in front of all earlier ones.
        """
        super()._adopt(
            parts=parts,
            memory=check_memory(memory),
            layers=layers,
            with_input=with_input,
            newest_first=newest_first,
        )

    def parts(self) -> list[LayerParts]:
        """The parts of every layer, in order."""
        return [self._efficient.parts(layer) for layer in self.dense_layers().values()]  # type: ignore[misc]

    def path(self, x: Tensor | list[Tensor]) -> Dispatch:
        """How this block would run on x, and why."""
        return self._decision(_joined(x))[0]

    def _decision(self, x: Any) -> tuple[Dispatch, BlockCall | None]:
        reason = self._input_problem(x) or self._patch()
        if reason is not None:
            return Dispatch(ORIGINAL, reason), None
        state, dtype = self._efficient, execution.working_dtype(x)
        last = state.last_call  # which another thread may exchange
        call = None if last is None else last.again(self, dtype)
        if call is None:
            problem, parts, specs = self._specification(dtype)
            if problem is not None:
                return Dispatch(ORIGINAL, problem), None
            norms = self._norms(parts, specs)
            batch = [(norm, at) for norm, own, at in norms if own.running is None]
            call = look(parts, specs, batch)
            last = state.last_call = LastCall.of(self, dtype, call, self._watched().values())
            if last is not None:
                call = call._replace(repeated=last.repeated)
        if execution.has_few_values(x, dtype) and _defers(call):
            return Dispatch(ORIGINAL, FEW), call
        return execution.choose(x, image_dims(call.parts[0].conv1), dtype), call

    def _norms(
        self, parts: list[LayerParts], specs: tuple[LayerSpec, ...]
    ) -> Iterator[tuple[BatchNorm, NormSpec, slice]]:
        """Every norm, and the columns of its statistics in the table that a call gives."""
        block = BlockSpec(specs, None, 0, newest_first=self._efficient.newest_first)  # type: ignore[arg-type]
        column = block.out_channels
        for index, (part, layer) in enumerate(zip(parts, specs, strict=True)):
            inputs = block.inputs(index)
            yield part.norm1, layer.norm1, slice(inputs.start or 0, inputs.stop)
            if part.norm2 is not None and layer.norm2 is not None:
                yield part.norm2, layer.norm2, slice(column, column + layer.bottleneck)
            column += layer.bottleneck

    def _specification(
        self, dtype: torch.dtype
    ) -> tuple[str | None, list[LayerParts], tuple[LayerSpec, ...]]:
        """What a call in a dtype is, or why the operators cannot run it, in words."""
        reason = self._change()
        if reason is not None:
            return reason, [], ()
        parts = self.parts()
        specs: list[LayerSpec] = []
        shares = False
        channels = features_of(parts[0].norm1)
        for (name, layer), part in zip(self.dense_layers().items(), parts, strict=True):
            spec, problem = layer_spec(part, name, channels, dtype, layer.training)
            if spec is None:
                return problem, parts, ()
            specs.append(spec)
            channels += spec.growth
            norm1, norm2 = spec.norm1, spec.norm2
            shares |= norm1.group is not None or (norm2 is not None and norm2.group is not None)
        if shares and len({norm.group for layer in specs for norm in layer.batch_norms()}) > 1:
            return "its norms take their statistics over different processes", parts, ()
        return None, parts, tuple(specs)

    def forward(self, init_features: Tensor | list[Tensor]) -> Tensor:
        """[N, C, *spatial] (or a list of tensors to concatenate) -> all features."""
        if torch.compiler.is_compiling():
            return graph.forward(self, init_features, _joined(init_features))
        return self._efficient_forward(init_features)

    def in_graph(
        self, x: Tensor, known: Tensor | None, contiguous: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """The forward as torch.compile traces it: the output and its statistics ``[2, C]``.

        known: the statistics of x. contiguous: whether the output is to be contiguous or channels
        last, or None where the next operator of ours alone sees it.
        """
        dtype = execution.working_dtype(x)
        plan = self._graph_plan(id(self), self.kept_layers, dtype)
        graph.guard(self, plan)
        if plan.kind == graph.ORIGINAL:
            return self._original(x), None
        if plan.kind == graph.EAGER:
            return self._efficient_forward(x), None
        constants, parameters = graph.tensors(self, plan)
        graph.check_input(x, plan, parameters)
        if plan.has_stats and execution.has_few_values(x, dtype):
            return self._original(x), None
        x, known = handover.as_dtype(x, known, dtype)
        y, table, _, _ = core_graph.dense_block(
            plan.call, plan.given, x, known, constants, parameters, graph.seed(plan)
        )
        graph.update(self, plan, table, x.numel() // x.shape[1])
        stats = table[:, : y.shape[1]] if plan.has_stats else None
        if plan.new is not None:
            y, stats = handover.new_features_in_graph(y, stats, slice(*plan.new))
            y, stats = handover.as_dtype(y, stats, execution.convolution_dtype(x))
        return y if contiguous is None else graph.leave(y, contiguous), stats

    @torch.compiler.assume_constant_result
    def _graph_plan(self, ident: int, kept: int, dtype: torch.dtype) -> GraphPlan:
        """How `in_graph` runs. ident: guards on this very module."""
        problem, parts, specs = self._specification(dtype)
        if problem is not None:
            return graph.make_plan(self.named_modules(), graph.ORIGINAL)
        state = self._efficient
        spec = BlockSpec(specs, None, kept, newest_first=state.newest_first)  # type: ignore[arg-type]
        new = None
        if state.with_input is not None and not state.with_input(self):
            new = spec.new.start, spec.new.stop
        norms = [(n, norm, at.start, at.stop) for n, norm, at in self._norms(parts, specs)]
        return graph.make_plan(
            self.named_modules(),
            graph.OPERATOR,
            spec,
            [place for part in parts for place in parameter_places(part)],
            norms,
            name=f"{next(iter(self.dense_layers()))}.conv1",
            channels=spec.in_channels,
            drops=any(layer.drops() for layer in specs),
            has_stats=spec.batch_stats,
            new=new,
        )

    @torch.compiler.disable(reason=graph.OUTSIDE)
    def _efficient_forward(self, init_features: Tensor | list[Tensor]) -> Tensor:
        asked = handover.asked_for()
        x = _joined(init_features)
        chosen, call = self._decision(x)
        if call is None:
            return self._run_original(chosen, handover.own(init_features, asked))
        first, specs, parameters = call.parts[0], call.specs, call.parameters
        name = f"{next(iter(self.dense_layers()))}.conv1"
        channels, dims = specs[0].in_channels, image_dims(first.conv1)
        assert parameters[2] is not None
        execution.check_input(x, dims, channels, parameters[2], name)
        if chosen.kind == ORIGINAL:
            return self._run_original(chosen, handover.own(init_features, asked))
        execution.record(self, "", chosen, (norm for part in call.parts for norm in part.norms()))
        group = None if call.batch is None else call.batch.group
        stats, known = handover.known_stats(x, group)
        exchange = None if call.batch is None else begin_exchange(group, x, known)
        count = x.numel() // x.shape[1] if exchange is None else exchange.total
        x, contiguous = handover.enter(x, asked)
        x, stats = handover.as_dtype(x, stats, execution.working_dtype(x))
        if torch.is_grad_enabled():
            gradients.sole_counts()
        spec = call.spec(
            chosen.operators,
            self.kept_layers,
            self._efficient.newest_first,
            exchange,
            known is not None,
            x.device,
        )
        result = Result()
        y = DenseBlockFunction.apply(spec, x, stats, result, *parameters)
        if exchange is not None:  # there is no original that would know better on the CPU
            y, differentiable = y
            result.stats = (
                result.stats if result.stats is None or not asked.lent else differentiable
            )
        elif result.has_overflowed():
            return self._run_original(
                Dispatch(ORIGINAL, OVERFLOW), handover.own(init_features, asked)
            )
        if call.norms:
            assert result.table is not None
            running.update(call.running, result.table, call.first, count)
        stats = result.stats
        with_input = self._efficient.with_input
        if with_input is not None and not with_input(self):
            y, stats = handover.new_features(y, stats, spec.new)
            y, stats = handover.as_dtype(y, stats, execution.convolution_dtype(x))
        return handover.hand_over(y, stats, asked._replace(contiguous=contiguous), exchange)


class EfficientDenseBlock(DenseBlockExecution, PlainDenseBlock):  # type: ignore[misc]
    """A dense block in one feature buffer: torchvision's ``_DenseBlock``, children and keys.

    Args:
        num_layers: dense layers, at least 1.
        num_input_features: channels of the input.
        bn_size: width of a bottleneck, in growth rates.
        growth_rate: k, the channels every layer adds.
        drop_rate: dropout after every layer's last convolution, 0 to 1.
        memory_efficient: accepted for torchvision's signature; every mode here is.
        memory: ``"recompute"`` keeps the output only (Pleiss et al., arXiv 1707.06990, and less);
            ``"store"`` also keeps every bottleneck and saves recomputing it; ``"auto"`` those of
            the last ``kept_layers``, which a network sets and is 0 at first.

    Keyword Args:
        with_input (bool): False: only the new channels come out, as on the way up of an
            FC-DenseNet.
        bottleneck (bool): False: layers are one 3x3 convolution.
        eps (float): of every norm.
        momentum (float): of every norm.
        dilation (int): of the 3x3 convolutions.
        dims (int): dimensions of an image, 1 to 3.

    Input ``[N, num_input_features, *spatial]`` (or a list of tensors to concatenate), any memory
    format; output ``[N, num_input_features + num_layers * growth_rate, *spatial]``, contiguous for
    a contiguous input (a copy), channels last otherwise. float64, float32, bfloat16, float16, and
    autocast.

    Raises:
        ValueError: bad options; wrong rank, channels or device; one value per channel in training.
        TypeError: a dtype that is not floating or differs from the weights'.
    """

    original_class = PlainDenseBlock

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        memory: str = "recompute",
        **options: Any,
    ) -> None:
        check_memory(memory)
        PlainDenseBlock.__init__(
            self, num_layers, num_input_features, bn_size, growth_rate, drop_rate, **options
        )
        self._adopt(standard_parts, memory, with_input=_is_with_input)

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, nn.Module],
        parts: Parts = standard_parts,
        memory: str = "recompute",
    ) -> EfficientDenseBlock:
        """A block around existing layers, which keep their names, parameters and buffers.

        parts: a picklable function that names a layer's modules. Each layer must also run on its
        own, from the list of all earlier outputs to its new features (the original forward).
        """
        check_modules("layers", layers, parts)
        check_memory(memory)
        block = cls.__new__(cls)
        nn.ModuleDict.__init__(block, dict(layers))
        block._adopt(parts, memory)
        block.training = next(iter(layers.values())).training  # not of the layers' own norms
        return block


def _is_with_input(block: Any) -> bool:
    return block.with_input


def _joined(x: Any) -> Any:
    """A list of tensors as one tensor; anything else as it is."""
    if isinstance(x, (list, tuple)) and x and all(isinstance(part, Tensor) for part in x):
        return torch.cat(list(x), 1)
    return x


def _defers(call: BlockCall) -> bool:
    """Whether statistics of the batch bring something to the gradient of a call's features, which
    is left until later. Not said of SyncBatchNorm, which has no original forward on the CPU."""
    norms = [norm for part in call.parts for norm in part.norms()]
    return not any(type(norm) is nn.SyncBatchNorm for norm in norms) and any(
        layer.norm1.running is None for layer in call.specs
    )
