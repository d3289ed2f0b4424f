"""What torchvision's model does and a converted one once refused with an internal error."""

import copy
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import convert, load_weights, max_batch, plan
from densenet_efficient.core import arena
from densenet_efficient.nn.execution import Efficient
from tests.support.converted_pair import (
    assert_close,
    assert_same_step,
    converted_pair,
    images,
    training_step,
)
from tests.support.networks import network
from tests.support.peer import torchvision

pytestmark = pytest.mark.filterwarnings("ignore:.*runs its original forward")
OUTPUTS = ["norm0", "pool0", "denseblock1", "transition1", "denseblock2", "norm5"]


# Operations in place on what a module gives out


def until(model: nn.Module, name: str) -> nn.Module:
    """The features up to and including one child, of the same class."""
    children = list(model.features._modules.items())
    count = [key for key, _ in children].index(name) + 1
    features = copy.copy(model.features)
    features._modules = OrderedDict(children[:count])
    return features


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.0, inplace=True),
        lambda y: y.mul_(0.5),
        lambda y: torch.nn.functional.hardtanh_(y),
        lambda y: y.add_(y.detach() * 0.5),
        lambda y: y[:, :3].zero_() is y or y,
        lambda y: y.unsqueeze_(0).squeeze_(0),
    ],
)
def test_in_place_operations_on_an_output(name: str, act: Callable[[Tensor], Tensor]) -> None:
    plain, ours = (until(model, name) for model in converted_pair())
    assert_same_step(plain, ours, images(), lambda model, x: act(model(x)))


def test_a_last_norm_taken_away() -> None:
    """torchvision's own ReLU in place then meets the last block's output."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.features.norm5 = nn.Identity()
    assert_same_step(plain, ours, images())


def test_activations_in_place_put_between_the_modules() -> None:
    plain, ours = converted_pair()
    for model in (plain, ours):
        for name in ("pool0", "denseblock1", "transition1", "denseblock2"):
            child = model.features._modules[name]
            model.features._modules[name] = nn.Sequential(child, nn.ReLU(inplace=True))
    assert_same_step(plain, ours, images())


# Modules put in the place of others


class LoRA(nn.Module):
    """A convolution and a low-rank addition to it, which has none of its attributes."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        sides = dict(padding=conv.padding, bias=False)
        self.addition = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **sides)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.addition(x)


REPLACEMENTS: list[tuple[str, Callable[[Any], nn.Module]]] = [
    ("norm1", lambda norm: nn.GroupNorm(4, norm.num_features)),  # for differential privacy
    ("norm2", lambda norm: nn.GroupNorm(4, norm.num_features)),
    ("norm1", lambda norm: torchvision.ops.FrozenBatchNorm2d(norm.num_features)),  # detection
    ("norm1", lambda norm: nn.Identity()),  # norms fused away
    ("conv1", LoRA),
    ("conv2", LoRA),
    ("relu1", lambda relu: nn.SiLU()),
    ("conv2", lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding="same")),
]


@pytest.mark.parametrize(("name", "make"), REPLACEMENTS)
@pytest.mark.parametrize("layer", ["denselayer1", "denselayer2"])
@pytest.mark.parametrize("training", [True, False])
def test_replaced_modules_of_a_layer(
    name: str, make: Callable[[Any], nn.Module], layer: str, training: bool
) -> None:
    plain, ours = converted_pair()
    place = f"features.denseblock1.{layer}.{name}"
    new = make(plain.get_submodule(place)).double()
    for model in (plain.train(training), ours.train(training)):
        model.set_submodule(place, copy.deepcopy(new).train(training))
    assert_same_step(plain, ours, images())


@pytest.mark.parametrize("name", ["norm0", "relu0", "pool0", "transition1", "denseblock2", "norm5"])
def test_modules_of_the_features_replaced_by_themselves_wrapped(name: str) -> None:
    """A wrapper hides the class and the attributes."""
    plain, ours = converted_pair()
    for model in (plain, ours):
        model.features._modules[name] = nn.Sequential(model.features._modules[name])
    assert_same_step(plain, ours, images())


def test_layers_removed_and_added() -> None:
    plain, ours = converted_pair()
    for model in (plain, ours):
        block = model.features.denseblock1
        block.extra = copy.deepcopy(block.denselayer2)
        block.extra.norm1 = nn.BatchNorm2d(32).double()
        block.extra.conv1 = nn.Conv2d(32, 32, 1, bias=False).double()
        model.features.transition1.norm = nn.BatchNorm2d(40).double()
        model.features.transition1.conv = nn.Conv2d(40, 16, 1, bias=False).double()
    ours.load_state_dict(plain.state_dict())
    assert_same_step(plain, ours, images())


# Memory formats


def of_the_network(model: nn.Module) -> tuple[nn.Module, Tensor]:
    return model, images()


def of_the_features(model: nn.Module) -> tuple[nn.Module, Tensor]:
    return model.features, images()


