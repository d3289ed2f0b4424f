"""Outputs that are handed out while the backward pass keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import capture


def share(x: Tensor) -> Tensor:
    """x for a caller that may write to it, while x stays as it is: a copy-on-write clone.

    PyTorch makes that copy, and with it the ones of operators that only ask for a pointer to write
    to, by cudaMemcpy on the default stream: a CUDA graph lacks it, and another stream does not wait
    for it. There x is copied at once.
    """
    if not _is_out_of_order(x.device):
        return torch._lazy_clone(x)
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _is_out_of_order(device: torch.device) -> bool:
    if capture.is_captured(device):
        return True
    return device.type == "cuda" and torch.cuda.current_stream(device).cuda_stream != 0
