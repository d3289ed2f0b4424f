"""What a call of a dense block is made from: found by looking at all of its modules, or, where
nothing has changed since, as it was found before."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor, nn

from ..core.replay import Programs
from ..core.running import Running
from ..core.specs import LayerSpec
from .layers import LayerParts, parameter_places, tail_parameters
from .norms import BatchNorm, running_of, tracks
from .snapshot import Snapshot

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NOTHING = Running((), (), (), ())


@dataclass(frozen=True)
class BlockCall:
    """The layers of a call.

    parts, specs: of each. parameters: in the order of `core.dense_block`. norms: those whose
    running statistics the call updates. running: what these keep. first: where the batch's begin
    in `core.dense_block.Kept.table`. programs: of all calls like this one, see `core.replay`.
    """

    parts: Sequence[LayerParts]
    specs: tuple[LayerSpec, ...]
    parameters: Sequence[Tensor | None]
    norms: Sequence[BatchNorm]
    running: Running
    first: Sequence[int]
    programs: Programs | None = None


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
        self.programs = None if drops else Programs()
        # Without its tensors: those that a model exchanges for others are freed.
        self._call = replace(call, parameters=(), running=_NOTHING, programs=self.programs)
        self._snapshot = snapshot
        places = [place for part in call.parts for place in parameter_places(part)]
        self._parameters = itemgetter(*(snapshot.place(*place) for place in places))
        self._running = [[snapshot.place(norm, name) for norm in call.norms] for name in _BUFFERS]
        self._momenta = call.running.momenta
        self._shapes = _shapes(call.parameters)

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
        parameters = self._parameters(tensors)
        if _shapes(parameters) != self._shapes:
            return None
        means, variances, batches = ([tensors[at] for at in places] for places in self._running)
        running = Running(means, variances, batches, self._momenta)
        return replace(self._call, parameters=parameters, running=running)


def _shapes(parameters: Sequence[Tensor | None]) -> list[torch.Size | None]:
    """Of the convolutions' weights, which say how many channels there are."""
    return [None if weight is None else weight.shape for weight in parameters[2::4]]
