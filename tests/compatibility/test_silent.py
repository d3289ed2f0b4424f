"""What once gave other results than torchvision's model without a word."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from densenet_efficient import convert
from densenet_efficient.core import arena
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)
from tests.support.peer import DenseBlock, DenseLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*runs its original forward")


# Modes without memory


def under_export(model: nn.Module, x: Tensor) -> None:
    torch.export.export(model, (x,))


def under_fake_tensors(model: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def on_meta(model: nn.Module, x: Tensor) -> None:
    copy.deepcopy(model).to("meta")(x.to("meta"))


@pytest.mark.parametrize("act", [under_export, under_fake_tensors, on_meta])
@pytest.mark.parametrize("warm", [False, True])
def test_modes_without_memory_never_reach_later_calls(
    act: Callable[[nn.Module, Tensor], None], warm: bool
) -> None:
    plain, ours = converted_pair()
    other = copy.deepcopy(ours)
    x = images()
    arena.release()
    if warm:
        training_step(copy.deepcopy(ours), x)
    act(ours.eval(), x)
    ours.train()
    assert all(type(slab) is Tensor for slabs in arena._free.values() for slab in slabs)
    expected = training_step(plain, x)
    for model in (ours, other):
        assert_close(expected, training_step(model, x))


# Parameters


class Halved(nn.Parameter):
    """A weight of which every convolution takes one half, as those that are masked or quantised
    answer for themselves."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = list(args), kwargs or {}
        if func in (torch.conv2d, F.conv2d):
            args[1] = args[1].as_subclass(Tensor) * 0.5
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["conv0", "denseblock1.denselayer2.conv1", "transition1.conv"])
def test_a_weight_of_a_subclass_answers_for_itself(name: str) -> None:
    plain, ours = converted_pair()
    x = images()
    for model in (plain, ours):
        model(x)
        conv = model.get_submodule(f"features.{name}")
        conv.weight = Halved(conv.weight.detach())
    assert_same_step(plain, ours, x)


# Attributes


def without_tracking(model: nn.Module) -> None:
    for norm in norms(model):
        norm.track_running_stats = False


def with_other_options(model: nn.Module) -> None:
    for norm in norms(model):
        norm.eps, norm.momentum = 1e-2, 0.4


def with_frozen_norms(model: nn.Module) -> None:
    for norm in norms(model)[1::2]:
        norm.eval()


def without_running_statistics(model: nn.Module) -> None:
    for norm in norms(model):
        norm.running_mean = norm.running_var = None


def with_dilation(model: nn.Module) -> None:
    conv = model.get_submodule("features.denseblock2.denselayer2.conv2")
    conv.padding = conv.dilation = (2, 2)


def with_other_parameters(model: nn.Module) -> None:
    conv = model.get_submodule("features.denseblock1.denselayer1.conv2")
    conv.weight = nn.Parameter(conv.weight.detach() * 3)


