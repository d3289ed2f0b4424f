"""Tracers and transforms see the original modules: the same graphs, values and errors."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import (
    functional_call,
    grad,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.flop_counter import FlopCounterMode

from densenet_efficient import EfficientDenseNet, unconvert
from densenet_efficient.core import arena
from densenet_efficient.nn.execution import Efficient
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)
from tests.support.peer import create_feature_extractor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs its original forward"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def warm(*models: nn.Module) -> None:
    """One training step of either: the arena is filled, statistics have moved."""
    x = torch.linspace(-1, 1, 3 * 3 * 32 * 32, dtype=torch.float64).view(3, 3, 32, 32)
    for model in models:
        training_step(model, x)


# torch.fx


@pytest.mark.parametrize("first", [warm, lambda *models: arena.release()])
def test_feature_extractors(first: Callable[..., None]) -> None:
    """The nodes inside a block as well as its output."""
    plain, ours = converted_pair()
    first(plain, ours)
    nodes = [
        "features.relu0",
        "features.denseblock1.denselayer2.conv2",
        "features.denseblock1",
        "features.transition1.conv",
        "features.norm5",
    ]
    x = images()
    found = [create_feature_extractor(model.eval(), nodes)(x) for model in (plain, ours)]
    assert found[0].keys() == set(nodes)
    assert_close(found[0], found[1])
    assert_same_step(plain.train(), ours.train(), x)


def test_symbolic_tracing_sees_the_original_graph() -> None:
    graphs = []
    x = images()
    plain, ours = converted_pair()
    for model in (plain, ours):
        traced = torch.fx.symbolic_trace(model.eval())
        graphs.append([(node.op, node.name) for node in traced.graph.nodes])
        assert_close(plain.eval()(x), traced(x))
    assert graphs[0] == graphs[1]


# torch.func


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def tangent(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jacrev in chunks": lambda m, x: jacrev(m, chunk_size=1)(x[:1]),
    "jacrev": lambda m, x: jacrev(m)(x),
    "grad": lambda m, x: grad(loss_of(m))(parameters_of(m), x),
    "gradients per sample": lambda m, x: vmap(grad(loss_of(m)), (None, 0))(
        parameters_of(m), x[:, None]
    ),
    "jvp": lambda m, x: jvp(m, (x,), (tangent(x),)),
    "vjp": lambda m, x: vjp(m, x)[1](torch.ones(len(x), 5).double()),
    "vmap": lambda m, x: vmap(m)(x[:, None]),
    "vectorised jacobian": lambda m, x: torch.autograd.functional.jacobian(
        m, x[:1], vectorize=True
    ),
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x[:1]),
    "batched gradients": lambda m, x: torch.autograd.grad(
        m(z := x.clone().requires_grad_()),
        z,
        torch.eye(5).double()[:, None].expand(5, len(x), 5),
        is_grads_batched=True,
    ),
    "product with a Hessian": lambda m, x: torch.autograd.functional.hvp(
        lambda z: m(z).square().sum(), x, tangent(x)
    ),
    "forward over reverse": lambda m, x: jvp(
        lambda p: grad(loss_of(m))(p, x), (parameters_of(m),), (parameters_of(m),)
    ),
    "functional call": lambda m, x: functional_call(
        m, {k: 2 * v for k, v in parameters_of(m).items()}, (x,)
    ),
}


def test_symbolic_tracing_of_networks_built_here() -> None:
    """Their plain forward must not ask a tracer's stand-in what it is."""
    model = EfficientDenseNet(8, (2, 3), 16, num_classes=5).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_give_the_same_cold_and_warm(transform: Callable[..., Any]) -> None:
    plain, ours = converted_pair()
    x = images(2)
    expected = transform(plain.eval(), x)
    arena.release()
    assert_close(expected, transform(ours.eval(), x))
    warm(plain.train(), ours.train())
    assert_close(transform(plain.eval(), x), transform(ours.eval(), x))
    assert_same_step(plain.train(), ours.train(), x)


def test_operations_of_a_backward_pass_are_counted_cold_and_warm() -> None:
    """By a mode that is entered after the forward pass, which no replayed program escapes."""
    _, ours = converted_pair()
    counted = []
    for _ in range(4):
        loss = ours(images()).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counted.append(counter.get_total_flops())
    assert len(set(counted)) == 1


def test_a_jacobian_by_forward_mode() -> None:
    plain, ours = converted_pair()
    x, parameters = images(1), parameters_of(plain)
    bias = {"classifier.bias": parameters["classifier.bias"]}
    found = [
        jacfwd(lambda p, m=model: functional_call(m.eval(), p, (x,)))(bias)
        for model in (plain, ours)
    ]
    assert_close(found[0], found[1])


def test_ensembles_of_stacked_modules() -> None:
    found = []
    x = images(2)
    pairs = [converted_pair() for _ in range(2)]
    for models in zip(*pairs, strict=True):
        warm(*models)
        parameters, buffers = stack_module_state([model.eval() for model in models])
        base = copy.deepcopy(models[0]).to("meta")

        def call(p: Any, b: Any, x: Tensor, base: nn.Module = base) -> Tensor:
            return functional_call(base, (p, b), (x,))

        found.append(vmap(call, (0, 0, None))(parameters, buffers, x))
        assert_close(torch.stack([model(x) for model in models]), found[-1])
    assert_close(found[0], found[1])


# torch.export


def strictly(model: nn.Module, x: Tensor) -> Any:
    return export(model, (x,), strict=True).module()


def with_any_batch(model: nn.Module, x: Tensor) -> Any:
    batch = Dim("batch", min=2, max=64)
    program = export(model, (x,), dynamic_shapes=({0: batch},)).module()
    assert program(images(5)).shape == (5, 5)
    return program


def decomposed(model: nn.Module, x: Tensor) -> Any:
    return export(model, (x,)).run_decompositions().module()


def for_training(model: nn.Module, x: Tensor) -> Any:
    return export(model.train(), (x,)).module()


@pytest.mark.parametrize("way", [strictly, with_any_batch, decomposed])
def test_exported_programs(way: Callable[[nn.Module, Tensor], Any]) -> None:
    """Right after training, and training right after them."""
    plain, ours = converted_pair()
    x = images()
    assert_same_step(plain, ours, x)
    program = way(ours.eval(), x)
    assert_close(plain.eval()(x), program(x))
    assert not [n for n in str(program.graph).split() if "densenet_efficient" in n]
    assert_same_step(plain.train(), ours.train(), x)
    assert_close(plain.eval()(x), ours.eval()(x))


def test_a_program_exported_for_training_updates_statistics() -> None:
    plain, ours = converted_pair()
    x = images()
    program = for_training(copy.deepcopy(ours), x)
    y = program(x)
    assert_close(plain(x), y)
    buffers = dict(program.named_buffers())
    for name, buffer in plain.named_buffers():
        assert_close(buffer, buffers[name])


# torch.jit


def test_scripting_names_unconvert_and_changes_nothing() -> None:
    plain, ours = converted_pair()
    x = images()
    with pytest.raises(Exception, match="unconvert"):
        torch.jit.script(ours.eval())
    assert isinstance(ours.features, Efficient)
    assert isinstance(ours.features.denseblock1, Efficient)
    assert_same_step(plain.train(), ours.train(), x)
    scripted = torch.jit.script(unconvert(ours).eval())
    assert_close(plain.eval()(x), scripted(x))


def test_traces() -> None:
    plain, ours = converted_pair()
    warm(plain, ours)
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours.eval(), x)
    z = images(5)
    assert_close(plain.eval()(z), traced(z))
    assert_same_step(plain.train(), ours.train(), x)
