"""A block of ours and the reference with the same parameters, and one step of either."""

import torch

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import moved_norms

MEMORY = ["recompute", "store"]


def pair(memory="recompute", layers=3, channels=10, growth=6, drop_rate=0.0, **options):
    """The reference block and ours with the same parameters, float64."""
    torch.manual_seed(1)
    block = reference.DenseBlock(layers, channels, 4, growth, drop_rate, **options).double()
    moved_norms(block, (-1.0, 1.0))
    ours = de.EfficientDenseBlock(layers, channels, 4, growth, drop_rate, memory=memory, **options)
    ours.double().load_state_dict(block.state_dict())
    return block, ours


def step(module, x, gradient=None, call=None):
    """Output, input gradient, parameter gradients and buffers of one step."""
    return gradients(module, x, gradient, call) | dict(module.named_buffers())


def gradients(module, x, gradient=None, call=None):
    """Output, input gradient and parameter gradients, given the output's gradient."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x) if call is None else call(module, x)
    if gradient is None:
        gradient = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    y.backward(gradient)
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **named}


def assert_same(expected, got, tolerance=1e-11):
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
