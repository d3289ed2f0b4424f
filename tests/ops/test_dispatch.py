"""Which implementation serves a device and dtype. No GPU is needed to ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from densenet_efficient.ops import compiled, dispatch, fallback, library, mixed
from densenet_efficient.ops.dtypes import FLOATING

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the library held kernels for a GPU that is there."""
    monkeypatch.setattr(library, "cuda_unavailable_reason", lambda device: None)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.mark.usefixtures("with_kernels")
def test_dtypes_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert dispatch.choose(CUDA, dtype).operators is compiled
    path = dispatch.choose(CUDA, torch.float64)
    assert (path.kind, path.operators) == ("fallback", mixed.WITHOUT_CONVOLUTIONS)
    assert path.reason == "CUDA convolution kernels do not take float64"


@pytest.mark.usefixtures("with_kernels")
def test_float32_on_a_gpu_follows_the_convolutions_setting() -> None:
    """Both of torch's ways to say it, at any time."""
    path = dispatch.choose(CUDA, torch.float32)
    assert (path.kind, path.operators) == ("kernels", compiled)
    assert path.reason == "compiled cuda kernels, float32 multiplied in TF32"
    torch.backends.cudnn.allow_tf32 = False
    try:
        path = dispatch.choose(CUDA, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert (path.kind, path.operators) == ("fallback", mixed.WITHOUT_CONVOLUTIONS)
    assert "torch.backends.cudnn.conv.fp32_precision does not allow" in path.reason


@pytest.mark.usefixtures("with_kernels", "no_tf32")
def test_float32_on_a_gpu_without_tf32() -> None:
    assert dispatch.choose(CUDA, torch.float32).operators is mixed.WITHOUT_CONVOLUTIONS
    assert dispatch.choose(CUDA, torch.bfloat16).operators is compiled


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_on_a_gpu(dims: int) -> None:
    """1x1 convolutions are products of rows; what knows neighbours is PyTorch's, and said so."""
    path = dispatch.choose(CUDA, torch.bfloat16, dims)
    assert path.kind == "fallback" and f"for 2 dimensions, not {dims}" in path.reason
    assert path.operators.norm_relu_conv1x1_forward is compiled.norm_relu_conv1x1_forward
    assert path.operators.norm_relu_conv3x3_forward is fallback.norm_relu_conv3x3_forward
    assert path.operators.stem_backward is fallback.stem_backward
    path = dispatch.choose(CUDA, torch.float64, dims)
    assert path.operators.norm_fold is compiled.norm_fold
    assert path.operators.norm_relu_conv1x1_forward is fallback.norm_relu_conv1x1_forward
    assert dispatch.choose(CPU, torch.float32, dims).operators is compiled


@pytest.mark.usefixtures("no_tf32")
def test_the_cpu_does_not_care() -> None:
    for dtype in FLOATING:
        assert dispatch.choose(CPU, dtype).operators is compiled


def test_a_devicewithout_kernels() -> None:
    path = dispatch.choose(torch.device("meta"), torch.float32)
    assert (path.kind, path.operators) == ("fallback", fallback)
    assert path.reason == "no kernels are compiled for device type 'meta'"
