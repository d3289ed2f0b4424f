"""convert(): torchvision's network becomes efficient in place, with everything a user may hold on
to still there; or nothing changes, and the error says why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientFeatures, EfficientTransition, explain, reference
from densenet_efficient.bench.accuracy import relative_error, training_step
from densenet_efficient.conversion import convert, inspect_conversion, unconvert
from densenet_efficient.nn.dense_block import EfficientDenseBlock
from tests.support.networks import OPTIONS, network, snapshot
from tests.support.peer import DenseBlock, DenseLayer, Transition, torchvision


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 33, 40).to(dtype), torch.tensor([1, 2, 3])


def assert_same_step(actual: nn.Module, expected: nn.Module, bound: float = 1e-9) -> None:
    x, target = batch(next(expected.parameters()).dtype)
    ours, theirs = training_step(actual, x, target), training_step(expected, x, target)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value) < bound, name
    for name, value in expected.named_buffers():
        torch.testing.assert_close(actual.get_buffer(name), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory", ["recompute", "store"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_converted_torchvision_gives_the_same_step(memory: str, memory_efficient: bool) -> None:
    model = network(memory_efficient=memory_efficient).double()
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, DenseLayer):
            module.memory_efficient = False  # it would update norm1's statistics twice
    assert convert(model, memory=memory) is model
    assert isinstance(model.features, EfficientFeatures)
    assert isinstance(model.features.denseblock2, EfficientDenseBlock)
    assert isinstance(model.features.transition1, EfficientTransition)
    assert model.features.denseblock1.memory == memory
    assert_same_step(model, expected)


def test_converted_reference_gives_the_same_step() -> None:
    for bottleneck in (True, False):
        model = reference.DenseNet(**OPTIONS, bottleneck=bottleneck, small_inputs=True).double()
        expected = copy.deepcopy(model)
        convert(model)
        assert isinstance(model.features, EfficientFeatures)
        assert_same_step(model, expected)


def test_whole_densenet121_converts() -> None:
    model = torchvision.models.densenet121(num_classes=10).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert relative_error(convert(model)(x), expected) < 1e-12
    assert not any(type(module) in (DenseBlock, Transition) for module in model.modules())


def test_everything_a_user_holds_on_to_stays() -> None:
    model = network()
    model.features.denseblock1.requires_grad_(False)
    model.features.denseblock2.denselayer1.norm1.eval()
    names = [name for name, _ in model.named_modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    called: list[str] = []
    weight = model.features.denseblock2.denselayer1.conv1.weight
    weight.register_hook(lambda grad: called.append("parameter"))
    handle = model.features.denseblock2.register_forward_hook(lambda *a: called.append("block"))
    model.features.register_forward_hook(lambda *a: called.append("features"))
    model.features.denseblock1.note = "mine"

    convert(model)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert model.features.denseblock1.note == "mine"
    assert called == [], "the self-check called a user's hook"

    before = weight.detach().clone()
    x, target = batch(torch.float32)
    nn.functional.cross_entropy(model(x), target).backward()
    optimiser.step()
    assert called == ["block", "features", "parameter"]
    assert not torch.equal(before, weight)
    assert model.features.denseblock1.denselayer1.conv1.weight.grad is None
    handle.remove()
    called.clear()
    model(x)
    assert called == ["features"]


def test_modes_can_be_switched_and_conversion_repeated() -> None:
    model = convert(network())
    after = snapshot(model)
    convert(model, memory="store")
    assert snapshot(model) == after
    assert {b.memory for b in model.modules() if isinstance(b, EfficientDenseBlock)} == {"store"}
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_copy_and_pickle(copier: Callable[[nn.Module], nn.Module]) -> None:
    model = convert(network().double())
    copied = copier(model)
    x, target = batch()
    expected = training_step(model, x, target)
    for name, value in training_step(copied, x, target).items():
        assert torch.equal(value, expected[name]), name
    assert isinstance(copied.features.denseblock1, EfficientDenseBlock)
    assert copied.features.conv0.weight is not model.features.conv0.weight


def test_unconvert_brings_the_original_back() -> None:
    model = network().double()
    expected = copy.deepcopy(model)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert unconvert(convert(model)) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert_same_step(model, expected, bound=1e-15)
    assert_same_step(convert(model), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 1.001e-5, "momentum": 0.01},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
    ],
)
def test_norm_options_of_other_libraries_are_honoured(options: dict[str, Any]) -> None:
    model = network().double()
    for name, norm in list(model.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            new = nn.BatchNorm2d(norm.num_features, **options).double()
            setattr(model.get_submodule(parent), child, new)
    expected = copy.deepcopy(model)
    assert_same_step(convert(model), expected)


def test_synchronised_norms_convert_and_are_converted() -> None:
    expected = network().double().eval()
    x = batch()[0]
    synchronise = nn.SyncBatchNorm.convert_sync_batchnorm
    for steps in ((synchronise, convert), (convert, synchronise)):
        model = copy.deepcopy(expected)
        for step in steps:
            model = step(model)
        with torch.no_grad():
            assert explain(model, x).kinds == {"kernels"}
            assert relative_error(model(x), expected(x)) < 1e-12


def test_every_module_stays_the_same_object_of_its_class() -> None:
    model = network()
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    convert(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, cls) for m, cls in zip(modules, classes, strict=True))


def test_blocks_outside_a_densenet_are_converted() -> None:
    class Encoder(nn.Module):
        """Calls the parts one by one and shares a block, as segmentation encoders do."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.first = DenseBlock(2, 8, 4, 4, 0.0)
            self.parts = nn.ModuleList([self.first, Transition(16, 8)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts[1](self.first(self.stem(x)))
            return self.parts[0](x).mean((2, 3))

    model = Encoder().double()
    expected = copy.deepcopy(model)
    convert(model)
    assert isinstance(model.first, EfficientDenseBlock) and model.parts[0] is model.first
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert relative_error(model(x), expected(x)) < 1e-12


def test_a_bare_block_is_returned_as_its_replacement() -> None:
    block = DenseBlock(2, 8, 4, 4, 0.0)
    converted = convert(block)
    assert isinstance(converted, EfficientDenseBlock)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(converted.eval()(x), block.eval()(x))


def test_renamed_or_cut_features_are_features() -> None:
    """A Sequential says everything by its children; a part of one is a plain Sequential again."""
    children = list(network().double().features.children())
    body = nn.Sequential(*children[:-1])
    expected = copy.deepcopy(body)
    convert(body)
    assert isinstance(body, EfficientFeatures)
    assert isinstance(body[4], EfficientDenseBlock) and isinstance(body[5], EfficientTransition)
    x = batch()[0]
    for ours, plain in ((body, expected), (body[:-1], expected[:-1]), (body[2:3], expected[2:3])):
        assert len(ours) == len(plain)
        value = x if len(plain) > 1 else torch.randn(2, 8, 5, 5).double()
        assert relative_error(ours(value), plain(value)) < 1e-12
    assert type(body[:-1]) is nn.Sequential and isinstance(body[:-1][4], EfficientDenseBlock)


def test_a_transition_that_takes_the_largest_value_converts() -> None:
    model = network()
    model.features.transition1.pool = nn.MaxPool2d(2)
    expected = copy.deepcopy(model).double()
    convert(model)
    assert isinstance(model.features.transition1, EfficientTransition)
    assert_same_step(model.double(), expected)


def test_a_transition_of_another_kind_is_left_and_reported() -> None:
    model = network()
    model.features.transition1.pool = nn.MaxPool2d(3, 2, 1)
    report = inspect_conversion(model)
    assert [entry.path for entry in report.select("left")] == ["features.transition1"]
    assert "MaxPool2d" in str(report)
    expected = copy.deepcopy(model).double()
    convert(model)
    assert type(model.features.transition1) is Transition
    assert isinstance(model.features, EfficientFeatures)
    assert_same_step(model.double(), expected)


def test_on_the_meta_device_structure_is_converted_unchecked() -> None:
    with torch.device("meta"):
        model = network()
    report = inspect_conversion(model)
    assert all("unchecked" in entry.reason for entry in report.select("converted"))
    assert isinstance(convert(model).features.denseblock1, EfficientDenseBlock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pure_low_precision_models_pass_their_self_check(dtype: torch.dtype) -> None:
    model = convert(network().to(dtype))
    assert isinstance(model.features, EfficientFeatures)


def test_random_state_and_statistics_are_left_alone() -> None:
    model = network()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


# Surgery after the conversion: the original forward runs, and says so


def with_inner_hook(model: nn.Module) -> None:
    model.features.denseblock1.denselayer1.conv1.register_forward_hook(lambda *a: None)


def with_inner_backward_hook(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    layer = model.features.denseblock1.denselayer2
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def with_new_activation(model: nn.Module) -> None:
    model.features.denseblock1.denselayer2.relu2 = nn.SiLU()


def with_parametrised_weight(model: nn.Module) -> None:
    convolution = model.features.denseblock1.denselayer1.conv2
    nn.utils.parametrizations.weight_norm(convolution)


def with_new_transition(model: nn.Module) -> None:
    model.features.transition1.pool = nn.MaxPool2d(2)


def with_new_layer(model: nn.Module) -> None:
    block = model.features.denseblock1
    block.denselayer2 = DenseLayer(12, 4, 1, 0.0).double()


@pytest.mark.parametrize(
    "operate",
    [
        with_inner_hook,
        with_inner_backward_hook,
        with_new_activation,
        with_parametrised_weight,
        with_new_transition,
        with_new_layer,
    ],
)
@pytest.mark.filterwarnings("ignore:dense block runs its original forward", "ignore:Full backward")
def test_surgery_after_conversion_is_honoured(operate: Callable[[nn.Module], None]) -> None:
    expected = network().double()
    model = convert(copy.deepcopy(expected))
    for target in (expected, model):
        torch.manual_seed(7)
        operate(target)
    assert_same_step(model, expected)


def test_moves_freezing_and_rewrapping_after_conversion() -> None:
    expected = network().double()
    model = convert(copy.deepcopy(expected).float()).double()
    model.load_state_dict(expected.state_dict())
    for target in (expected, model):
        target.features.denseblock2.denselayer1.norm1.eval()
        target.features.denseblock1.eval()
        target.features.denseblock1.denselayer1.requires_grad_(False)
    x, target = batch()
    for net in (expected, model):
        nn.functional.cross_entropy(net(x), target).backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-9, name
    for name, value in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-9, atol=1e-12)
