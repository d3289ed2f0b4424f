"""The measured steps next to their prediction: launches, kernels, the host and the step."""

from __future__ import annotations

from typing import Any

from densenet_efficient.models.networks import NetworkSpec

from . import document
from .fit import Measured
from .model import Efficiencies, seconds
from .timeline import SMALL, first_convolution


def kernel_seconds(found: Measured, one: dict[str, Any], given: Efficiencies) -> float:
    """Predicted of all launches of a measured step: ours as the file lists them, and the others,
    which are PyTorch's. Of a recompute step the file has what differs from the store step."""
    groups = {
        group.kernel: group
        for memory in ("store", one["memory"])
        for group in found.groups
        if group.source == f"{one['network']} {memory}"
    }
    ours = [work for group in groups.values() for work in group.work]
    total = sum(work.times * seconds(work, found.gpu, given) for work in ours)
    others = one["launches"] - sum(work.times for work in ours)
    if not NetworkSpec(one["network"].partition(" ")[0]).small_inputs:
        total += 2 * first_convolution(one["batch"] * one["image_size"] ** 2, found.gpu)
        others -= 2
    return total + others * SMALL


def table(found: Measured, given: Efficiencies) -> str:
    """The launches of the measured steps, which later versions have fewer of; each of ours as the
    kernel that was measured. Their order is not stored, so that no step is predicted."""
    rows = []
    for one in found.steps:
        kernels, host = kernel_seconds(found, one, given), one["launches"] * given.host
        rows.append([
            f"{one['network']}, batch {one['batch']}, {one['memory']}",
            str(one["launches"]),
            f"{one['kernel_ms']:.1f} / {1e3 * kernels:.1f}",
            f"{one['host_ms']:.1f} / {1e3 * host:.1f}",
            f"{one['step_ms']:.1f}",
        ])  # fmt: skip
    head = ["measured / predicted", "launches", "kernels, ms", "host, ms", "step, ms"]
    return document.markdown(head, rows)
