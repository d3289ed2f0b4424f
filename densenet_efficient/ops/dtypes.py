"""The dtypes of activations, and the dtype in which sums over them are taken."""

from __future__ import annotations

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Activation dtypes of every operator."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of automatic mixed precision, by the names that options have for them."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and parameter gradients for activations of ``dtype``: float64
    for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
