"""What is seen of a converted model from outside, and numbers at the edge of a dtype's range."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.core import arena
from densenet_efficient.ops.convolution import ConvOptions
from tests.support.block_pair import pair
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)
from tests.support.peer import DenseBlock, DenseLayer, Transition, torchvision

pytestmark = pytest.mark.filterwarnings("ignore:.*runs its original forward")


# Seen from outside


@pytest.mark.parametrize(
    "kind", [torchvision.models.DenseNet, DenseBlock, DenseLayer, Transition, nn.Sequential]
)
def test_modules_are_still_of_their_classes(kind: type) -> None:
    plain, ours = converted_pair()
    found = [[isinstance(m, kind) for m in model.modules()] for model in (plain, ours)]
    assert found[0] == found[1] and any(found[1])
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in ours.named_modules()]


@pytest.mark.parametrize(
    "register",
    [
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_full_backward_hook,
    ],
)
def test_hooks_for_all_modules_see_the_original_calls(register: Callable[..., Any]) -> None:
    """Every module of every layer, in the same order."""
    calls: list[list[str]] = []
    steps = []
    models = converted_pair(memory_efficient=False)
    x = images()
    for model in models:
        names = {id(module): name for name, module in model.named_modules()}
        seen: list[str] = []
        # A full backward hook makes views of outputs, which operations in place refuse.
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False

        def hook(
            module: nn.Module, *_: Any, names: dict[int, str] = names, seen: list[str] = seen
        ) -> None:
            seen.append(names[id(module)])

        handle = register(hook)
        try:
            y = model.features(x)
            y.square().sum().backward()
            steps.append(y.detach())
        finally:
            handle.remove()
        calls.append(seen)
    assert calls[0] == calls[1] and "features.denseblock2.denselayer3.conv2" in calls[1]
    assert_close(steps[0], steps[1])
    assert_same_step(*models, x)


@pytest.mark.parametrize(
    "name",
    [
        "features.denseblock1",
        "features.denseblock2.denselayer1",
        "features.denseblock1.denselayer2.relu2",
        "features.transition1.pool",
        "features.pool0",
        "features.norm0",
        "features.norm5",
    ],
)
def test_a_hook_that_changes_an_output_is_obeyed(name: str) -> None:
    """At every depth, and no longer once it is removed."""
    plain, ours = converted_pair()
    x = images()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 0.5)
        for model in (plain, ours)
    ]
    assert_same_step(plain, ours, x)
    for handle in handles:
        handle.remove()
    assert_same_step(plain, ours, x)


# The variance of a float16 batch


def test_variances_beyond_float16_are_mixed_in_before_they_are_rounded() -> None:
    """1.6e5 does not fit float16, a tenth of it does."""
    torch.manual_seed(0)
    block = de.EfficientDenseBlock(1, 4, 2, 4, 0.0).half()
    plain = reference.DenseBlock(1, 4, 2, 4, 0.0).half()
    plain.load_state_dict(block.state_dict())
    x = (torch.randn(2, 4, 8, 8) * 400).half()
    with torch.no_grad():
        block(x), plain(x)
    for name, buffer in plain.named_buffers():
        got = block.state_dict()[name]
        assert got.isfinite().all(), name
        torch.testing.assert_close(got, buffer, rtol=2e-3, atol=1e-3)


# Strides that PyTorch's convolutions answer with garbage in bfloat16


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_convolutions_of_one_and_three_dimensions_get_contiguous_operands(
    dims: int, bottleneck: bool, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, images of one pixel in a direction and one channel included."""
    seen: list[Tensor] = []
    forward, backward = ConvOptions.forward, ConvOptions.backward

    def watched_forward(self: ConvOptions, z: Tensor, *rest: Any) -> Tensor:
        seen.append(z)
        return forward(self, z, *rest)

    def watched_backward(self: ConvOptions, dy: Tensor, z: Tensor, *rest: Any) -> Any:
        seen.extend((dy, z))
        return backward(self, dy, z, *rest)

    monkeypatch.setattr(ConvOptions, "forward", watched_forward)
    monkeypatch.setattr(ConvOptions, "backward", watched_backward)
    size = (depth, 4, 5)[:dims]
    options: dict[str, Any] = {"dims": dims, "dilation": 2}  # which no kernel takes
    block = de.EfficientDenseBlock(2, 1, 3, 8, 0.0, bottleneck=bottleneck, **options)
    block.to(torch.bfloat16)
    wide = reference.DenseBlock(2, 1, 3, 8, 0.0, bottleneck=bottleneck, **options).double()
    wide.load_state_dict(block.state_dict())
    x = torch.randn(8, *size, 1).bfloat16().movedim(-1, 1)  # strides of channels last
    y = block(x)
    assert relative_error(y.detach(), wide(x.double()).detach()) < 0.05
    y.float().square().sum().backward()
    assert seen
    for z in seen if dims != 2 else []:
        assert z.stride() == torch.empty(z.shape).stride()  # `is_contiguous` allows others, too


# Beyond the range of float32 sums


