"""Measuring training steps: peers side by side, correctness before speed, memory in processes of
their own.

Conventions. A step is forward, cross entropy, backward, SGD with momentum. Time: peers take turns,
step by step, in one process; medians and quantiles of the turns. Memory: the peak during a step
above the baseline before it (parameters, momentum, input). Gradients are None before the step, so
parameter gradients count; one warm-up step comes first, and our idle scratch is given back before
the baseline is read. On the CPU each peer is measured in a process of its own (see `memory`).
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import arena
from ..memory.process import ALLOCATOR_SETTINGS, allocator_peak_bytes, measure_step
from ..models.networks import NetworkSpec
from ..nn.graphed_step import GRAPH, GraphedStep
from ..ops.dispatch import choose
from ..ops.dtypes import AUTOCAST

__all__ = [
    "DTYPES",
    "PEERS",
    "Case",
    "MeasurementError",
    "TrainingStep",
    "check_kernels",
    "forward_loss",
    "measure_memory",
    "quantiles",
    "time_in_turns",
]

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, **AUTOCAST}
PEERS = {
    "eager": "torchvision's own (the plain reference where torchvision has no such network)",
    "checkpoint": "the same with memory_efficient=True",
    "compile": "eager under torch.compile",
    "compile-budget": "eager under torch.compile with activation_memory_budget 0.3",
    "auto": "ours, bottlenecks kept where the peak has room",
    "store": "ours, bottlenecks kept",
    "recompute": "ours, bottlenecks computed again",
}
OURS = ("auto", "store", "recompute")
MEMORY_BUDGET = 0.3


class MeasurementError(RuntimeError):
    """Something that must not be measured, or could not be."""


@dataclass(frozen=True)
class Case:
    """What a step is run on. batch, image_size: positive. dtype: "fp32", or "bf16" or "fp16" by
    autocast. ValueError naming the field otherwise."""

    network: NetworkSpec
    batch: int
    image_size: int
    dtype: str = "fp32"
    device: str = "cpu"
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "image_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def title(self) -> str:
        """One line."""
        layout = "channels_last" if self.channels_last else "contiguous"
        return (
            f"{self.network.title}, {self.image_size} px, batch {self.batch}, {self.dtype}, "
            f"{layout}, {self.device}"
        )

    def describe(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_description(fields: dict[str, Any]) -> Case:
        """The inverse of `describe`."""
        return Case(**{**fields, "network": NetworkSpec(**fields["network"])})

    def build(self, peer: str, seed: int = 0) -> nn.Module:
        """The peer's network on the device, the same weights for every peer. ValueError for an
        unknown peer."""
        if peer not in PEERS:
            raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {peer!r}")
        execution = peer
        if peer not in OURS:
            execution = "torchvision" if self.network.in_torchvision else "reference"
            execution += "-checkpoint" if peer == "checkpoint" else ""
        torch.manual_seed(seed)
        return self.network.build(execution).to(
            device=self.device,
            memory_format=self.memory_format,  # type: ignore[call-overload]
        )

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def batch_of(self, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random images [size, C, H, W] float32 and labels [size], of every pixel for dense
        prediction [size, H, W], on the device."""
        generator = torch.Generator().manual_seed(seed)
        n, s = self.network, self.image_size
        images = torch.randn(size, n.in_channels, s, s, generator=generator)
        labelled = (size, s, s) if n.dense else (size,)
        labels = torch.randint(n.num_classes, labelled, generator=generator)
        return images.to(self.device, memory_format=self.memory_format), labels.to(self.device)


