"""What is tested: blocks, transitions and small networks, each as a plain module of PyTorch's
layers and as ours with the same parameters, and the strategies that draw them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hypothesis import strategies as st
from torch import nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.nn.options import AUTO, MEMORY_MODES
from tests.support.networks import network

MEMORY = st.sampled_from(MEMORY_MODES)


class Subject(Protocol):
    """Something to test: the plain module in float64, ours of it, and the shape of an input."""

    shape: tuple[int, ...]

    def plain(self) -> nn.Module:
        """PyTorch's modules, float64, in train mode."""

    def ours(self, plain: nn.Module) -> nn.Module:
        """Ours with the parameters and buffers of `plain`, in its dtype, in train mode."""


@dataclass(frozen=True)
class NormOptions:
    """Of one norm. trains: False leaves it in eval mode while the model trains."""

    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    trains: bool = True

    def apply(self, norm: Any) -> None:
        norm.eps, norm.momentum = self.eps, self.momentum
        if not self.affine:
            norm.weight = norm.bias = None
        if not self.track:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False


def norms_of(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def set_norms(module: nn.Module, options: Sequence[NormOptions]) -> nn.Module:
    """Moves every norm away from 1 and 0 and gives it its options, in turn."""
    moved_norms(module, statistics=True)
    for index, norm in enumerate(norms_of(module)):
        if options:
            options[index % len(options)].apply(norm)
    return module


def set_mode(module: nn.Module, training: bool, options: Sequence[NormOptions]) -> None:
    """Train or eval mode, single norms in eval mode all the same."""
    module.train(training)
    for index, norm in enumerate(norms_of(module)):
        if options and not options[index % len(options)].trains:
            norm.eval()


@dataclass(frozen=True)
class Block:
    """A dense block; kernel: of the convolution that makes the new features."""

    shape: tuple[int, ...]
    layers: int
    growth: int
    bn_size: int
    bottleneck: bool
    kernel: int
    dilation: int
    bias: bool
    memory: str
    norms: tuple[NormOptions, ...] = ()
    drop_rate: float = 0.0

    def plain(self) -> nn.Module:
        block = reference.DenseBlock(
            self.layers, self.shape[1], self.bn_size, self.growth, self.drop_rate,
            bottleneck=self.bottleneck, dims=len(self.shape) - 2,
        )  # fmt: skip
        for layer in block.values():
            name = "conv2" if self.bottleneck else "conv1"
            old = layer.get_submodule(name)
            padding = self.dilation * (self.kernel - 1) // 2
            new = type(old)(  # type: ignore[call-arg]
                old.in_channels, old.out_channels, self.kernel,
                padding=padding, dilation=self.dilation, bias=self.bias,
            )  # fmt: skip
            setattr(layer, name, new)
        return set_norms(block.double(), self.norms)

    def ours(self, plain: nn.Module) -> nn.Module:
        layers = dict(copy.deepcopy(plain).named_children())
        block = de.EfficientDenseBlock.from_layers(layers, memory=self.memory)
        if self.memory == AUTO:
            block.kept_layers = self.layers // 2
        return block


@dataclass(frozen=True)
class Transition:
    """A transition between two blocks."""

    shape: tuple[int, ...]
    outputs: int
    norms: tuple[NormOptions, ...] = ()

    def plain(self) -> nn.Module:
        return set_norms(reference.Transition(self.shape[1], self.outputs).double(), self.norms)

    def ours(self, plain: nn.Module) -> nn.Module:
        ours = de.EfficientTransition(self.shape[1], self.outputs)
        for name, child in copy.deepcopy(plain).named_children():
            setattr(ours, name, child)
        return ours


@dataclass(frozen=True)
class Network:
    """A small network: torchvision's, converted, or with small_inputs ours next to the
    reference."""

    shape: tuple[int, ...]
    growth: int
    config: tuple[int, ...]
    init: int
    bn_size: int
    small_inputs: bool
    bottleneck: bool
    memory: str
    norms: tuple[NormOptions, ...] = ()

    def _options(self) -> dict[str, Any]:
        return {
            "growth_rate": self.growth,
            "block_config": self.config,
            "num_init_features": self.init,
            "bn_size": self.bn_size,
            "num_classes": 3,
        }

    def _own_options(self) -> dict[str, Any]:
        return {**self._options(), "small_inputs": True, "bottleneck": self.bottleneck}

    def plain(self) -> nn.Module:
        if self.small_inputs:
            model: nn.Module = reference.DenseNet(**self._own_options())
        else:
            model = network(**self._options())
        return set_norms(model.double(), self.norms)

    def ours(self, plain: nn.Module) -> nn.Module:
        if not self.small_inputs:
            return de.convert(copy.deepcopy(plain), self.memory)
        model = de.EfficientDenseNet(**self._own_options(), memory=self.memory)
        set_norms(model.to(next(plain.parameters()).dtype), self.norms)
        model.load_state_dict(plain.state_dict())
        return model


NORMS = st.lists(
    st.builds(
        NormOptions,
        eps=st.sampled_from([1e-5, 1e-3, 0.1]),
        momentum=st.sampled_from([0.1, 0.01, 1.0, 0.0, None]),
        affine=st.sampled_from([True, True, False]),
        track=st.sampled_from([True, True, False]),
        trains=st.sampled_from([True, True, True, False]),
    ),
    max_size=3,
).map(tuple)


def _sizes(dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    longest = {1: 12, 2: 7, 3: 4}[dims]
    return st.tuples(*[st.integers(1, longest)] * dims)


@st.composite
def blocks(
    draw: st.DrawFn, norms: st.SearchStrategy[tuple[NormOptions, ...]] = NORMS, smallest: int = 0
) -> Block:
    """Blocks of every kind; smallest: images of a batch at least."""
    dims = draw(st.sampled_from([2, 2, 2, 1, 3]))
    shape = (draw(st.integers(smallest, 3)), draw(st.integers(1, 9)), *draw(_sizes(dims)))
    standard = draw(st.booleans())  # what the kernels were made for
    return Block(
        shape=shape,
        layers=draw(st.integers(1, 4)),
        growth=draw(st.integers(1, 6)),
        bn_size=draw(st.integers(1, 4)),
        bottleneck=draw(st.booleans()),
        kernel=3 if standard else draw(st.sampled_from([1, 3, 5])),
        dilation=1 if standard else draw(st.sampled_from([1, 2])),
        bias=False if standard else draw(st.booleans()),
        memory=draw(MEMORY),
        norms=draw(norms),
    )


TRANSITIONS = st.builds(
    Transition,
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    outputs=st.integers(1, 6),
    norms=NORMS,
)

NETWORKS = st.builds(
    Network,
    shape=st.tuples(
        st.integers(1, 3), st.just(3), st.sampled_from([32, 33, 39]), st.sampled_from([32, 37])
    ),
    growth=st.integers(1, 5),
    config=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    init=st.integers(2, 7),
    bn_size=st.integers(1, 4),
    small_inputs=st.booleans(),
    bottleneck=st.booleans(),
    memory=MEMORY,
    norms=NORMS,
)
