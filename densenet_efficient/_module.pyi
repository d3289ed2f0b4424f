"""Types of the compiled module, csrc/module.cpp."""

from collections.abc import Sequence
from typing import Any

__version__: str

def build_info() -> dict[str, str]: ...
def workspace_bytes(
    op: str,
    shape: Sequence[int],
    channels: int = 0,
    element_bytes: int = 4,
    threads: int = 1,
) -> int: ...
def cuda_workspace_bytes(
    op: str,
    shape: Sequence[int],
    channels: int = 0,
    element_bytes: int = 2,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
    row_alignment: int = 16,
    packed_weight: bool = False,
    accumulate: bool = False,
    optional_output: bool = True,
) -> int: ...
def tensors_if_unchanged(entries: tuple[Any, ...], kinds: tuple[type, ...]) -> list[Any] | None: ...
