"""ESRGAN's residual dense block: exact, in one buffer, and original where something hangs on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient.conversion.libraries import esrgan
from densenet_efficient.nn.residual_dense_block import PlainResidualDenseBlock
from densenet_efficient.torchvision_compat import import_torchvision

CHANNELS, GROWTH = 6, 4


def spandrel_block(plus: bool) -> nn.Module:
    import_torchvision()  # which spandrel imports
    from spandrel.architectures.__arch_helpers.block import ResidualDenseBlock_5C

    return ResidualDenseBlock_5C(CHANNELS, gc=GROWTH, plus=plus)


class Copied(PlainResidualDenseBlock):
    """As in one's own code, to be registered."""


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Copied(CHANNELS, GROWTH),
    "spandrel": lambda: spandrel_block(plus=False),
    "spandrel plus": lambda: spandrel_block(plus=True),
}


@pytest.fixture(params=BLOCKS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The original and the same converted, in float64."""
    de.register_adapter(Copied, esrgan.residual_dense_block)
    torch.manual_seed(0)
    source = BLOCKS[request.param]().double()
    ours = BLOCKS[request.param]().double()
    ours.load_state_dict(source.state_dict())
    return source, de.convert(ours)


def image(memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, CHANNELS, 5, 7, generator=generator, dtype=torch.float64)
    return x.to(memory_format=memory_format)


def results(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = block(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_all_gradients(
    pair: tuple[nn.Module, nn.Module], memory_format: torch.memory_format
) -> None:
    source, ours = pair
    x = image(memory_format)
    assert de.explain(ours, x).kinds == {"fallback"}
    for expected, got in zip(results(source, x), results(ours, x), strict=True):
        assert (got - expected).abs().max() < 1e-12
    assert ours(x).is_contiguous(memory_format=memory_format)


def test_second_derivatives(pair: tuple[nn.Module, nn.Module]) -> None:
    found = []
    for block in pair:
        x = image().requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *block.parameters()]))
    for expected, got in zip(*found, strict=True):
        assert (got - expected).abs().max() < 1e-9


def test_only_wanted_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    source, ours = pair
    for block in pair:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_("conv3" in name)
        block(image()).sum().backward()
    for expected, got in zip(source.parameters(), ours.parameters(), strict=True):
        assert (expected.grad is None) == (got.grad is None)
        if expected.grad is not None and got.grad is not None:
            assert (got.grad - expected.grad).abs().max() < 1e-12


def test_autocast_as_the_original() -> None:
    torch.manual_seed(0)
    source = Copied(16, 8)
    ours = de.EfficientResidualDenseBlock(16, 8)
    ours.load_state_dict(source.state_dict())
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = source(x), ours(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_hook_runs_the_original(pair: tuple[nn.Module, nn.Module]) -> None:
    source, ours = pair
    called = []
    conv = next(module for module in ours.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda *args: called.append(1))
    with pytest.warns(UserWarning, match=r"original forward: .* carries a hook"):
        y = ours(image())
    assert called and torch.equal(y, source(image()))


def test_a_transform_runs_the_original(pair: tuple[nn.Module, nn.Module]) -> None:
    source, ours = pair
    x = image()
    expected = torch.func.vmap(source)(x[None])
    assert torch.allclose(torch.func.vmap(ours)(x[None]), expected, atol=1e-12)


def test_keeps_one_buffer() -> None:
    block = de.EfficientResidualDenseBlock(64, 32)
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    own = {parameter.data_ptr() for parameter in block.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        block(x)
    elements = sum(t.numel() for t in kept if t is not None and t.data_ptr() not in own)
    assert elements == 2 * 192 * 8 * 8


def test_unconvert_and_keys(pair: tuple[nn.Module, nn.Module]) -> None:
    source, ours = pair
    assert list(ours.state_dict()) == list(source.state_dict())
    de.unconvert(ours)
    assert type(ours) is type(source)
    assert torch.equal(ours(image()), source(image()))


@pytest.mark.parametrize("change", ["norm", "activation"])
def test_other_options_are_refused(change: str) -> None:
    import_torchvision()
    from spandrel.architectures.__arch_helpers.block import ResidualDenseBlock_5C

    options = {"norm": {"norm_type": "batch"}, "activation": {"act_type": "prelu"}}[change]
    with pytest.raises(de.ConversionError, match=r"pairs of a convolution|no LeakyReLU"):
        de.convert(ResidualDenseBlock_5C(CHANNELS, gc=GROWTH, **options))
