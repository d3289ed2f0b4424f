"""Readable test identifiers for sizes, dtypes and changed arguments."""

from __future__ import annotations

import torch


def identifier(value: object) -> str | None:
    """For `pytest.mark.parametrize(ids=...)`; None leaves the identifier to pytest."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return ",".join(f"{name}={change}" for name, change in value.items())
    return None
