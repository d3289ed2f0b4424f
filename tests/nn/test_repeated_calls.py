"""A block that is called again takes over what it found out before, and must notice every change: a
copy of it, which has found out nothing yet, gives the same in every respect."""

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from densenet_efficient import EfficientDenseBlock
from densenet_efficient.conversion import self_check

pytestmark = pytest.mark.quick


def block_of(**options: Any) -> EfficientDenseBlock:
    torch.manual_seed(0)
    return EfficientDenseBlock(3, 8, 2, 4, 0.0, **options)


def replace_weight(block: Any) -> None:
    conv = block.denselayer2.conv1
    weight = conv.weight
    del conv.weight  # the new one comes after the bias
    conv.weight = nn.Parameter(weight.detach() * 2)


def take_weight_for_a_tensor(block: Any) -> None:
    conv = block.denselayer2.conv2
    weight = conv.weight
    del conv.weight
    conv.weight = weight.detach() * 2


def swap_layers(block: Any) -> None:
    first, second = block.denselayer2.conv2, block.denselayer3.conv2
    block.denselayer2.conv2, block.denselayer3.conv2 = second, first


def rename_layer(block: Any) -> None:
    block._modules["other"] = block._modules.pop("denselayer3")


def no_convolution(x: torch.Tensor, weight: torch.Tensor, bias: None) -> torch.Tensor:
    return x * weight.sum()


def take_nothing_for_a_bias(block: Any) -> None:
    del block.denselayer1.conv1.bias
    block.denselayer1.conv1.bias = None


def take_nothing_for_gamma(block: Any) -> None:
    del block.denselayer2.norm2.weight
    block.denselayer2.norm2.weight = None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda block: None,
    "eps": lambda block: setattr(block.denselayer2.norm1, "eps", 0.5),
    "momentum": lambda block: setattr(block.denselayer2.norm2, "momentum", 0.7),
    "average": lambda block: setattr(block.denselayer2.norm2, "momentum", None),
    "eval": lambda block: block.eval(),
    "one norm": lambda block: block.denselayer2.norm2.eval(),
    "no tracking": lambda block: setattr(block.denselayer1.norm1, "track_running_stats", False),
    "buffer": lambda block: setattr(block.denselayer1.norm1, "running_mean", torch.ones(8)),
    "no buffer": lambda block: setattr(block.denselayer1.norm1, "num_batches_tracked", None),
    "data": lambda block: setattr(block.denselayer1.conv1.weight, "data", torch.ones(8, 8, 1, 1)),
    "weight": replace_weight,
    "tensor": take_weight_for_a_tensor,
    "bias": lambda block: setattr(block.denselayer3.conv1, "bias", nn.Parameter(torch.ones(8))),
    "plain bias": take_nothing_for_a_bias,
    "plain gamma": take_nothing_for_gamma,
    "no gamma": lambda block: setattr(block.denselayer1.norm1, "weight", None),
    "dilation": lambda block: vars(block.denselayer1.conv2).update(dilation=(2, 2), padding=(2, 2)),
    "drop rate": lambda block: setattr(block.denselayer1, "drop_rate", 0.5),
    "frozen": lambda block: block.denselayer1.conv1.weight.requires_grad_(False),
    "channels last": lambda block: block.to(memory_format=torch.channels_last),
    "float64": lambda block: block.double(),
    "memory": lambda block: setattr(block, "memory", "store"),
    "class": lambda block: setattr(block.denselayer1.norm1, "__class__", nn.InstanceNorm2d),
    "forward": lambda block: vars(block.denselayer1.relu1).update(forward=torch.tanh),
    "method": lambda block: vars(block.denselayer1.conv1).update(_conv_forward=no_convolution),
    "hook": lambda block: block.denselayer2.conv1.register_forward_hook(lambda *given: None),
    "activation": lambda block: setattr(block.denselayer1, "relu1", nn.ELU()),
    "order": swap_layers,
    "name": rename_layer,
    "fewer": lambda block: vars(block)["_modules"].popitem(),
}


