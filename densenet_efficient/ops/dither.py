"""Rounding to a 16-bit dtype that keeps sums: ``csrc/dither.h`` for the fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def dithered(value: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """value (float32) on the grid of a 16-bit ``dtype``, still in float32; other dtypes untouched.

    first: index of value's first element in the whole tensor. The noise is a hash of the index, in
    wrapping 32-bit arithmetic.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return value
    dropped, smallest = (16, 0.0) if dtype == torch.bfloat16 else (13, 2.0**-14)
    index = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
    noise = (index + (first % 2**32 - 2**31)).bitwise_xor_(-(2**31)).mul_(0x9E3779B1 - 2**32)
    noise = noise.bitwise_xor_((noise >> 15).bitwise_and_(0x1FFFF)).mul_(0x85EBCA77 - 2**32)
    noise = (noise >> 16).bitwise_and_(0xFFFF) >> (16 - dropped)
    magnitude = value.abs()
    lift = (magnitude < smallest) * smallest
    bits = (magnitude + lift).view(torch.int32) + noise
    rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32) - lift
    return torch.where(value.isnan(), value, torch.copysign(rounded, value))
