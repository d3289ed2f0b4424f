"""A run of the operators' benchmark next to its prediction, and what the runtime says of occupancy
next to what the tilings assume: what `make gpu-check` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.emulation.report import kernel_name
from tools.machine_code.compiler import short_name

from . import counts, document, fit
from .calls import Call
from .devices import Gpu, gpu_named
from .launches import Launch, emulator_for, listed
from .model import total, work_of

# The fused convolutions; the fit to them leaves the other efficiencies as they are stored.
FUSED = "norm_relu_conv"


def groups(data: Mapping[str, Any], launches: Mapping[int, Sequence[Launch]]) -> list[fit.Group]:
    """The benchmark's rows, each with the work of its launches."""
    known = counts.stored()
    return [
        fit.Group(
            row["shape"],
            row["operator"],
            row["ours"] * 1e-3,
            tuple(work_of(launch, known) for launch in launches[index]),
        )
        for index, row in enumerate(data["rows"])
    ]


def read(path: Path) -> tuple[Gpu, list[fit.Group], list[Launch]]:
    """Device, groups and launches of benchmarks/results/operators-cuda.json."""
    data = json.loads(path.read_text())
    gpu = gpu_named(data["environment"]["device"])
    dtype = getattr(torch, data["dtype"].removeprefix("torch."))
    calls = [
        Call(row["shape"], row["operator"], tuple(row["sizes"]), row["stride"], packed=False)
        for row in data["rows"]
    ]
    launches = {}
    with emulator_for(calls) as emulator:
        for index, call in enumerate(calls):
            launches[index] = list(listed([call], gpu.device, dtype, emulator))
    return gpu, groups(data, launches), [one for each in launches.values() for one in each]


def report(path: Path, occupancy: Path | None) -> str:
    """Predicted and measured of each operator; the efficiencies that this run gives; occupancy."""
    gpu, found, launches = read(path)
    given = replace(fit.stored(), host=0.0)
    rows = []
    for group in found:
        predicted = total(group.work, gpu, given)
        rows.append([
            group.kernel, group.source, f"{group.seconds * 1e3:.3f}", f"{predicted * 1e3:.3f}",
            f"{group.seconds / predicted:.2f}",
        ])  # fmt: skip
    head = ["operator", "shape", "measured, ms", "predicted, ms", "measured / predicted"]
    text = [document.markdown(head, rows)]
    fused = [group for group in found if group.kernel.startswith(FUSED)]
    if fused:
        refitted = fit.fit(fused, gpu, given)
        text += ["fitted to this run's convolutions:", document.efficiency_table(refitted)]
    if occupancy is not None:
        text.append(occupancy_table(launches, dict(runtime(occupancy.read_text()))))
    return "\n\n".join(text)


Configuration = tuple[str, int, int]  # kernel, threads of a block, its shared memory


def runtime(lines: str) -> Iterator[tuple[Configuration, int]]:
    """Blocks that a multiprocessor holds, from what csrc/cuda/launch.h wrote."""
    for line in lines.splitlines():
        blocks, threads, shared, signature = line.split(" ", 3)
        kernel, _, arguments = kernel_name(signature).partition("<")
        name = short_name(kernel.removesuffix("_kernel"), arguments.removesuffix(">"))
        yield (name, int(threads), int(shared)), int(blocks)


def occupancy_table(launches: Sequence[Launch], held: Mapping[Configuration, int]) -> str:
    """The persistent kernels' blocks on a multiprocessor: assumed, and as the runtime says. A
    kernel that no tiling sizes by its residency has no assumption to compare."""
    assumed = {
        (one.kernel, one.threads, one.shared_bytes): one.resident for one in launches if one.ranges
    }
    rows = [
        [f"`{kernel}`", str(threads), str(shared), str(blocks), str(held[kernel, threads, shared])]
        for (kernel, threads, shared), blocks in sorted(assumed.items())
        if (kernel, threads, shared) in held
    ]
    fewer = [row[0] for row in rows if int(row[4]) < int(row[3])]
    verdict = f"fewer blocks than assumed: {', '.join(fewer)}" if fewer else "as assumed"
    head = ["kernel", "threads", "shared bytes", "assumed blocks", "the runtime's"]
    return f"{document.markdown(head, rows)}\n\noccupancy of {len(rows)} kernels: {verdict}"
