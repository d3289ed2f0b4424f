"""Shared by every test: torchvision beside any torch, seeding, the `gpu` marker, and the measure of
numerical error that the tolerances are stated in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient.torchvision_compat import import_torchvision

_PEER_TESTS = [
    "conversion/test_convert.py",
    "conversion/test_refusals.py",
    "models/test_exactness.py",
    "models/test_models.py",
    "reference/test_reference.py",
]
collect_ignore: list[str] = []
_missing_peer = ""
try:
    import_torchvision("torchvision.models.densenet")
except ImportError as error:  # a GPU machine may have torch and pytest only
    collect_ignore += _PEER_TESTS
    _missing_peer = str(error)


def pytest_report_header(config: pytest.Config) -> str:
    """Says which tests are left out where torchvision, the peer they compare with, is missing."""
    return f"left out: {', '.join(_PEER_TESTS)}: {_missing_peer}" if _missing_peer else ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
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


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, in float64; the norm itself where exact is zero."""
    exact = exact.detach().double()
    size = exact.norm().item()
    error = (value.detach().double() - exact).norm().item()
    return error / size if size else error


def _median_errors(
    values: Sequence[Mapping[str, Tensor]], exact: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    errors: dict[str, list[float]] = {name: [] for name in exact[0]}
    for value, truth in zip(values, exact, strict=True):
        assert value.keys() == truth.keys() == errors.keys()
        for name, tensor in value.items():
            errors[name].append(relative_error(tensor, truth[name]))
    return {name: statistics.median(several) for name, several in errors.items()}


@dataclass
class ErrorRatio:
    """Our error against float64 over the framework's own, on the same input."""

    together: float
    worst: float
    worst_name: str

    def __str__(self) -> str:
        return (
            f"error {self.together:.3f} times the framework's over all tensors, "
            f"{self.worst:.3f} times on {self.worst_name}"
        )


def error_ratio(
    ours: Sequence[Mapping[str, Tensor]],
    framework: Sequence[Mapping[str, Tensor]],
    exact: Sequence[Mapping[str, Tensor]],
) -> ErrorRatio:
    """Compares relative errors tensor by tensor, and over all of them together (root of the sum of
    squares, so that every tensor counts alike whatever its magnitude). One mapping per input; a
    tensor's error is the median over the inputs."""
    own = _median_errors(ours, exact)
    peer = _median_errors(framework, exact)
    ratios = {
        name: own[name] / peer[name] if peer[name] else own[name] and math.inf for name in own
    }
    worst_name = max(ratios, key=lambda name: ratios[name])
    together = math.hypot(*own.values()) / math.hypot(*peer.values())
    return ErrorRatio(together, ratios[worst_name], worst_name)


def training_step(
    model: nn.Module, x: Tensor, target: Tensor, **autocast: object
) -> dict[str, Tensor]:
    """One forward and backward pass with cross entropy: the output, the input's gradient and every
    parameter's, by name. autocast: arguments of torch.autocast beside the device."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    if autocast:
        with torch.autocast(x.device.type, **autocast):  # type: ignore[arg-type]
            output = model(x)
    else:
        output = model(x)
    nn.functional.cross_entropy(output.to(x.dtype), target).backward()
    assert x.grad is not None
    tensors = {"output": output.detach(), "input.grad": x.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        tensors[f"{name}.grad"] = parameter.grad
    return tensors