def with_another_pool(model: nn.Module) -> None:
    model.get_submodule("features.transition1.pool").stride = 1


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    "change",
    [
        without_tracking,  # test-time adaptation sets it on live norms
        with_other_options,
        with_frozen_norms,  # every second one: both kinds of statistics in one layer
        without_running_statistics,
        with_dilation,  # segmentation networks set it after loading weights
        with_other_parameters,  # a parameter exchanged for another object
        with_another_pool,
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_attributes_are_read_at_each_call(
    change: Callable[[nn.Module], None], training: bool
) -> None:
    plain, ours = converted_pair()
    x = images()
    for model in (plain, ours):
        model(x)  # the change comes after a first call
        change(model.train(training) if change is not with_frozen_norms else model)
    assert_same_step(plain, ours, x)


def test_a_drop_rate_of_one_set_later_is_used() -> None:
    """The one rate whose outcome is not random."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.get_submodule("features.denseblock1.denselayer2").drop_rate = 1.0
    assert_same_step(plain, ours, images())


# Patched forwards


def standardised(self: nn.Conv2d, z: Tensor) -> Tensor:
    weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True) * 0.5
    return self._conv_forward(z, weight, self.bias)


def prior(self: nn.BatchNorm2d, z: Tensor) -> Tensor:
    assert self.running_mean is not None and self.running_var is not None
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    mean, var = mean.detach(), var.detach()
    mean, var = 0.8 * self.running_mean + 0.2 * mean, 0.8 * self.running_var + 0.2 * var
    return F.batch_norm(z, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def leaky(self: nn.Module, z: Tensor) -> Tensor:
    return F.leaky_relu(z, 0.1)


def halved(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def patched(*args: Any, **options: Any) -> Tensor:
        return original(*args, **options) * 0.5

    return patched


@pytest.mark.parametrize(
    ("home", "name", "value"),
    [
        (nn.Conv2d, "forward", standardised),  # weight standardisation
        (nn.Conv2d, "_conv_forward", halved(nn.Conv2d._conv_forward)),
        (nn.BatchNorm2d, "forward", prior),  # a norm adapted at test time
        (nn.ReLU, "forward", leaky),
        (nn.AvgPool2d, "forward", halved(nn.AvgPool2d.forward)),
        (nn.MaxPool2d, "forward", halved(nn.MaxPool2d.forward)),
        (nn.Sequential, "forward", halved(nn.Sequential.forward)),  # features and transitions
        (F, "batch_norm", halved(F.batch_norm)),
        (F, "relu", halved(F.relu)),
        (torch, "relu_", halved(torch.relu_)),  # of activations in place
        (torch, "max_pool2d", halved(torch.max_pool2d)),
        (F, "conv2d", halved(F.conv2d)),
        (torch, "cat", halved(torch.cat)),
        (DenseBlock, "forward", halved(DenseBlock.forward)),
        (DenseLayer, "forward", halved(DenseLayer.forward)),
        (DenseLayer, "bn_function", halved(DenseLayer.bn_function)),  # what its forward calls
    ],
)
def test_a_forward_patched_after_conversion_is_called(
    home: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = converted_pair()
    x = images()
    before = training_step(copy.deepcopy(plain), x)["y"]
    training_step(copy.deepcopy(ours), x)
    with monkeypatch.context() as patch:
        patch.setattr(home, name, value)
        unpatched = copy.deepcopy(plain), copy.deepcopy(ours)
        assert_same_step(plain, ours, x)
        assert not torch.allclose(plain(x), before), "the patch changes nothing here"
    assert_same_step(*unpatched, x)


# Parametrised weights


class Counting(nn.Module):
    """Counts how often the weight is evaluated, and changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("evaluations", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.evaluations += 1
        return weight * 1.5


PARAMETRISED = [
    "features.conv0",
    "features.norm0",
    "features.denseblock1.denselayer2.conv1",
    "features.denseblock2.denselayer1.conv2",
    "features.denseblock2.denselayer3.norm1",
    "features.transition1.conv",
    "features.transition1.norm",
    "features.norm5",
]


@pytest.mark.parametrize("where", PARAMETRISED)
@pytest.mark.parametrize("first", [False, True])  # parametrised before conversion or after
def test_a_parametrised_weight_is_evaluated_as_often(where: str, first: bool) -> None:
    plain, ours = converted_pair()
    for model in (plain, ours):
        parametrize.register_parametrization(model.get_submodule(where), "weight", Counting())
    if first:
        ours = convert(copy.deepcopy(plain))
    for model in (plain, ours):
        for name, buffer in model.named_buffers():
            if name.endswith("evaluations"):
                buffer.zero_()
    assert_same_step(plain, ours, images())  # the counter is one of the buffers


@pytest.mark.parametrize("where", [name for name in PARAMETRISED if "norm" not in name])
def test_spectral_norms_take_the_same_power_iterations(where: str) -> None:
    plain, _ = converted_pair()
    parametrizations.spectral_norm(plain.get_submodule(where))
    ours = convert(copy.deepcopy(plain))
    for _ in range(2):
        assert_same_step(plain, ours, images())


# Writing to an output


@contextmanager
def edits(model: nn.Module, where: str, edit: Callable[[Tensor], Any]) -> Iterator[None]:
    def hook(module: nn.Module, inputs: Any, y: Tensor) -> None:
        edit(y)

    handle = model.get_submodule(where).register_forward_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("where", ["pool0", "denseblock1", "transition1", "denseblock2", "norm5"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda y: y.data.mul_(0.5),  # past autograd's version counter
        lambda y: y.data[:, ::2].fill_(1.0),
        lambda y: y.detach().add_(1.0),  # shares memory and counts
        lambda y: y.data.numpy().__imul__(2.0),  # past PyTorch altogether
    ],
)
def test_edits_of_an_output_reach_the_next_module_only(
    where: str, edit: Callable[[Tensor], Any]
) -> None:
    """Not what the block keeps for its backward pass; see the next test for gradients."""
    plain, ours = converted_pair()
    x = images()
    with edits(plain, f"features.{where}", edit), edits(ours, f"features.{where}", edit):
        with torch.no_grad():
            assert_close(copy.deepcopy(plain)(x), copy.deepcopy(ours)(x))
        assert_close(plain.eval()(x).detach(), ours.eval()(x).detach())


@pytest.mark.parametrize("where", ["denseblock1", "transition1"])
def test_data_edits_between_modules_give_the_same_gradients(where: str) -> None:
    plain, ours = converted_pair()
    edit = lambda y: y.data.mul_(0.5)  # noqa: E731
    with edits(plain, f"features.{where}", edit), edits(ours, f"features.{where}", edit):
        assert_same_step(plain, ours, images())


# Counting


@pytest.mark.parametrize("training", [True, False])
def test_flops_are_counted_as_in_the_original(training: bool) -> None:
    counts = []
    for model in converted_pair():
        with FlopCounterMode(display=False) as counter:
            model.train(training)(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_16_bit_greys_are_read_as_a_ramp(tmp_path: Any) -> None:
    """Chest X-rays are stored so; they were read as white."""
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    from densenet_efficient.train.data import _open_image

    greys = numpy.arange(2000, 30000, 7, "uint16")[:3600].reshape(60, 60)
    image.fromarray(greys).save(tmp_path / "grey.png")
    assert (numpy.asarray(_open_image(str(tmp_path / "grey.png")))[..., 0] == greys // 256).all()