def of_a_block(model: nn.Module) -> tuple[nn.Module, Tensor]:
    return model.features.denseblock1, torch.randn(3, 16, 6, 5).double()


def of_a_transition(model: nn.Module) -> tuple[nn.Module, Tensor]:
    return model.features.transition1, torch.randn(3, 32, 6, 5).double()


@pytest.mark.parametrize("part", [of_the_network, of_the_features, of_a_block, of_a_transition])
@pytest.mark.parametrize("training", [True, False])
def test_results_of_contiguous_input_are_contiguous(
    part: Callable[[nn.Module], tuple[nn.Module, Tensor]], training: bool
) -> None:
    """So that `.view` works on the output and on every gradient."""
    found = []
    plain, ours = converted_pair()
    for model in (plain, ours):
        torch.manual_seed(1)
        module, x = part(model.train(training))
        x.requires_grad_()
        y = module(x)
        inputs = [x, *module.parameters()]
        gradients = torch.autograd.grad(y.square().sum(), inputs)
        found.append([t.view(-1) for t in (y, *gradients)])
        assert [g.stride() for g in gradients] == [p.stride() for p in inputs]
    assert_close(found[0], found[1])


def test_a_gradient_flows_through_flattened_features() -> None:
    plain, ours = converted_pair()
    assert_same_step(plain, ours, images(), lambda m, x: m.features(x).view(x.shape[0], -1))


# No images, no memory, another device


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_images(training: bool) -> None:
    """An image without detections; in training PyTorch refuses it or not, and so do we."""
    answers = []
    for model in converted_pair():
        try:
            answers.append(training_step(model.train(training), images(0)))
        except (RuntimeError, ValueError) as error:
            answers.append({"error": torch.tensor(len(str(error)) > 0)})
    assert_close(answers[0], answers[1])


@pytest.mark.parametrize("training", [True, False])
def test_shapes_on_the_meta_device(training: bool) -> None:
    plain = network().train(training).to("meta")
    for model in (plain, convert(copy.deepcopy(plain)), convert(network()).to("meta")):
        y = model.train(training)(torch.empty(2, 3, 32, 32, device="meta"))
        assert y.is_meta and y.shape == (2, 5)
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_default_device_that_is_not_the_models(training: bool) -> None:
    """Nothing inside is made on the default device."""
    plain, ours = converted_pair()
    x = images()
    arena.release()
    expected = training_step(plain.train(training), x)
    with torch.device("meta"):
        got = training_step(ours.train(training), x)
    torch.set_default_device("meta")
    try:
        again = ours.eval()(x)
    finally:
        torch.set_default_device(None)
    assert_close(expected, got)
    assert_close(plain.eval()(x), again)


def test_a_default_dtype_that_is_not_the_models() -> None:
    plain, ours = converted_pair()
    x = images()
    expected = training_step(plain, x)
    torch.set_default_dtype(torch.float16)
    try:
        got = training_step(ours, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(expected, got)


# Wrappers


class Wrapper(nn.Module):
    """A network under a name of its own, as published medical models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.densenet121 = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.densenet121(x)


WRAPPERS = [Wrapper, lambda: nn.DataParallel(network()), lambda: nn.DataParallel(Wrapper())]


@pytest.mark.parametrize("make", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_load_into_wrappers(make: Callable[[], nn.Module], prefix: str) -> None:
    source, model = make().double().eval(), convert(make().double()).eval()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    assert load_weights(model, {"state_dict": state}) is model
    x = images()
    assert_close(source(x), model(x))


@pytest.mark.parametrize("make", WRAPPERS)
def test_plans_of_wrappers_are_those_of_the_network(make: Callable[[], nn.Module]) -> None:
    shape = (2, 3, 32, 32)
    expected = plan(convert(network()), shape, torch.float32)
    found = plan(convert(make()), shape, torch.float32)
    assert found.total_bytes == expected.total_bytes
    budget = 10 * expected.total_bytes
    counts = [
        max_batch(model, shape[1:], torch.float32, budget)
        for model in (convert(network()), convert(make()))
    ]
    assert counts[0] == counts[1] > 1


# Copies


def test_copies_share_nothing_and_stay_efficient() -> None:
    plain, ours = converted_pair()
    copied = copy.deepcopy(ours)
    training_step(copied, images())
    assert all(isinstance(m, Efficient) for m in (copied.features, copied.features.denseblock2))
    assert_same_step(plain, ours, images())


# Forks


def hold(ready: threading.Event, done: threading.Event) -> None:
    """Holds a lease and the arena's own lock."""
    row = arena.Buffer("row", (8,), torch.float64, "scratch")
    with arena.lease([row], torch.device("cpu")), arena._lock:
        ready.set()
        done.wait(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_child_forked_while_a_thread_holds_a_lease_runs() -> None:
    _, ours = converted_pair()
    x = images()
    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(ready, done))
    thread.start()
    ready.wait()
    child = os.fork()
    if child == 0:
        try:
            training_step(ours, x)
            os._exit(0)
        finally:
            os._exit(1)
    done.set()
    thread.join()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
