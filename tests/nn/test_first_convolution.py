"""The stem's convolution by an operator: where it is chosen, and that nobody can tell. On the CPU
the fallback's operators stand for the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import densenet_efficient
from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.memory import steps
from densenet_efficient.nn import first_convolution
from densenet_efficient.nn.features import EfficientFeatures
from densenet_efficient.ops import dispatch, fallback
from densenet_efficient.ops.dispatch import Dispatch
from tests.support.identifiers import identifier
from tests.support.stem_convolution import STEP, Calls, images, network, pretend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every device and dtype has the operator."""
    return pretend(monkeypatch)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=identifier)
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last], ids=identifier)
def test_a_step_is_pytorchs(calls: Calls, weights: Any, inputs: Any) -> None:
    ours, plain = (m.double().to(memory_format=weights) for m in network())
    x = images().contiguous(memory_format=inputs)
    for model in (ours, plain):
        model(x).logsumexp(1).sum().backward()
    for own, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-9)
    assert calls.names == STEP
    gradients = (model.features.conv0.weight.grad for model in (ours, plain))
    assert len({gradient.stride() for gradient in gradients}) == 1


@pytest.mark.parametrize("parameters", [FP32, BF16], ids=identifier)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=identifier)
def test_autocast_rounds_images_and_weight_once(
    calls: Calls, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    """And sums the gradient in float32: it errs less than eager's, which is rounded to 16 bits."""
    conv = nn.Conv2d(3, 8, 7, 2, 3, bias=False).to(parameters)
    x, plain = images(dtype=dtype), copy.deepcopy(conv)
    exact = copy.deepcopy(conv).to(BF16).double()
    dy = torch.randn_like(exact(x.to(BF16).double())).to(BF16)
    exact(x.to(BF16).double()).backward(dy.double())
    with torch.autocast("cpu", BF16):
        chosen = first_convolution.choose(conv, x)
        y, expected = first_convolution.run(chosen, conv, x, True), plain(x)
    assert y.dtype == expected.dtype == BF16 and torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(dy)
    expected.backward(dy)
    assert conv.weight.grad is not None and conv.weight.grad.dtype == parameters
    own, peer = (relative_error(m.weight.grad, exact.weight.grad) for m in (conv, plain))
    assert own <= 1.1 * peer
    assert calls.names == ["stem_conv_forward", "stem_conv_backward_weight"]


def test_nothing_is_kept_where_no_gradient_is_wanted(calls: Calls) -> None:
    ours, plain = (m.double() for m in network())
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    for model in (ours, plain):
        model.features.conv0.weight.requires_grad_(False)
    ours(x).sum().backward()
    assert calls.names == ["stem_conv_forward"] * 2
    assert ours.features.conv0.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(calls: Calls, reentrant: bool) -> None:
    ours, plain = (m.double() for m in network())
    x = images()
    wanting = torch.zeros((), dtype=FP64, requires_grad=True)  # re-entrant ones need an input's
    for model in (ours, plain):
        run: Callable[..., Tensor] = lambda x, _, model=model: model(x)  # noqa: E731
        checkpoint(run, x, wanting, use_reentrant=reentrant).sum().backward()
    assert calls.names == ["stem_conv_forward", *STEP]
    expected = plain.features.conv0.weight.grad
    torch.testing.assert_close(ours.features.conv0.weight.grad, expected)


@pytest.mark.usefixtures("calls")
def test_second_derivatives() -> None:
    conv, x = nn.Conv2d(3, 4, 7, 2, 3, bias=False).double(), images()
    chosen = first_convolution.choose(conv, x)
    found = []
    for y in (first_convolution.run(chosen, conv, x, True), conv(x)):
        loss = (y * y.detach().sin() + y**3).mean()
        (first,) = torch.autograd.grad(loss, conv.weight, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), conv.weight)))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


def convolution(*changed: Any, **options: Any) -> nn.Conv2d:
    arguments = dict(kernel_size=7, stride=2, padding=3, bias=False) | options
    return nn.Conv2d(*(changed or (3, 6)), **arguments)


OTHERS = {
    "bias": convolution(bias=True),
    "kernel": convolution(kernel_size=(7, 5)),
    "stride": convolution(stride=(2, 1)),
    "padding": convolution(padding=2),
    "padding by name": convolution(stride=1, padding="same"),
    "padding by reflection": convolution(padding_mode="reflect"),
    "dilation": convolution(dilation=2),
    "groups": convolution(4, 4, groups=2),
    "channels": convolution(5, 6),
    "three dimensions": nn.Conv3d(3, 6, 7, 2, 3, bias=False),
}


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_pytorchs(name: str) -> None:
    conv = OTHERS[name]
    chosen = first_convolution.choose(conv, torch.randn(1, conv.in_channels, 20, 20))
    assert chosen.kind == "original" and chosen.reason.startswith("it is not one of 7x7")


