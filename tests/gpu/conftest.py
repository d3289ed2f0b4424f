"""A kernel that faults leaves its process's CUDA context unusable: the process ends after that
test, so that under pytest-xdist the tests after it run in a new one."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if os.environ.get("PYTEST_XDIST_WORKER") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
