"""What a call of a dense block is made from: found by looking at all of its modules, or, where
nothing has changed since, as it was found before."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core import dropout
from ..core.exchange import Exchange
from ..core.replay import Programs, taker
from ..core.running import Running
from ..core.specs import BlockSpec, LayerSpec, NormSpec
from ..ops.interface import Operators
from .layers import LayerParts, parameter_places, tail_parameters
from .norms import BatchNorm, running_of, tracks
from .snapshot import Snapshot

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NOTHING = Running((), (), (), ())
_shape_of = attrgetter("shape")


class Repeated:
    """What calls that are like each other have in common: the programs, see `core.replay`, and the
    last specification. Not for layers that drop, whose calls differ."""

    def __init__(self) -> None:
        self.programs, self.spec = Programs(), None  # type: Programs, BlockSpec | None


class BlockCall(NamedTuple):
    """The layers of a call.

    parts, specs: of each. batch: the first norm that uses the batch's statistics. parameters: in
    the order of `core.dense_block`. norms: those whose running statistics the call updates.
    running: what these keep. first: where the batch's begin in `core.dense_block.Kept.table`.
    """

    parts: Sequence[LayerParts]
    specs: tuple[LayerSpec, ...]
    batch: NormSpec | None
    parameters: Sequence[Tensor | None]
    norms: Sequence[BatchNorm]
    running: Running
    first: Sequence[int]
    repeated: Repeated | None = None

    def spec(
        self,
        operators: Operators,
        kept_layers: int,
        newest_first: bool,
        exchange: Exchange | None,
        known_shared: bool,
        device: torch.device,
    ) -> BlockSpec:
        """What the call is; of calls that are like each other the same object, which has found out
        more about itself."""
        repeated = self.repeated
        last = None if repeated is None else repeated.spec
        if (
            last is not None
            and exchange is None
            and not known_shared
            and last.operators is operators
            and last.kept_layers == kept_layers
        ):
            return last
        spec = BlockSpec(
            self.specs,
            operators,
            kept_layers,
            newest_first=newest_first,
            exchange=exchange,
            known_shared=known_shared,
            programs=None if repeated is None else repeated.programs,
            **dropout.origin(self.specs, device),
        )
        if repeated is not None and exchange is None and not known_shared:
            repeated.spec = spec
        return spec


def look(
    parts: Sequence[LayerParts],
    specs: tuple[LayerSpec, ...],
    norms: Iterable[tuple[BatchNorm, slice]],
) -> BlockCall:
    """The call of layers as they are now. norms: all that use the batch's statistics."""
    places = [place for part in parts for place in parameter_places(part)]
    parameters = [None if module is None else getattr(module, name) for module, name in places]
    parameters += [p for part in parts for p in tail_parameters(part)]
    tracked = [pair for pair in norms if tracks(pair[0])]
    return BlockCall(
        parts,
        specs,
        next((norm for layer in specs for norm in layer.batch_norms()), None),
        parameters,
        [norm for norm, _ in tracked],
        running_of([norm for norm, _ in tracked]),
        [columns.start for _, columns in tracked],
    )


class LastCall:
    """The last call of a block, and how the next one can be like it: with the tensors that its
    modules then have, and all else the same."""

    def __init__(
        self, block: nn.Module, dtype: torch.dtype, call: BlockCall, snapshot: Snapshot
    ) -> None:
        self._block, self._dtype = weakref.ref(block), dtype  # a replica shares this with its model
        drops = any(spec.drops() for spec in call.specs)  # other values in every call
        self.repeated = None if drops else Repeated()
        # Without its tensors: those that a model exchanges for others are freed.
        self._call = call._replace(parameters=(), running=_NOTHING, repeated=self.repeated)
        self._snapshot = snapshot
        places = [place for part in call.parts for place in parameter_places(part)]
        of_parameters = [snapshot.place(*place) for place in places]
        self._parameters = taker(of_parameters)
        # The convolutions' weights say how many channels there are.
        weights = [place for place in of_parameters[2::4] if place >= 0]
        self._weights = taker(weights)
        self._shapes = [weight.shape for weight in call.parameters[2::4] if weight is not None]
        self._running = [
            taker([snapshot.place(norm, name) for norm in call.norms]) for name in _BUFFERS
        ]
        self._momenta = call.running.momenta

    @classmethod
    def of(
        cls,
        block: nn.Module,
        dtype: torch.dtype,
        call: BlockCall,
        watched: Iterable[nn.Module | None],
    ) -> LastCall | None:
        """None where a later call may differ although no module has changed: copies of running
        statistics are new for each, processes come and go, a tail is anything."""
        if any(
            spec.tail is not None or len(spec.batch_norms()) != len(part.norms())
            for spec, part in zip(call.specs, call.parts, strict=True)
        ):
            return None
        norms = [norm for part in call.parts for norm in part.norms()]
        if any(type(norm) is nn.SyncBatchNorm for norm in norms):
            return None
        snapshot = Snapshot.take(block, watched)
        return None if snapshot is None else cls(block, dtype, call, snapshot)

    def again(self, block: nn.Module, dtype: torch.dtype) -> BlockCall | None:
        """The next call; None where it must be looked at anew."""
        if self._block() is not block or self._dtype != dtype:
            return None
        tensors = self._snapshot.tensors()
        if tensors is None:
            return None
        if [*map(_shape_of, self._weights(tensors))] != self._shapes:
            return None
        means, variances, batches = (take(tensors) for take in self._running)
        running = Running(means, variances, batches, self._momenta)
        parts, specs, batch, _, norms, _, first, repeated = self._call
        parameters = self._parameters(tensors)
        return BlockCall(parts, specs, batch, parameters, norms, running, first, repeated)