@pytest.mark.usefixtures("calls")
def test_inputs_and_weights_that_the_operator_does_not_take() -> None:
    conv, x = convolution(), images(dtype=FP32)

    def reason(conv: nn.Module, x: Tensor) -> str:
        chosen = first_convolution.choose(conv, x)
        assert chosen.kind == "original"
        return chosen.reason

    assert first_convolution.choose(conv, x).kind == "kernels"
    numbers: Any = convolution()
    numbers.stride, numbers.padding, numbers.dilation = 2, 3, 1
    assert first_convolution.choose(numbers, x).kind == "kernels"
    wanting = x.clone().requires_grad_()
    assert reason(conv, wanting) == "the images need a gradient"
    with torch.no_grad():
        assert first_convolution.choose(conv, wanting).kind == "kernels"
    with torch.autocast("cpu", FP16):
        assert "are not rounded to torch.float16" in reason(conv, x.bfloat16())
        assert "are not rounded to torch.float16" in reason(convolution().bfloat16(), x)
    turned = convolution()
    turned.weight = nn.Parameter(turned.weight.detach().transpose(2, 3))
    assert reason(turned, x) == "its weight is neither contiguous nor channels last"

    class Subclass(Tensor):
        pass

    turned.weight = nn.Parameter(torch.randn(6, 3, 7, 7).as_subclass(Subclass))
    assert reason(turned, x) == "its weight is a Subclass"


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (6, 1, 7, 7)], ids=identifier)
def test_a_weight_of_another_size_decides(calls: Calls, shape: tuple[int, ...]) -> None:
    """A weight put in place of the first, as for grey images, whatever the module says of it."""
    ours, plain = (m.double() for m in network())
    weight, x = torch.randn(shape, dtype=FP64), images(shape[1])
    for model in (ours, plain):
        model.features.conv0.weight = nn.Parameter(weight)
        model(x).logsumexp(1).sum().backward()
    assert calls.names == STEP * (shape[2] == 7)
    found, expected = (m.features.conv0.weight.grad for m in (ours, plain))
    torch.testing.assert_close(found, expected)


def _hook(features: Any) -> None:
    features.conv0.register_forward_hook(lambda *_: None)


def _forward(features: Any) -> None:
    features.conv0.forward = lambda x: nn.functional.conv2d(x, features.conv0.weight, None, 2, 3)


def _parametrised(features: Any) -> None:
    parametrizations.weight_norm(features.conv0)


def _subclass(features: Any) -> None:
    class Conv2d(nn.Conv2d):
        pass

    features.conv0.__class__ = Conv2d


@pytest.mark.parametrize("change", [_hook, _forward, _parametrised, _subclass], ids=identifier)
def test_what_hangs_on_the_convolution_is_called(
    calls: Calls, change: Callable[[Any], None]
) -> None:
    ours, plain = (m.double() for m in network())
    for model in (ours, plain):
        change(model.features)
    x = images()
    torch.testing.assert_close(ours(x), plain(x))
    assert calls.names == []


def test_the_choice_is_shown(calls: Calls) -> None:
    ours = network()[0].double()
    features, x = ours.features, images()
    assert isinstance(features, EfficientFeatures)
    assert features.stem_path(x).reason.endswith("; its convolution is by a kernel")
    assert "its convolution is by a kernel" in str(densenet_efficient.explain(ours, x))
    reason = features.stem_path(x.requires_grad_()).reason
    assert reason.endswith("; its convolution is PyTorch's, because the images need a gradient")


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has nothing to choose, and says nothing."""
    x = images()
    assert "convolution is" not in network()[0].double().features.stem_path(x).reason
    chosen = Dispatch("kernels", "pretended", fallback)
    monkeypatch.setattr(dispatch, "choose", lambda *_: chosen)
    for dtype in (BF16, FP16):
        assert dispatch.stem_convolution(CUDA, dtype) is chosen
        assert dispatch.stem_convolution(torch.device("cpu"), dtype).kind == "original"
    found = dispatch.stem_convolution(CUDA, FP32)
    assert found.reason == "its kernels are for bfloat16 and float16, not float32"
    monkeypatch.setattr(dispatch, "choose", lambda *_: Dispatch("fallback", "there are none"))
    assert dispatch.stem_convolution(CUDA, BF16) == Dispatch("original", "there are none")


def test_the_plan_knows_the_scratch(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    operator = steps.workspaces.operator

    def record(*arguments: Any, **options: Any) -> int:
        asked.append(arguments)
        return operator(*arguments, **options)

    monkeypatch.setattr(steps.workspaces, "operator", record)
    densenet_efficient.plan(network()[0], (2, 3, 37, 33))
    device = torch.device("cpu")
    for way in ("forward", "backward_weight"):
        assert (f"stem_conv_{way}", (2, 37, 33, 3), 6, FP32, device) in asked


@pytest.mark.usefixtures("calls")
def test_images_that_were_written_to_are_refused() -> None:
    """They are kept as they came, whatever their dtype."""
    conv, x = convolution(), images(dtype=FP32)
    with torch.autocast("cpu", BF16):
        y = first_convolution.run(first_convolution.choose(conv, x), conv, x, True)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