class SharedRate(nn.Module):
    """A layer of another library, whose dropout is its class'."""

    drop_rate = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        y = self.conv2(self.norm2(self.bottleneck(features)).relu())
        return nn.functional.dropout(y, self.drop_rate, self.training)

    def bottleneck(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.conv1(self.norm1(torch.cat(features, 1)).relu())


class Derived(SharedRate):
    """One whose class defines nothing itself."""


def derived_block() -> EfficientDenseBlock:
    torch.manual_seed(0)
    return EfficientDenseBlock.from_layers({"l0": Derived(8), "l1": Derived(12)})


def step(block: Any) -> list[Any]:
    """All that a step gives and changes."""
    torch.manual_seed(1)
    dtype = next(block.parameters()).dtype
    x = torch.randn(2, 8, 5, 5, dtype=dtype).requires_grad_()
    y = block(x)
    inputs = [x, *filter(_trained, block.parameters())]
    grads = torch.autograd.grad(y.square().sum(), inputs, materialize_grads=True)
    return [block.path(x), y, *grads, *block.buffers()]


def _trained(parameter: torch.Tensor) -> bool:
    return parameter.requires_grad


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*original forward")
def test_a_change_between_two_calls_is_noticed(change: str) -> None:
    block = block_of()
    step(block)
    step(block)
    CHANGES[change](block)
    for _ in range(2):
        fresh = copy.deepcopy(block)
        for known, new in zip(step(block), step(fresh), strict=True):
            if isinstance(known, torch.Tensor):
                torch.testing.assert_close(known, new, rtol=0, atol=0, equal_nan=True)
            else:
                assert known == new


@pytest.mark.parametrize("kept", [0.5, property(lambda layer: 0.5)], ids=["value", "property"])
def test_what_a_class_holds_is_compared(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = derived_block()
    step(block)
    step(block)
    assert block._efficient.last_call is not None
    for rate, drops in ((kept, True), (0.0, False)):
        monkeypatch.setattr(SharedRate, "drop_rate", rate)
        for _ in range(2):
            assert bool((step(block)[1] == 0).any()) == drops


@pytest.mark.filterwarnings("ignore:.*original forward")
@pytest.mark.parametrize("on", ["instance", "class"])
def test_a_method_that_a_layer_inherits_is_watched(
    on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = derived_block()
    step(block)
    target = block.l0 if on == "instance" else SharedRate
    monkeypatch.setattr(target, "bottleneck", lambda *given: torch.zeros(2, 8, 5, 5))
    path, y, *_ = step(block)
    assert path.kind == "original"
    assert torch.equal(y[:, 8:12, 2, 2], block.l0.conv2(torch.zeros(2, 8, 5, 5))[:, :, 2, 2])


def test_a_check_without_dropout_is_no_call_before_it() -> None:
    torch.manual_seed(0)
    block = EfficientDenseBlock(2, 8, 2, 4, 0.5)
    for _ in range(2):
        assert (step(block)[1] == 0).any()
        with self_check._without_dropout(block):
            assert not (step(block)[1] == 0).any()


@pytest.mark.parametrize("note", [torch.ones(3), torch.ones(3).numpy()], ids=["tensor", "array"])
def test_a_number_may_become_an_array(note: Any) -> None:
    block = block_of()
    block.note = 0.0
    expected = step(block)[1]
    step(block)
    block.note = note
    torch.testing.assert_close(step(block)[1], expected, rtol=0, atol=0)


def test_exchanged_parameters_are_freed() -> None:
    block = block_of()
    step(block)
    step(block)
    old = [weakref.ref(tensor) for tensor in (*block.parameters(), *block.buffers())]
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block.load_state_dict(state, assign=True)
    step(block)
    assert not any(tensor() is not None for tensor in old)


def test_a_block_that_is_called_again_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of()
    step(block)
    monkeypatch.setattr(EfficientDenseBlock, "_specification", None)
    step(block)


def test_what_is_known_is_not_stored() -> None:
    block = block_of()
    step(block)
    assert pickle.loads(pickle.dumps(block))._efficient.last_call is None


def test_a_tensor_that_a_transform_left_behind_stands_for_the_one_inside() -> None:
    block, left = block_of(), list[torch.Tensor]()
    weight = block.denselayer1.norm1.weight

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        left.append(tensor * 1)
        return tensor.sum()

    (expected,) = torch.autograd.grad(block(torch.eye(5).expand(2, 8, 5, 5))[:, 8:].sum(), weight)
    torch.func.grad(keep)(weight)
    del block.denselayer1.norm1.weight
    block.denselayer1.norm1.weight = left[0]
    for _ in range(3):
        y = block(torch.eye(5).expand(2, 8, 5, 5))
        (found,) = torch.autograd.grad(y[:, 8:].sum(), weight, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
