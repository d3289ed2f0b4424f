"""Which devices a run may use, and how much memory they have."""

from __future__ import annotations

import os

import torch

__all__ = ["check_device", "device_memory_bytes"]


def check_device(name: str) -> torch.device:
    """The device of that name. ValueError where there is none, or no path for it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected such as cpu or cuda:0, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or a CUDA device, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} sees, got {name!r}"
        )
    return device


def device_memory_bytes(device: torch.device) -> int:
    """All memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
