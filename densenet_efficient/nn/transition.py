"""The drop-in transition between two dense blocks."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import graph_pooling
from ..core.functions import MaxPoolFunction, Result, TransitionFunction
from ..core.replay import Programs
from ..core.specs import PoolSpec
from ..ops.dispatch import Dispatch
from ..ops.pools import AVG_POOL, MAX_POOL
from . import execution, graph, handover, watch
from .execution import ORIGINAL, OVERFLOW, Efficient
from .graph import GraphPlan
from .layers import CONVOLUTIONS, Convolution, image_dims
from .norms import (
    BatchNorm,
    begin_exchange,
    features_of,
    norm_problem,
    norm_spec,
    update_running_statistics,
    uses_batch_statistics,
)
from .plain import transition_children
from .snapshot import Snapshot

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def is_pool_by_two(pool: nn.Module) -> bool:
    """Whether the module averages over 2 pixels in every direction, dropping odd edges."""
    if type(pool) not in _POOLS:
        return False
    sizes = {once(value) for value in (pool.kernel_size, pool.stride)}
    return (
        sizes == {2}
        and once(pool.padding) == 0
        and not pool.ceil_mode
        and getattr(pool, "divisor_override", None) is None
    )


def is_max_pool_by_two(pool: Any) -> bool:
    """Whether the module takes the largest of 2 pixels in every direction, dropping odd edges."""
    if type(pool) not in MAX_POOLS:
        return False
    options = [once(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return options == [2, 2, 0, 1] and not pool.ceil_mode and not pool.return_indices


def once(value: Any) -> Any:
    """The one number of an option given as a number or as equal numbers per axis."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def check_size(x: Tensor) -> None:
    """ValueError for an image that pooling by two leaves nothing of."""
    if min(x.shape[2:]) < 2:
        raise ValueError(
            f"input must be at least 2 pixels in every direction, got shape {list(x.shape)}"
        )


@dataclass(frozen=True)
class TransitionParts:
    """The modules of a transition, whatever its class calls them: norm, ReLU, 1x1 convolution,
    pooling by 2. pool: None where the forward of the class averages by itself; an average, a
    maximum, or an identity where nothing pools. drop_rate: of a dropout between convolution and
    pooling, 0 where it is not applied at present."""

    norm: BatchNorm
    conv: Convolution
    pool: nn.Module | None = None
    drop_rate: float = 0.0


def _pools(parts: TransitionParts) -> bool:
    return type(parts.pool) is not nn.Identity


class _LastCall:
    """What the next call of a transition need not find again where no module has changed.

    snapshot: None where modules cannot be compared. programs: of all calls like this one, see
    `core.replay`.
    """

    def __init__(
        self,
        transition: nn.Module,
        parts: TransitionParts,
        watched: Iterable[nn.Module | None],
    ) -> None:
        self._transition = weakref.ref(transition)  # a replica shares this with its model
        self.parts, self.snapshot = parts, Snapshot.take(transition, watched)
        self.programs = None if self.snapshot is None else Programs()
        self._shape = parts.conv.weight.shape

    def is_as_before(self, transition: nn.Module) -> bool:
        """Whether the transition is this one, and nothing in it has changed but values."""
        if self._transition() is not transition or self.snapshot is None:
            return False
        same = self.snapshot.tensors() is not None
        return same and self.parts.conv.weight.shape == self._shape


def _dtypes(x: Tensor, pools: bool) -> tuple[torch.dtype, torch.dtype]:
    """What the operators run in and what the original modules answer in."""
    answer = execution.convolution_dtype(x)
    if pools:
        answer = execution.pooling_dtype(x, x.dim() - 2)
    return torch.promote_types(execution.working_dtype(x), answer), answer


def standard_transition_parts(transition: nn.Module) -> TransitionParts:
    """Parts of a transition with torchvision's attribute names."""
    drop: Any = getattr(transition, "drop", None)
    drop_rate = drop.p if drop is not None and drop.training else 0.0
    return TransitionParts(transition.norm, transition.conv, transition.pool, drop_rate)  # type: ignore[arg-type]


