"""A whole training step in a CUDA graph: forward, backward and the optimiser's step are recorded
once and replayed for every batch, so that the host launches one graph instead of thousands of
kernels. For small and deep networks, whose kernels are done before the host has launched the next.

A graph repeats launches, addresses and numbers. So batches are copied into tensors that stay;
learning rates are read from the device; and where anything else that the graph was made from has
changed, or a call is of another kind, the step runs eagerly, and `path` says why.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..core import arena, capture, eager
from ..core.capture import Recorder
from ..ops.dispatch import Dispatch
from .execution import recording
from .options import check_count
from .step_state import StepState, distance

GRAPH, EAGER = "graph", "eager"
ROUNDING = 0.1
"""How far the first replay may end from the eager step, as a share of the way of that step. Its
bits are the same where the operators repeat theirs; some of PyTorch's sum in another order each
time, which moves a step by its rounding, while one that is not the same ends elsewhere."""


class GraphedStep:
    """A training step that is captured in a CUDA graph and replayed.

    Args:
        step: the whole step on a batch: forward, backward and the optimiser's step; called with
            tensors, returns a tensor, such as the loss, or several in tuples, lists or
            dictionaries. Gradients are None when it is called. The learning rate's schedule is
            stepped outside.
        state: whatever the step changes: the model, the optimiser and other modules. PyTorch's
            `AveragedModel`, which counts on the host, is updated outside. Optimisers on a GPU:
            ``SGD(fused=True)``, ``Adam(capturable=True)`` or ``AdamW(capturable=True)``, without a
            `torch.amp.GradScaler`, which decides on the host whether a step is left out.

    Keyword Args:
        warm_up (int): eager steps on batches of one shape before the capture, at least 1.

    A call takes a batch, tensors on the model's device, and does one step on it, whatever way:
    the first ones eagerly, then, for batches of the shape that was captured, by a replay. It
    returns what `step` returned, detached. `path` says how the last call ran. Learning rates may
    change between calls. The step runs eagerly, with a warning, where something is registered or
    active that no graph can hold (hooks, anomaly mode, DistributedDataParallel); on the CPU and for
    batches of another shape without one. Where parameters, modes, momentum, eps or drop rates of
    modules, a module's own forward, options of the optimiser or autocast around the step change, it
    is captured anew. The graph keeps the memory of a step for itself.

    Raises:
        TypeError: step is no function, or state holds something else or an unknown optimiser.
        ValueError: no model or optimiser in state; an optimiser without the option above; a batch
            without tensors; a step that changes a learning rate.
        RuntimeError: the step cannot be captured, or its first replay is not the eager step.
    """

    def __init__(self, step: Callable[..., Any], *state: Any, warm_up: int = 3) -> None:
        if not callable(step):
            raise TypeError(f"step must be a function, got a {type(step).__name__}")
        self.step, self.warm_up = step, check_count("warm_up", warm_up)
        self.state = StepState(state)
        if any(p.device.type == "cuda" for p in self.state.parameters()):
            self.state.check_optimizers()
        self.path = Dispatch(EAGER, "no step has been made")
        self.modules: list[tuple[str, Dispatch]] = []
        """How the modules ran in the captured step: (name, dispatch)."""
        self.difference: float | None = None
        """How far the first replay ended from the eager step, see `ROUNDING`; 0 for equal bits."""
        self._seen: Counter[Any] = Counter()
        self._mark: Any = None
        self._warned: set[str] = set()
        self._replay: Callable[[], None] | None = None
        self._recorder: Recorder | None = None
        self._kind = ""
        self._batch: list[Tensor] = []
        self._results: Any = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, *batch: Tensor) -> Any:
        """One step; see the class."""
        if not batch or not all(isinstance(tensor, Tensor) for tensor in batch):
            kinds = ", ".join(type(value).__name__ for value in batch) or "nothing"
            raise ValueError(f"a batch must be tensors, got {kinds}")
        device = batch[0].device
        problem = self._device_problem(batch)
        if problem is not None:
            return self._eagerly(batch, problem, None)
        problem = self._mode_problem() or self.state.problem()
        if problem is not None:
            if problem not in self._warned:
                self._warned.add(problem)
                warnings.warn(f"the step runs eagerly, without a graph: {problem}", stacklevel=2)
            return self._eagerly(batch, problem, device)
        if self.state.mark() != self._mark:
            self._forget()
        if self._replay is None:
            return self._before_capture(batch, device)
        if _kind(batch) != self._kind:
            return self._eagerly(batch, f"the graph is of a batch {self._kind}", device)
        return self._replayed(batch)

    def _device_problem(self, batch: tuple[Tensor, ...]) -> str | None:
        devices = {tensor.device for tensor in (*batch, self.state.parameters()[0])}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            return f"a graph needs one CUDA device, got {', '.join(sorted(map(str, devices)))}"
        if torch.cuda.is_current_stream_capturing():
            return "another graph is being captured"
        return None

    def _mode_problem(self) -> str | None:
        if torch.is_anomaly_enabled():
            return "anomaly mode is on, which looks at every operator on the host"
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            return (
                "autocast is around the step, and keeps weights from call to call: enter it in it"
            )
        return eager.unusual_mode()

    def _forget(self) -> None:
        """No graph any more: what it was made from has changed."""
        self._replay, self._results, self._batch, self._gradients = None, None, [], []
        self._seen.clear()
        self.state.look()

    def _before_capture(self, batch: tuple[Tensor, ...], device: torch.device) -> Any:
        """An eager step on another stream, or, when there were enough, the capture."""
        kind = _kind(batch)
        self.state.check_optimizers()
        if self._recorder is None or self._recorder.device != device:
            self._recorder = Recorder(device)
        if self._seen[kind] == self.warm_up:
            return self._capture(batch, self._recorder)
        self._seen[kind] += 1
        reason = f"step {self._seen[kind]} of {self.warm_up} before the capture"
        with self._recorder.aside():
            results = self._eagerly(batch, reason, device)
        self._mark = self.state.mark()
        return results

    def _eagerly(self, batch: Any, reason: str, device: torch.device | None) -> Any:
        """device: with learning rates on it, as in the graph."""
        self.path = Dispatch(EAGER, reason)
        with nullcontext() if device is None else self.state.rates_on(device):
            return self._run(batch)

    def _run(self, batch: Any) -> Any:
        for parameter in self.state.parameters():
            parameter.grad = None
        results = self.step(*batch)
        for value in tree_flatten(results)[0]:
            if not isinstance(value, Tensor):
                raise TypeError(f"step must return tensors, got a {type(value).__name__}")
        # Nothing of the autograd graph is left: it would tie later ones to this call's stream.
        return tree_map(Tensor.detach, results)

    def _capture(self, batch: tuple[Tensor, ...], recorder: Recorder) -> Any:
        """An eager step, which counts; the same again, captured and replayed; and a comparison."""
        device, state = recorder.device, self.state
        static = [tensor.detach().clone() for tensor in batch]
        before, random = state.copies(), recorder.random_state()
        with recorder.aside(), capture.rehearsed():
            reason = "the step that the graph is compared with"
            expected = tree_map(Tensor.clone, self._eagerly(batch, reason, device))
        after = state.copies()
        state.restore(before)
        recorder.restore_random_state(random)
        arena.release(device)
        try:
            with state.rates_on(device), recording() as entries:
                replay, results = recorder.record(lambda: self._run(static))
            # Nothing has run yet on the device.
            if distance(state.tensors(), before, before) > 0:
                raise ValueError("it changed a tensor of its state on the host")
            replay()
        except Exception as error:
            state.restore(after)
            raise RuntimeError(
                "step cannot be captured: what it does on the host, such as reading a value of a "
                f"tensor, is not part of a graph: {type(error).__name__}: {error}"
            ) from error
        found, wanted = tree_flatten(results)[0], tree_flatten(expected)[0]
        zeros = [torch.zeros_like(value) for value in wanted]
        self.difference = distance([*state.tensors(), found], [*after, wanted], [*before, zeros])
        if self.difference > ROUNDING:
            state.restore(after)
            raise RuntimeError(
                f"step cannot be replayed: it ended {self.difference:.2g} of its way from the "
                "eager step; what the host reads, draws or decides is the same at every replay"
            )
        self._replay, self._results, self._batch = replay, results, static
        self._kind = _kind(batch)
        self._gradients = [p.grad for p in state.parameters()]
        self._mark = state.mark()
        self.modules = self._named(entries)
        return self._after_replay()

    def _replayed(self, batch: tuple[Tensor, ...]) -> Any:
        assert self._replay is not None
        self.state.write_rates()
        for static, tensor in zip(self._batch, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        self._replay()
        return self._after_replay()

    def _after_replay(self) -> Any:
        for parameter, gradient in zip(self.state.parameters(), self._gradients, strict=True):
            if parameter.grad is not gradient:  # of an eager step, or dropped since
                parameter.grad = gradient
        self.path = Dispatch(GRAPH, f"replays the step captured for a batch {self._kind}")
        return tree_map(Tensor.clone, self._results)

    def _named(self, entries: Any) -> list[tuple[str, Dispatch]]:
        roots = (part for part in self.state.parts if isinstance(part, torch.nn.Module))
        names = {id(m): name for root in roots for name, m in root.named_modules()}
        return [
            (".".join(filter(None, (names.get(id(m), ""), part))) or type(m).__name__, chosen)
            for m, part, chosen in entries
        ]


def _kind(batch: Any) -> str:
    """What must be the same for a graph, in words."""
    return " and ".join(
        f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} of strides {list(t.stride())}"
        for t in batch
    )
