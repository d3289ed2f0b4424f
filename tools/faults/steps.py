"""Training steps that break off in the middle: by ctrl-C at a line, or by an allocation that fails.

Afterwards parameters are as before; every module's running statistics are all updated or none; and
the next step is, bit by bit, that of a module which nothing has happened to, whatever the scratch
memory still holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.core import arena
from densenet_efficient.models.densenet import EfficientDenseNet
from densenet_efficient.nn import handover
from densenet_efficient.nn.dense_block import DenseBlockExecution
from densenet_efficient.nn.execution import Efficient
from densenet_efficient.nn.residual_dense_block import EfficientResidualDenseBlock
from densenet_efficient.nn.transition import TransitionExecution

EARLIER = (0, 1, 2)
"""Calls of a module before the step that breaks off: a block's first call looks at its modules, the
second records its operators, and later ones replay them."""


@dataclass(frozen=True)
class Scenario:
    """A module in a mode, and the shape of its input. drops: whether a step draws dropout masks."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    training: bool = True
    dtype: torch.dtype = torch.float32
    drops: bool = False


def _cumulative() -> nn.Module:
    block = de.EfficientDenseBlock(2, 6, 2, 4, 0.0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return block


def _network() -> nn.Module:
    return EfficientDenseNet(4, (1, 2), 8, bn_size=2, num_classes=3)


SCENARIOS = (
    Scenario(
        "block, recompute",
        lambda: de.EfficientDenseBlock(2, 6, 2, 4, 0.3),
        (3, 6, 5, 4),
        drops=True,
    ),
    Scenario(
        "block, store",
        lambda: de.EfficientDenseBlock(2, 6, 2, 4, 0.0, memory="store"),
        (3, 6, 5, 4),
    ),
    Scenario("block, eval", lambda: de.EfficientDenseBlock(2, 6, 2, 4, 0.3), (3, 6, 5, 4), False),
    Scenario(
        "block, bfloat16, store",
        lambda: de.EfficientDenseBlock(2, 16, 2, 16, 0.0, memory="store"),
        (2, 16, 5, 4),
        dtype=torch.bfloat16,
    ),
    Scenario("block, cumulative average", _cumulative, (3, 6, 5, 4)),
    Scenario(
        "block of volumes, float64",
        lambda: de.EfficientDenseBlock(1, 4, 2, 4, 0.0, dims=3),
        (2, 4, 3, 4, 3),
        dtype=torch.float64,
    ),
    Scenario("transition", lambda: de.EfficientTransition(8, 4), (2, 8, 6, 5)),
    Scenario("transition, eval", lambda: de.EfficientTransition(8, 4), (2, 8, 6, 5), False),
    Scenario("network with its stem", _network, (2, 3, 32, 32)),
    Scenario("network with its stem, eval", _network, (2, 3, 32, 32), False),
    Scenario("residual block", lambda: EfficientResidualDenseBlock(6, 4), (2, 6, 5, 4)),
    Scenario(
        "residual block, eval", lambda: EfficientResidualDenseBlock(6, 4), (2, 6, 5, 4), False
    ),
)


class Subject:
    """A scenario's module, one to which nothing happens, their input and the output's gradient."""

    def __init__(self, scenario: Scenario) -> None:
        torch.manual_seed(0)
        self.name = scenario.name
        self.module, self.untouched = scenario.build(), scenario.build()
        moved_norms(self.module, (-1.0, 1.0))
        for module in (self.module, self.untouched):
            module.to(scenario.dtype).train(scenario.training)
        self.before = _copied(self.module.state_dict())
        self.untouched.load_state_dict(self.before)
        self.x = torch.randn(scenario.shape).to(scenario.dtype)
        with torch.no_grad():
            self.gradient = torch.randn_like(self.untouched(self.x))
        self.step(self.untouched)  # whatever is made at a first call
        self.untouched.load_state_dict(self.before)
        self.step(self.untouched)
        self.after = _copied(self.untouched.state_dict())

    def step(self, module: nn.Module) -> dict[str, Tensor]:
        """Output, gradients and state of one step."""
        torch.manual_seed(1)  # of the dropout
        module.zero_grad(set_to_none=True)
        x = self.x.clone().requires_grad_()
        y = module(x)
        y.backward(self.gradient)
        gradients = {f"d {name}": p.grad for name, p in module.named_parameters()}
        return _copied({"y": y, "dx": x.grad, **gradients, **module.state_dict()})

    def prepare(self, earlier: int) -> None:
        """The module as after so many steps, but in the state before any; no scratch memory."""
        for module in self.module.modules():
            if isinstance(module, Efficient):
                module._efficient.last_call = None
        for _ in range(earlier):
            self.step(self.module)
        arena.release()
        self.module.load_state_dict(self.before)

    def broken_off(self, earlier: int, injection: AbstractContextManager[Any]) -> str | None:
        """Begins a step, after so many earlier ones, within the injection, which is to break it
        off, and says what is wrong afterwards, if anything. LookupError where the step came to its
        end."""
        self.prepare(earlier)
        try:
            with injection:
                self.step(self.module)
        except (KeyboardInterrupt, RuntimeError, MemoryError):
            pass
        else:
            raise LookupError
        state = _copied(self.module.state_dict())
        problem = self._state_problem(state) or _surroundings_problem()
        if problem is not None:
            return problem
        fill_scratch(float("nan"))
        got, kept = self.step(self.module), arena.reserved_bytes()
        arena.release()
        self.untouched.load_state_dict(state)
        expected = self.step(self.untouched)
        if kept != arena.reserved_bytes():
            return f"{kept} bytes of scratch afterwards, expected {arena.reserved_bytes()}"
        different = [name for name, value in expected.items() if not _same(value, got[name])]
        return f"the next step differs in {', '.join(different[:3])}" if different else None

    def _state_problem(self, state: dict[str, Tensor]) -> str | None:
        for name, parameter in self.module.named_parameters():
            if not _same(parameter, self.before[name]):
                return f"{name} has changed"
        for unit, names in self._units().items():
            halves = [
                all(_same(state[name], whole[name]) for name in names)
                for whole in (self.before, self.after)
            ]
            if not any(halves):
                return f"running statistics of {unit or 'the module'} are half updated"
        return None

    def _units(self) -> dict[str, list[str]]:
        """The buffers of every module whose running statistics are updated together."""
        together = [
            name
            for name, module in self.module.named_modules()
            if isinstance(module, (DenseBlockExecution, TransitionExecution))
        ]
        units: dict[str, list[str]] = {}
        for name, _ in self.module.named_buffers():
            owner = [unit for unit in together if not unit or name.startswith(f"{unit}.")]
            units.setdefault((owner or [name.rpartition(".")[0]])[0], []).append(name)
        return units


def fill_scratch(value: float) -> None:
    """Fills the idle scratch memory with a float32 value."""
    for slabs in arena._free.values():
        for slab in slabs:
            slab[: slab.numel() // 4 * 4].view(torch.float32).fill_(value)


def _surroundings_problem() -> str | None:
    if arena._lock.locked():
        return "the lock of the scratch memory is held"
    if handover.asked_for() != handover.Asked():
        return "the next call of a module is taken for that of another"
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return "gradients are off, or autocast is on"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8),
        b.detach().contiguous().view(-1).view(torch.uint8),
    )


def _copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def sample(indices: list[int], count: int | None, rng: random.Random) -> list[int]:
    """So many of the indices, in order; all of them where there are fewer."""
    if count is None or count >= len(indices):
        return indices
    return sorted(rng.sample(indices, count))
