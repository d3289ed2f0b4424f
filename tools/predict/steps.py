"""The measured steps next to their prediction: launches, kernels, the host and the step."""

from __future__ import annotations

import torch

from densenet_efficient.models.networks import NetworkSpec

from . import counts, document
from .calls import PYTORCH, Step
from .fit import Measured
from .launches import emulator_for, listed
from .model import Efficiencies, Work, seconds, work_of
from .timeline import duration, queued

Kernel = tuple[str, str]  # stage, kernel without its template arguments


def measured_kernels(found: Measured, source: str, given: Efficiencies) -> dict[Kernel, float]:
    """Predicted seconds of a launch, on average, of each of a source's kernels as measured."""
    alike: dict[Kernel, list[Work]] = {}
    for group in found.groups:
        if group.source == source:
            for work in group.work:
                alike.setdefault((work.stage, group.kernel.partition("<")[0]), []).append(work)
    return {
        kernel: sum(work.times * seconds(work, found.gpu, given) for work in works)
        / sum(work.times for work in works)
        for kernel, works in alike.items()
    }


def table(found: Measured, given: Efficiencies) -> str:
    """Today's launches in their order, each as long as the kernel that was measured. The file has a
    recompute step's own kernels only; the others are those of the store step."""
    steps = []
    for one in found.steps:
        network = NetworkSpec(one["network"].partition(" ")[0])
        steps.append(Step(network, one["batch"], one["image_size"], one["memory"]))
    known = counts.stored()
    rows = []
    with emulator_for(call for step in steps for call in step.calls()) as emulator:
        for one, step in zip(found.steps, steps, strict=True):
            kernels: dict[Kernel, float] = {}
            for memory in ("store", one["memory"]):
                kernels |= measured_kernels(found, f"{one['network']} {memory}", given)
            queue = []
            for launch in listed(step.calls(), found.gpu.device, torch.bfloat16, emulator):
                work = work_of(launch, known)
                own = work.kernel.startswith(PYTORCH)
                each = (
                    duration(work, found.gpu, given)
                    if own
                    else kernels[work.stage, work.kernel.partition("<")[0]]
                )
                queue.append((work.times, each))
            launches = sum(times for times, _ in queue)
            predicted = (
                sum(times * each for times, each in queue),
                launches * given.host,
                queued(queue, given.host),
            )
            pairs = zip((one["kernel_ms"], one["host_ms"], one["step_ms"]), predicted, strict=True)
            rows.append([
                f"{one['network']}, batch {one['batch']}, {one['memory']}",
                f"{one['launches']} / {launches}",
                *(f"{ms:.1f} / {1e3 * s:.1f}" for ms, s in pairs),
            ])  # fmt: skip
    head = ["measured / predicted", "launches", "kernels, ms", "host, ms", "step, ms"]
    return document.markdown(head, rows)