class TransitionExecution(Efficient):
    """The execution of a transition, whatever holds its modules."""

    def _adopt(self, parts: Callable[[nn.Module], TransitionParts]) -> None:  # type: ignore[override]
        """Takes the present modules over. parts: transition -> its modules, a picklable function of
        these alone: a call asks it again where one has changed since the last call."""
        super()._adopt(parts=parts)

    def parts(self) -> TransitionParts:
        """The transition's modules."""
        assert self._efficient.parts is not None
        return self._efficient.parts(self)

    def path(self, x: Tensor) -> Dispatch:
        """How this transition would run on x, and why."""
        return self._decision(x)[0]

    def _decision(self, x: Any) -> tuple[Dispatch, _LastCall | None]:
        reason = self._input_problem(x) or self._patch()
        if reason is not None:
            return Dispatch(ORIGINAL, reason), None
        state = self._efficient
        last = state.last_call  # which another thread may exchange
        if last is None or not last.is_as_before(self):
            reason = watch.change(self._watched(), state.structure) or self._problem()
            if reason is not None:
                return Dispatch(ORIGINAL, reason), None
            last = _LastCall(self, self.parts(), self._watched().values())
            state.last_call = last if last.snapshot is not None else None
        parts = last.parts
        return execution.choose(x, image_dims(parts.conv), _dtypes(x, _pools(parts))[0]), last

    def _problem(self) -> str | None:
        """Why the operators cannot replace the modules, in words."""
        problem = norm_problem(self.parts().norm)
        return f"norm {problem}" if problem is not None else self._geometry_problem()

    def _geometry_problem(self) -> str | None:
        parts = self.parts()
        conv: Any = parts.conv
        if type(conv) not in CONVOLUTIONS or conv.groups != 1:
            return "conv is not a plain convolution"
        stride, padding = (once(value) for value in (conv.stride, conv.padding))
        if set(conv.weight.shape[2:]) != {1} or stride != 1 or padding != 0:
            return "conv is not pointwise"
        if parts.pool is not None and not (
            type(parts.pool) is nn.Identity
            or is_pool_by_two(parts.pool)
            or is_max_pool_by_two(parts.pool)
        ):
            return (
                f"pool is {parts.pool}, not an average or maximum over 2 pixels in every direction"
            )
        return None

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, *spatial] -> [N, K, *(spatial // 2)]; without pooling [N, K, *spatial]."""
        if torch.compiler.is_compiling():
            return graph.forward(self, input, input)
        return self._efficient_forward(input)

    def in_graph(
        self, x: Tensor, known: Tensor | None, contiguous: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `DenseBlockExecution.in_graph`."""
        plan = self._graph_plan(id(self))
        graph.guard(self, plan)
        if plan.kind == graph.ORIGINAL:
            return self._original(x), None
        if plan.kind == graph.EAGER:
            return self._efficient_forward(x), None
        running, parameters = graph.tensors(self, plan)
        graph.check_input(x, plan, parameters)
        if plan.pools:
            check_size(x)
        dtype, answer = _dtypes(x, plan.pools)
        x, known = handover.as_dtype(x, known, dtype)
        y, stats, used = graph_pooling.transition(
            plan.call, plan.given, x, known, running, parameters
        )
        graph.update(self, plan, used, x.numel() // x.shape[1])
        if plan.drop_rate > 0:
            y = F.dropout(y, plan.drop_rate)
        if plan.pools and not plan.fused:
            pool = MAX_POOL if plan.largest else AVG_POOL
            y = pool[y.dim() - 2](y, 2, 2)
        y, stats = handover.as_dtype(y, stats if plan.has_stats else None, answer)
        return y if contiguous is None else graph.leave(y, contiguous), stats

    @torch.compiler.assume_constant_result
    def _graph_plan(self, ident: int) -> GraphPlan:
        """How `in_graph` runs. ident: guards on this very module."""
        reason = self._change() or self._problem()
        if reason is not None:
            return graph.make_plan(self.named_modules(), graph.ORIGINAL)
        parts = self.parts()
        norm, conv, drops = parts.norm, parts.conv, parts.drop_rate > 0
        pools, largest = _pools(parts), is_max_pool_by_two(parts.pool)
        own = norm_spec(norm, torch.float32)
        last = not drops and not largest  # whether the operator's result is the transition's
        want = own.running is None and last
        return graph.make_plan(
            self.named_modules(),
            graph.OPERATOR,
            PoolSpec(own, None, want, pools=pools and last),  # type: ignore[arg-type]
            [(module, name) for module in (norm, conv) for name in ("weight", "bias")],
            [(norm, own, 0, features_of(norm))],
            name="conv",
            channels=features_of(norm),
            has_stats=want,
            drop_rate=parts.drop_rate,
            pools=pools,
            fused=last,
            largest=largest,
        )

    @torch.compiler.disable(reason=graph.OUTSIDE)
    def _efficient_forward(self, x: Tensor) -> Tensor:
        asked = handover.asked_for()
        chosen, call = self._decision(x)
        if call is None:
            # The original's norm would count an empty batch that its pooling then refuses.
            empty = chosen.reason == execution.EMPTY and x.dim() > 2
            if empty and self._problem() is None and _pools(self.parts()):
                check_size(x)
            return self._run_original(chosen, handover.own(x, asked))
        parts = call.parts
        norm, conv = parts.norm, parts.conv
        execution.record(self, "", chosen, [norm])
        original = x
        gamma, beta, weight, bias = norm.weight, norm.bias, conv.weight, conv.bias
        execution.check_input(x, image_dims(conv), features_of(norm), weight, "conv")
        pools, drops = _pools(parts), parts.drop_rate > 0
        takes_largest = is_max_pool_by_two(parts.pool)
        if pools:
            check_size(x)
        want, (dtype, answer) = uses_batch_statistics(norm), _dtypes(x, pools)
        own = norm_spec(norm, dtype)
        stats, known = handover.known_stats(x, own.group)
        exchange = begin_exchange(own.group, x, known) if want else None
        count = x.numel() // x.shape[1] if exchange is None else exchange.total
        x, contiguous = handover.enter(x, asked)
        x, stats = handover.as_dtype(x, stats, dtype)
        last = not drops and not takes_largest  # whether the operator's result is the transition's
        takes_stats, fused = want and last, pools and last
        spec = PoolSpec(
            own, chosen.operators, takes_stats, exchange, known is not None, fused, call.programs
        )
        result = Result()
        y = TransitionFunction.apply(spec, x, stats, result, gamma, beta, weight, bias)
        if exchange is None and result.has_overflowed():
            return self._run_original(Dispatch(ORIGINAL, OVERFLOW), handover.own(original, asked))
        if want:
            assert result.used is not None
            update_running_statistics(norm, result.used, count)
        if takes_largest:
            y = MaxPoolFunction.apply(y, parts.drop_rate)
        elif drops:  # it does not commute with the pooling, which is fused otherwise
            y = F.dropout(y, parts.drop_rate)
            y = AVG_POOL[y.dim() - 2](y, 2, 2) if pools else y
        asked = asked._replace(contiguous=contiguous)
        return handover.hand_over(*handover.as_dtype(y, result.stats, answer), asked)


class EfficientTransition(TransitionExecution, nn.Sequential):
    """Norm, ReLU, 1x1 convolution and average pooling by 2, executed as one operator that pools
    first.

    torchvision's ``_Transition``: children norm, relu, conv, pool. An average and a pointwise
    convolution commute, so the product runs on a quarter of the pixels. Only the input is kept for
    backward; with max_pool=True, as in an FC-DenseNet, where the pooling follows the product, a
    byte for each value of the output as well. Input ``[N, C, *spatial]``, output
    ``[N, K, *(spatial // 2)]``; layouts, dtypes and errors as in `EfficientDenseBlock`. By keyword:
    drop_rate (between convolution and pooling, which then run one after the other), pool=False (as
    for an output stride that has been reached), max_pool, bias, eps.
    """

    original_class = nn.Sequential

    def __init__(self, num_input_features: int, num_output_features: int, **options: Any) -> None:
        children = transition_children(num_input_features, num_output_features, **options)
        nn.Sequential.__init__(self, OrderedDict(children))
        self._adopt(standard_transition_parts)
