"""Steps of another library's network next to the same network converted: agreement first, then time
in turns within this process, then the memory of each peer in a process of its own.

A benchmark describes its peers and calls `run`; conventions: densenet_efficient/bench/steps.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densenet_efficient.bench.steps import MeasurementError, quantiles, time_in_turns
from densenet_efficient.bench.tables import markdown_table, megabytes, write_results
from densenet_efficient.core import arena
from densenet_efficient.memory.process import ALLOCATOR_SETTINGS, measure_step

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peer:
    """build: the network, the same weights for every peer; prepare: its layout, of model and
    input; exact: the network that is compared in float64, where it is another, without dropout."""

    name: str
    build: Callable[[], nn.Module]
    prepare: Callable[[Any], Any] = lambda value: value
    exact: Callable[[], nn.Module] | None = None


class Step:
    """A peer's training step: forward, a loss, backward, gradients back to None."""

    def __init__(self, peer: Peer, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.model = peer.prepare(peer.build().to(dtype))
        self.x = peer.prepare(x.to(dtype))

    def forward(self) -> Tensor:
        """The mean square of the output."""
        return self.model(self.x).square().mean()

    def rest(self, loss: Tensor) -> None:
        """Backward, and gradients back to None."""
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.rest(self.forward())

    def results(self) -> list[Tensor]:
        """The output, the input's gradient, and all parameters' gradients in one vector."""
        x = self.x.clone().requires_grad_()
        y = self.model(x)
        y.square().mean().backward()
        assert x.grad is not None
        gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])  # type: ignore[union-attr]
        self.model.zero_grad(set_to_none=True)
        return [y.detach(), x.grad, gradients]


def check_agreement(first: Peer, others: Sequence[Peer], x: Tensor) -> float:
    """The largest error in float64 of the output, the input's gradient and the parameters', each
    relative to its largest value. MeasurementError where it exceeds 1e-9."""

    def results(peer: Peer) -> list[Tensor]:
        exact = dataclasses.replace(peer, build=peer.exact or peer.build)
        return Step(exact, x, torch.float64).results()

    expected = results(first)
    worst = 0.0
    for peer in others:
        for ours, theirs in zip(results(peer), expected, strict=True):
            worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
        if not worst < 1e-9:
            raise MeasurementError(f"{peer.name} differs from {first.name} by {worst:.3g}")
    return worst


def measure(peer: Peer, x: Tensor) -> dict[str, int]:
    """Bytes of one step after a first one: `peak` and `kept` above the baseline before it."""
    step = Step(peer, x)
    step()
    gc.collect()
    arena.release()
    found = measure_step(step.forward, step.rest, CPU, arena.reserved_bytes)
    return {"peak": found.peak, "kept": found.kept}


def _measure_apart(name: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, *sys.argv, "--probe", name],
        env={**os.environ, **ALLOCATOR_SETTINGS},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise MeasurementError(f"memory of {name}:\n" + "\n".join(done.stderr.splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Sequence[dict[str, Any]], originals: int) -> str:
    """Ratios are to the originals, the first rows: to the fastest, and to the least memory."""
    least = {key: min(row[key] for row in rows[:originals]) for key in ("median", "peak", "kept")}
    columns = ["peer", "ms/step", "10 %..90 %", "time", "peak MB", "peak", "kept MB", "kept"]
    cells = [
        [
            row["peer"],
            f"{row['median']:,.0f}",
            f"{row['p10']:,.0f}..{row['p90']:,.0f}",
            f"{row['median'] / least['median']:.2f}",
            megabytes(row["peak"]),
            f"{row['peak'] / least['peak']:.3f}",
            megabytes(row["kept"]),
            f"{row['kept'] / least['kept']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(columns, cells)


def run(
    name: str,
    title: str,
    originals: Sequence[Peer],
    ours: Sequence[Peer],
    shape: Sequence[int],
    small: Sequence[int],
    options: argparse.Namespace,
) -> int:
    """Measures and prints; writes benchmarks/results/NAME.{json,md}.

    shape: of the batch, random values. small: of the input on which the peers must agree in float64
    before anything is timed.
    """
    generator = torch.Generator().manual_seed(0)
    x, first = (torch.randn(*sizes, generator=generator) for sizes in (shape, small))
    peers = {peer.name: peer for peer in (*originals, *ours)}
    if options.probe:
        print(json.dumps(measure(peers[options.probe], x)))
        return 0
    error = check_agreement(originals[0], ours, first)
    steps = {peer.name: Step(peer, x) for peer in peers.values()}
    for step in steps.values():
        step()
    times = time_in_turns(dict(steps), options.rounds, CPU)
    del steps
    gc.collect()
    rows = [
        {
            "peer": peer,
            **quantiles(times[peer]),
            "milliseconds": times[peer],
            **_measure_apart(peer),
        }
        for peer in peers
    ]
    text = f"{table(rows, len(originals))}\n\nLargest relative error in float64: {error:.1e}."
    print(text)
    figures = {"rounds": options.rounds, "error": error, "peers": rows}
    print("written:", write_results(options.output, name, title, figures, text, "cpu"))
    return 0


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that these benchmarks share."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--batch", type=int)
    found.add_argument("--size", type=int, help="pixels along every side")
    found.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    found.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    found.add_argument("--probe", help=argparse.SUPPRESS)
    return found
