"""Shared by every test: one thread, seeding, the `gpu` marker, and TF32 switched off where that
matters."""

from __future__ import annotations

import os
from collections.abc import Iterator

# One thread for each process, the children's included: the tests' tensors are small, and threads
# that wait for each other on a busy machine take several times as long. Tests of the number of
# threads set it themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
pytest.register_assert_rewrite("tests.support")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """cuDNN's convolutions may not use TF32."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before