def forward_loss(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits, under autocast to `dtype` if given, and their cross entropy in the images'."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    return logits, nn.functional.cross_entropy(logits.to(images.dtype), labels)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """MeasurementError where activations of this dtype would not be computed by the kernels there:
    what the fallback takes is nobody's question."""
    chosen = choose(device, dtype)
    if chosen.kind != "kernels":
        raise MeasurementError(
            f"expected the kernels to run on {device} in {str(dtype).removeprefix('torch.')}, got "
            f"{chosen.kind}: {chosen.reason}; nothing was timed"
        )


class TrainingStep:
    """One peer's training step, warmed up and ready to be called.

    graph: capture the whole step in a CUDA graph and replay that (CUDA only).

    Raises:
        MeasurementError: the peer is ours, and the kernels would not run it; a step that is to be a
            graph runs eagerly.
        ValueError: a graph without a CUDA device.
    """

    def __init__(self, case: Case, peer: str, *, warm_up: int = 1, graph: bool = False) -> None:
        self.case, self.device = case, torch.device(case.device)
        if peer in OURS:
            check_kernels(self.device, DTYPES[case.dtype] or torch.float32)
        self.model = case.build(peer)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, fused=graph or None
        )
        self.images, self.labels = case.batch_of(case.batch)
        self._run: Callable[[Tensor], Tensor] = self.model
        self._graph: GraphedStep | None = None
        start = time.perf_counter()
        if peer.startswith("compile"):
            import torch._functorch.config as config

            budget = MEMORY_BUDGET if peer == "compile-budget" else 1.0
            self._run = torch.compile(self.model)
            with config.patch(activation_memory_budget=budget):  # compiled by the first call
                self()
        for _ in range(warm_up):
            self()
        if graph:
            self._graph = self._captured()
        self.synchronize()
        self.warm_up_seconds = time.perf_counter() - start

    def forward(self) -> Tensor:
        """The loss."""
        return forward_loss(self._run, self.images, self.labels, DTYPES[self.case.dtype])[1]

    def rest(self, loss: Tensor) -> None:
        """Backward, the optimiser's step, gradients back to None."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph(self.images, self.labels)
        else:
            self.rest(self.forward())

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> dict[str, int]:
        """Bytes of one more step: `before`, `peak` and `kept`, see `memory.StepMemory`."""
        _settle()
        found = measure_step(self.forward, self.rest, self.device, arena.reserved_bytes)
        return dataclasses.asdict(found)

    def _captured(self) -> GraphedStep:
        if self.device.type != "cuda":
            raise ValueError(f"graph: expected device cuda, got {self.device}")

        def step(images: Tensor, labels: Tensor) -> Tensor:
            loss = forward_loss(self._run, images, labels, DTYPES[self.case.dtype])[1]
            self.rest(loss)
            return loss

        graphed = GraphedStep(step, self.model, self.optimizer)
        for _ in range(graphed.warm_up + 1):
            graphed(self.images, self.labels)
        if graphed.path.kind != GRAPH:
            raise MeasurementError(f"expected a graph, got {graphed.path.reason}")
        return graphed


def time_in_turns(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device, inner: int = 1
) -> dict[str, list[float]]:
    """Milliseconds per step of every peer, one value a round. In each round every peer takes its
    turn of `inner` steps; the first of a round is another peer each time. CUDA events on a GPU."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_time(steps[name], inner, device) / inner)
    return times


def _time(step: Callable[[], None], inner: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(inner):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    for _ in range(inner):
        step()
    return (time.perf_counter() - begin) * 1e3


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 10 % and 90 % quantile."""
    points = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return {"p10": float(points[0]), "median": float(points[1]), "p90": float(points[2])}


def measure_memory(case: Case, peer: str, *, exact: bool = False) -> dict[str, int]:
    """Bytes of one step of a peer: `peak` and `kept` above the baseline `before` it, and, with
    `exact` on the CPU, `allocator_peak`, torch's own allocations counted to the byte (a further
    step). On the CPU in a fresh process, on CUDA here.

    Raises:
        MeasurementError: the process failed; with its last lines.
    """
    if torch.device(case.device).type == "cuda":
        return _probe(case, peer, exact=False)
    package_folder = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    request = json.dumps({"case": case.describe(), "peer": peer, "exact": exact})
    done = subprocess.run(
        [sys.executable, "-m", "densenet_efficient.bench.steps", request],
        env={**os.environ, **ALLOCATOR_SETTINGS, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise MeasurementError(
            f"memory of {peer}, {case.title}: the measuring process ended with "
            f"{done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-5:])
        )
    return json.loads(done.stdout.splitlines()[-1])


def _probe(case: Case, peer: str, *, exact: bool) -> dict[str, int]:
    step = TrainingStep(case, peer)
    found = step.memory()
    if exact:
        _settle()
        found["allocator_peak"] = allocator_peak_bytes(step)
    return found


def _settle() -> None:
    """Give back what no step needs: garbage, and our idle scratch, which is then the step's."""
    gc.collect()
    arena.release()


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    _case = Case.from_description(_request["case"])
    print(json.dumps(_probe(_case, _request["peer"], exact=_request["exact"])))
