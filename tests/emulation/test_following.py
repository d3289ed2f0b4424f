"""As tests/ops/test_following.py, by the emulated CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import following
from tests.support.emulators import SEEDS, emulator
from tests.support.identifiers import identifier

pytestmark = pytest.mark.slow

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=identifier)
@pytest.mark.parametrize("case", following.FORWARD, ids=identifier)
def test_the_next_norm(case: following.Forward, dtype: torch.dtype, seed: int) -> None:
    def call(name: str, *arguments: Any) -> None:
        emulator().call(name, *arguments, seed=seed)

    following.check_forward(call, case, dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=identifier)
@pytest.mark.parametrize("case", following.BACKWARD, ids=identifier)
def test_the_correction(case: following.Backward, dtype: torch.dtype, seed: int) -> None:
    def call(name: str, *arguments: Any) -> None:
        emulator().call(name, *arguments, seed=seed)

    following.check_backward(call, case, dtype)
