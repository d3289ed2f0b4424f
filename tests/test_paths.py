"""Which implementation serves a device and dtype. No GPU is needed to ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from densenet_efficient import general, library, ops, paths, wide

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the library held kernels for a GPU that is there."""
    monkeypatch.setattr(library, "cuda_gap", lambda device: None)
    paths._choose.cache_clear()
    yield
    paths._choose.cache_clear()


@pytest.mark.usefixtures("with_kernels")
def test_dtypes_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert paths.choose(CUDA, dtype).stages is ops
    path = paths.choose(CUDA, torch.float64)
    assert (path.kind, path.stages) == ("general", wide)
    assert path.reason == "CUDA convolution kernels do not take float64"


@pytest.mark.usefixtures("with_kernels")
def test_float32_on_a_gpu_follows_the_convolutions_setting() -> None:
    """Both of torch's ways to say it, at any time."""
    path = paths.choose(CUDA, torch.float32)
    assert (path.kind, path.stages) == ("kernels", ops)
    assert path.reason == "compiled cuda kernels, float32 multiplied in TF32"
    torch.backends.cudnn.allow_tf32 = False
    try:
        path = paths.choose(CUDA, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert (path.kind, path.stages) == ("general", wide)
    assert "torch.backends.cudnn.conv.fp32_precision does not allow" in path.reason


@pytest.mark.usefixtures("with_kernels", "no_tf32")
def test_float32_on_a_gpu_without_tf32() -> None:
    assert paths.choose(CUDA, torch.float32).stages is wide
    assert paths.choose(CUDA, torch.bfloat16).stages is ops


@pytest.mark.usefixtures("no_tf32")
def test_the_cpu_does_not_care() -> None:
    for dtype in paths.FLOATING:
        assert paths.choose(CPU, dtype).stages is ops


def test_a_device_without_kernels() -> None:
    path = paths.choose(torch.device("meta"), torch.float32)
    assert (path.kind, path.stages) == ("general", general)
    assert path.reason == "no kernels are compiled for device type 'meta'"
