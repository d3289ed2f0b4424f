"""Training steps of a network whose norms share their statistics between processes: what each
process does, and the same on one process that has the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_efficient import convert, explain
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.core.exchange import Exchange
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.networks import network

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """batches: images of each process; fewer than all processes make a group of their own.
    memory, momentum, affine, tracks: options of blocks and norms. convert_first: before the norms
    become synchronised. hooked: the kind of hooks on every block and transition, so that nothing is
    left to another stage. trained: as against eval mode. frozen_block: in eval mode. size: of an
    image. pools: whether the transition does."""

    batches: tuple[int, ...]
    memory: str = "recompute"
    momentum: float | None = 0.1
    affine: bool = True
    tracks: bool = True
    convert_first: bool = False
    hooked: str = ""
    trained: bool = True
    frozen_block: bool = False
    size: int = 32
    pools: bool = True


CASES = {
    "two processes": Case((3, 1)),
    "two processes, store": Case((3, 1), memory="store"),
    "two processes, one without images": Case((3, 0)),
    "four processes": Case((4, 2, 1, 1), momentum=None),
    "four processes, one without images": Case((2, 0, 3, 1), convert_first=True),
    "a single pixel each in the last block": Case((1, 1), affine=False, size=8),
    "no running statistics": Case((2, 1), tracks=False),
    "forward hooks": Case((1, 2), hooked="forward"),
    "backward hooks": Case((3, 1), hooked="full_backward"),
    "a block in eval mode": Case((2, 1), frozen_block=True),
    "eval mode": Case((2, 1), trained=False),
    "a transition without pooling": Case((3, 1), pools=False),
    "a transition without pooling, hooked": Case((2, 1), pools=False, hooked="forward"),
}


def plain_network(case: Case) -> nn.Module:
    """The network of a case with ordinary norms, float64."""
    torch.manual_seed(5)
    model = network(growth_rate=4, num_init_features=8).double()
    moved_norms(model)
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = case.momentum
        if not case.affine:
            norm.affine, norm.weight, norm.bias = False, None, None  # type: ignore[assignment]
        if not case.tracks:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    if not case.pools:
        model.features.transition1.pool = nn.Identity()  # type: ignore[union-attr]
    model.train(case.trained)
    if case.frozen_block:
        model.features.denseblock1.eval()  # type: ignore[union-attr,operator]
    return model


def whole_batch(case: Case) -> Tensor:
    """The images of all processes."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(
        sum(case.batches), 3, case.size, case.size, dtype=torch.float64, generator=generator
    )


def step(model: nn.Module, x: Tensor) -> Results:
    """Two training steps without an update: output and gradients of the last, and buffers."""
    for _ in range(2):
        model.zero_grad()
        x = x.detach().clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


def other_orders(model: nn.Module, x: Tensor) -> dict[str, Results]:
    """The parameters' gradients of backward passes in other orders than one after each forward."""
    found = {}

    def keep(name: str) -> None:
        found[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    model.zero_grad()
    for reentrant in (False, True):
        checkpoint(loss, x.clone().requires_grad_(), use_reentrant=reentrant).backward()
        keep(f"checkpointed, reentrant {reentrant}")
    first, second = loss(x), loss(2 * x)
    second.backward()
    first.backward()
    keep("two forwards first")
    again = loss(x)
    again.backward(retain_graph=True)
    again.backward()
    keep("backward twice")
    for name in ("conv0", "norm0", "denseblock1"):
        model.features.get_submodule(name).requires_grad_(False)  # type: ignore[union-attr,operator]
    loss(x).backward()
    keep("frozen at the beginning")
    return found


def shared_model(case: Case, group: Any) -> nn.Module:
    """The network of a case, converted, with synchronised norms."""
    model = plain_network(case)
    if case.convert_first:
        model = convert(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    model = convert(model)
    for module in model.modules():
        if isinstance(module, DenseBlockExecution):
            module.memory = case.memory
    for name, stage in model.features.named_children():  # type: ignore[union-attr]
        if case.hooked and name.startswith(("denseblock", "transition")):
            getattr(stage, f"register_{case.hooked}_hook")(lambda module, before, after: None)
    return model


def run(rank: int) -> dict[str, Any]:
    """What one of four processes finds: the results of every case that it has a part in and what it
    exchanged (`cases`), and the rest by name."""
    pair = dist.new_group([0, 1])
    found: dict[str, Any] = {"cases": _run_cases(rank, pair)}
    if rank < 2:
        case = CASES["two processes"]
        own = whole_batch(case).split(case.batches)[rank]
        found["other orders"] = other_orders(shared_model(case, pair), own)
        found["explained"] = _explained(pair)
        found["refused"] = _refused(pair)
    found["moments"] = _moments(rank)
    return found


def _run_cases(rank: int, pair: Any) -> dict[str, tuple[Results, list[tuple[str, int]]]]:
    found = {}
    for name, case in CASES.items():
        if rank >= len(case.batches):
            continue
        group = pair if len(case.batches) == 2 else None
        model = shared_model(case, group)
        own = whole_batch(case).split(case.batches)[rank]
        with _Exchanged() as exchanged:
            results = step(model, own)
        found[name] = copy.deepcopy(results), exchanged.calls
    return found


def _explained(pair: Any) -> str:
    """Of a network, on one process alone or on both: it exchanges nothing."""
    case = CASES["two processes"]
    return str(explain(shared_model(case, pair), whole_batch(case)))


def _refused(pair: Any) -> dict[str, str]:
    """The messages of errors, by what the error is about."""
    case = CASES["two processes"]
    model = shared_model(case, pair)
    x = whole_batch(case)[:2]
    found = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            found[name] = "no error"
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    y = model(x.requires_grad_())
    attempt("graph", lambda: torch.autograd.grad(y.sum(), x, create_graph=True))
    layer = model.features.denseblock1.denselayer1  # type: ignore[union-attr]
    layer.norm2.process_group = dist.GroupMember.NON_GROUP_MEMBER  # type: ignore[union-attr]
    attempt("two groups", lambda: model(x))
    layer.norm2.process_group = pair  # type: ignore[union-attr]
    layer.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    attempt("hook", lambda: model(x))
    return found


def _moments(rank: int) -> Tensor:
    """A channel far from zero, in float32, whose mean differs a little between processes."""
    stats = torch.tensor([[1e4 + rank / 64], [1e-4]])
    Exchange.begin(None, 10, stats.device).moments(stats)
    return stats


class _Exchanged:
    """Notes (collective, bytes) of every call."""

    _NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> _Exchanged:
        self._before = {name: getattr(dist, name) for name in self._NAMES}
        for name, function in self._before.items():
            setattr(dist, name, self._noting(name, function))
        return self

    def _noting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args[0].numel() * args[0].element_size()))
            return function(*args, **options)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)