@pytest.mark.parametrize("value", [1e4, 1e12, 1e18, 1.8e19, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_finite_in_pytorch_is_finite(value: float, dtype: torch.dtype) -> None:
    """One outlier: above 1.8e19 its square overflows float32."""
    plain, ours = pair(layers=3, channels=8, growth=4)
    found = []
    for module in (plain.to(dtype), ours.to(dtype)):
        torch.manual_seed(1)
        x = torch.randn(4, 8, 8, 8).to(dtype)
        x[0, 0, 0, 0] = value
        x.requires_grad_()
        y = module(x)
        y[:, 8:].float().square().mean().backward()
        tensors = {"y": y, "dx": x.grad, **dict(module.named_buffers())}
        tensors |= {name: p.grad for name, p in module.named_parameters()}
        found.append({name: bool(t.isfinite().all()) for name, t in tensors.items()})
    assert [name for name, finite in found[0].items() if finite and not found[1][name]] == []


# Options of norms


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0, 0.37])
def test_momenta(momentum: float | None) -> None:
    """None is the average over all batches, so several steps are needed to tell."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = momentum
    for _ in range(3):
        assert_same_step(plain, ours, images())
    x = images()
    assert_close(plain.eval()(x), ours.eval()(x))


def test_momentum_none_without_a_counter() -> None:
    """PyTorch then leaves the running statistics as they are."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.num_batches_tracked = None, None
    assert_same_step(plain, ours, images())


def spread(x: Tensor) -> Tensor:
    """A vector with other values between its own."""
    return torch.stack([x.detach(), torch.full_like(x, 7)], 1)[:, 0]


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """The output, and in its gradient that of a gradient penalty."""
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y + dx.square().sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [None, penalised])
def test_parameters_lie_in_any_memory(
    training: bool, call: Callable[[nn.Module, Tensor], Tensor] | None
) -> None:
    """Expanded, spread out, or turned around, which is not channels last."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.train(training)
        for module in model.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight = nn.Parameter(module.weight.detach()[:1].expand_as(module.weight))
                module.bias = nn.Parameter(spread(module.bias))
                module.running_mean = spread(module.running_mean)
                module.running_var = spread(module.running_var)
            if isinstance(module, nn.Conv2d):
                turned = module.weight.detach().transpose(0, -1).contiguous()
                module.weight = nn.Parameter(turned.transpose(0, -1))
    x = images()
    for _ in range(3):
        assert_same_step(plain, ours, x, call)
    assert ours.features(x).stride() == plain.features(x).stride()


# Higher derivatives


@pytest.mark.parametrize("training", [True, False])
def test_a_double_backward_of_the_whole_network(training: bool) -> None:
    """A gradient penalty: the loss and a norm of its gradient, differentiated together."""
    found = []
    x = images()
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.train(training)
        z = x.clone().requires_grad_()
        loss = model(z).square().sum()
        (dx,) = torch.autograd.grad(loss, z, create_graph=True)
        penalised = loss + dx.square().sum()
        found.append(torch.autograd.grad(penalised, [z, *model.parameters()]))
    assert_close(found[0], found[1])
    buffers = [dict(model.named_buffers()) for model in (plain, ours)]
    assert_close(buffers[0], buffers[1])


def test_tangents_pass_through_a_backward_pass() -> None:
    """Forward-mode differentiation that begins after the forward pass, and no graph of it."""
    plain, ours = converted_pair()
    x = images()
    for _ in range(3):
        found = []
        for model in (plain, ours):
            z = x.clone().requires_grad_()
            y = model(z)
            dy, tangent = torch.ones_like(y), torch.linspace(-1, 1, y.numel()).double().view_as(y)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(dy, tangent)
                grads = torch.autograd.grad(y, [z, *model.parameters()], dual)
                found.append([list(forward_ad.unpack_dual(grad)) for grad in grads])
        assert_close(*found)


def test_two_backwards_over_one_graph() -> None:
    plain, ours = converted_pair()
    x = images()

    def twice(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        y.sum().backward(retain_graph=True)
        return y

    assert_close(training_step(plain, x, twice), training_step(ours, x, twice))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inference_mode(training: bool, layout: torch.memory_format) -> None:
    """Its tensors count no writes, and what is kept from call to call must not be one of them."""
    plain, ours = converted_pair()
    x = images().contiguous(memory_format=layout)
    arena.release()
    for _ in range(3):
        found = []
        for model in (plain.train(training), ours.train(training)):
            with torch.inference_mode():
                y = model(x)
            found.append([y.clone(), dict(model.named_buffers())])
        assert_close(*found)
    assert_same_step(plain, ours, x)


def test_what_overflows_before_a_relu_that_cuts_it_leaves_gradients_finite() -> None:
    """In float16, with constant statistics: bottlenecks of -inf are 0 after norm and ReLU, and
    nothing comes back through them."""
    plain = reference.DenseBlock(1, 2, 2, 4, 0.0).half().eval()
    with torch.no_grad():
        plain.denselayer1.norm1.weight.fill_(100)
        plain.denselayer1.conv1.weight.copy_(-plain.denselayer1.conv1.weight.abs() - 0.1)
    block = de.EfficientDenseBlock.from_layers(dict(plain.named_children()))
    x = torch.rand(2, 2, 3, 3).half()
    x[0, :, 1, 1] = 6e4
    gradients = []
    for model in (plain, block):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        assert y.isfinite().all()
        gradients += torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)
