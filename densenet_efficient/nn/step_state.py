"""What a training step reads and changes besides its batch: parameters, buffers, the optimiser's
state. For a CUDA graph, which knows them by their addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..core import eager
from .norms import process_group

HELD = ("_parameters", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
RATES = ("lr", "initial_lr")
"""Entries of a parameter group that may change between replays."""
OPTIONS = ("momentum", "eps", "p", "drop_rate")
"""Attributes of norms, dropout and layers that trainings change and a graph holds as numbers."""

Copies = list[list[Tensor]]


class StepState:
    """The state of a step.

    parts: modules and optimisers. TypeError for anything else, ValueError where one of the two is
    missing.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = list(parts)
        for part in self.parts:
            if isinstance(part, GradScaler):
                raise TypeError(
                    "state must be modules and optimisers, got a GradScaler: it decides on the "
                    "host whether a step is left out; bfloat16 needs none"
                )
            if not isinstance(part, (nn.Module, Optimizer)):
                raise TypeError(
                    f"state must be modules and optimisers, got a {type(part).__name__}"
                )
        self.optimizers = [part for part in self.parts if isinstance(part, Optimizer)]
        self._rates: list[tuple[dict[str, Any], Tensor]] = []
        self._written: list[float] = []
        self.look()
        if not self.modules or not self.optimizers:
            raise ValueError("state must be at least the model and its optimiser")

    def look(self) -> None:
        """Notes the modules inside as they are now."""
        roots = [part for part in self.parts if isinstance(part, nn.Module)]
        self.modules = list(dict.fromkeys(chain.from_iterable(r.modules() for r in roots)))
        self._entries = [vars(module) for module in self.modules]
        self._held = [e[name] for e in self._entries for name in HELD if e[name]]
        self._options = [(e, name) for e in self._entries for name in OPTIONS if name in e]
        self._children = [e["_modules"] for e in self._entries if e["_modules"]]
        self._hooks = [getattr(module, name) for module in self.modules for name in HOOKS]
        self._hooks += [getattr(part, name) for part in self.optimizers for name in STEP_HOOKS]
        self._hooks += [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
        self._shared: str | None = None
        for module in self.modules:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                self._shared = "gradients are exchanged between processes"
            elif process_group(module, training=True) is not None:
                self._shared = "norms share their statistics between processes"

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers."""
        return [group for part in self.optimizers for group in part.param_groups]

    def parameters(self) -> list[Tensor]:
        """Those that the optimisers step."""
        return [p for group in self.groups for p in group["params"]]

    def tensors(self) -> list[list[Tensor]]:
        """Everything that a step may write, part by part."""
        found: list[list[Any]] = []
        for module in self.modules:
            found.append(list(module._parameters.values()))
            found.append(list(module._buffers.values()))
        for optimizer in self.optimizers:
            found.append([v for state in optimizer.state.values() for v in state.values()])
        return [[t.detach() for t in part if isinstance(t, Tensor)] for part in found]

    def mark(self) -> tuple[Any, ...]:
        """Equal as long as a graph that was captured meanwhile is right: the same tensors, modules,
        their modes, options and forwards, options of the optimisers, save their learning rates, and
        autocast."""
        states = [state for part in self.optimizers for state in part.state.values()]
        held = [t for values in (*self._held, *states) for t in values.values() if t is not None]
        return (
            list(map(Tensor.data_ptr, held)),
            [g["lr"].data_ptr() for g in self.groups if _is_on_a_device(g["lr"])],
            [parameter.requires_grad for parameter in self.parameters()],
            [entries["training"] for entries in self._entries],
            [entries.get(name) for entries, name in self._options],
            [entries.get("forward") for entries in self._entries],
            [id(child) for children in self._children for child in children.values()],
            [
                [(k, v) for k, v in group.items() if k != "params" and k not in RATES]
                for group in self.groups
            ],
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        )

    def problem(self) -> str | None:
        """Why a graph cannot stand for the step, in words."""
        if self._shared is not None:
            return self._shared
        if any(self._hooks):
            return "a hook is registered on a module or an optimiser, and would not run in a replay"
        for parameter in self.parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a hook is registered on a parameter, and would not run in a replay"
            if not eager.is_ordinary(parameter):
                return f"a parameter is a {type(parameter).__name__} on {parameter.device}"
        return None

    def check_optimizers(self) -> None:
        """ValueError for an optimiser whose step no graph can hold, TypeError for one that is not
        known."""
        for optimizer in self.optimizers:
            name = type(optimizer).__name__
            if type(optimizer) not in (SGD, Adam, AdamW):
                raise TypeError(f"the optimiser must be SGD, Adam or AdamW for a graph, got {name}")
            wanted = "fused" if type(optimizer) is SGD else "capturable"
            for group in optimizer.param_groups:
                if group[wanted] is not True:
                    raise ValueError(
                        f"the optimiser must be {name}(..., {wanted}=True) for a graph, which "
                        f"reads learning rates on the device, got {wanted}={group[wanted]}"
                    )

    @contextmanager
    def rates_on(self, device: torch.device) -> Iterator[None]:
        """Within, learning rates are tensors on the device, the same ones every time; outside they
        are the numbers that they were, for schedules and checkpoints. ValueError where a step
        changes one."""
        groups = [group for group in self.groups if not _is_on_a_device(group["lr"])]
        if [id(group) for group in groups] != [id(group) for group, _ in self._rates]:
            self._rates = [
                (group, torch.zeros((), dtype=torch.float32, device=device)) for group in groups
            ]
            self._written = [math.nan] * len(groups)
        self.write_rates()
        numbers = [group["lr"] for group, _ in self._rates]
        versions = [rate._version for _, rate in self._rates]
        for group, rate in self._rates:
            group["lr"] = rate
        try:
            yield
            for (group, rate), version in zip(self._rates, versions, strict=True):
                if group["lr"] is not rate or rate._version != version:
                    raise ValueError(
                        "step changed a learning rate: schedules must be stepped after it, outside"
                    )
        finally:
            for (group, _), number in zip(self._rates, numbers, strict=True):
                group["lr"] = number

    def write_rates(self) -> None:
        """The learning rates as they are now, for steps on the device."""
        for index, (group, rate) in enumerate(self._rates):
            now = float(group["lr"])
            if now != self._written[index]:
                rate.fill_(now)
                self._written[index] = now

    def copies(self) -> Copies:
        """Of all tensors, part by part."""
        return [[tensor.clone() for tensor in part] for part in self.tensors()]

    @torch.no_grad()
    def restore(self, copies: Copies) -> None:
        """The values of `copies`."""
        for part, values in zip(self.tensors(), copies, strict=True):
            for tensor, value in zip(part, values, strict=True):
                tensor.copy_(value)


def _is_on_a_device(rate: Any) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def distance(found: Copies, expected: Copies, before: Copies) -> float:
    """How far a step ended from where it should have, as a share of the way that it had to go: 0
    where all bits agree, else the largest share of a part. Counters must be equal."""
    worst = 0.0
    for part in zip(found, expected, before, strict=True):
        wrong, way = 0.0, 0.0
        for mine, theirs, start in zip(*part, strict=True):
            if torch.allclose(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True):
                way += _square(theirs, start)
            elif not theirs.is_floating_point():
                return math.inf
            else:
                wrong, way = wrong + _square(mine, theirs), way + _square(theirs, start)
        if wrong != 0:
            share = math.sqrt(wrong / way) if way else math.inf
            worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


def _square(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())
