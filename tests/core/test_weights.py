"""A block's weights as its operators take them, and their gradients as autograd takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_efficient import EfficientDenseBlock
from densenet_efficient.core import replay, weights
from densenet_efficient.core.dense_layer import empty_gradient
from densenet_efficient.core.specs import BlockSpec, LayerSpec, NormSpec
from densenet_efficient.ops import compiled

pytestmark = pytest.mark.quick

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def spec_of(layers: int, growth: int = 4, bottleneck: int = 16) -> BlockSpec:
    norm = NormSpec(1e-5)
    of_layers = (LayerSpec(8 + growth * n, growth, bottleneck, norm, norm) for n in range(layers))
    return BlockSpec(tuple(of_layers), compiled, layers)


def parameters_of(spec: BlockSpec, layout: torch.memory_format) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for layer in spec.layers:
        first = torch.randn(layer.bottleneck, layer.in_channels, 1, 1)
        inputs = layer.bottleneck or layer.in_channels
        last = torch.randn(layer.growth, inputs, 3, 3).to(memory_format=layout)  # type: ignore[call-overload]
        one, other = (first, last) if layer.bottleneck else (last, None)
        found += [None, None, one, None, None, None, other, None]
    return found


def made(
    spec: BlockSpec,
    parameters: list[Tensor | None],
    dtype: torch.dtype,
    shared: bool,
    **way: Any,
) -> Any:
    return list(weights.by_layer(spec, parameters, dtype, 2, shared, **way))


@pytest.fixture(params=[False, True], ids=["each", "shared"])
def shared(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_layouts(
    shared: bool, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, in groups of two layers and a rest."""
    spec = spec_of(5)
    one = weights.elements(spec.layers[-1], 2) * dtype.itemsize
    monkeypatch.setattr(weights, "GROUP_BYTES", 2 * one)
    parameters = parameters_of(spec, layout)
    found = made(spec, parameters, dtype, shared)
    again = made(spec, parameters, dtype, shared, backward=True)[::-1]
    for index, (pair, other) in enumerate(zip(found, again, strict=True)):
        for place, weight, same in zip((2, 6), pair, other, strict=True):
            expected = parameters[8 * index + place]
            assert expected is not None and weight.dtype == dtype
            assert torch.equal(weight, expected.to(dtype)) and torch.equal(weight, same)
            if dtype == torch.float32 and not (shared and place == 6):
                assert weight is expected
        packs = shared or layout is torch.channels_last
        assert pair[1].is_contiguous(memory_format=torch.channels_last) == packs
        assert pair[0].data_ptr() % 16 == 0 and pair[1].data_ptr() % 16 == 0


def test_groups_share_what_the_bound_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(7)
    assert weights.groups(spec, 2, torch.float32, False) == [range(n, n + 1) for n in range(7)]
    assert weights.groups(spec, 2, torch.float32, True) == [range(7)]
    assert weights.are_shared(torch.device("cuda"))
    assert not weights.are_shared(torch.device("cpu"))
    largest = weights.elements(spec.layers[-1], 2) * 4
    for bound, expected in ((0, [1] * 7), (2 * largest, [2, 2, 2, 1])):
        monkeypatch.setattr(weights, "GROUP_BYTES", bound)
        assert [len(g) for g in weights.groups(spec, 2, torch.float32, True)] == expected


@pytest.mark.parametrize("growth, bottleneck", [(4, 16), (4, 12), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_that_are_said_are_held(
    shared: bool, dtype: torch.dtype, growth: int, bottleneck: int
) -> None:
    spec = spec_of(3, growth, bottleneck)
    parameters = parameters_of(spec, torch.contiguous_format)
    given = {p.untyped_storage().data_ptr() for p in parameters if p is not None}
    groups = iter(made(spec, parameters, dtype, shared))
    for group in weights.groups(spec, 2, dtype, shared):
        storages = {}
        for _ in group:
            for weight in next(groups):
                if weight is not None:
                    storage = weight.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        held = sum(size for at, size in storages.items() if at not in given)
        said = list(weights.held_bytes(spec, 2, dtype, shared))
        assert said[group.start] <= held <= 1.1 * said[group.start]  # casts begin at a sector


def test_rows_that_are_no_whole_chunks_are_left_to_the_operator() -> None:
    spec = spec_of(2, bottleneck=12)
    found = made(spec, parameters_of(spec, torch.contiguous_format), torch.bfloat16, True)
    assert all(second.is_contiguous() for _, second in found)


def test_a_weight_with_gaps_becomes_dense(shared: bool) -> None:
    spec = spec_of(1)
    parameters = parameters_of(spec, torch.contiguous_format)
    wide = torch.randn(4, 32, 3, 3)[:, ::2]
    parameters[6] = wide
    ((_, found),) = made(spec, parameters, torch.float32, shared)
    assert weights.is_dense(found) and torch.equal(found, wide)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_shares_them_too(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit as where every layer has its own, though recorded without its device."""
    x = torch.randn(2, 8, 5, 5, dtype=dtype)

    def steps(memory: str) -> list[list[Tensor]]:
        torch.manual_seed(0)
        block = EfficientDenseBlock(3, 8, 4, 4, 0.0, memory=memory).to(memory_format=layout)  # type: ignore[call-overload]
        found = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                y = block(x)
            parameters = list(block.parameters())
            found.append([y, *torch.autograd.grad(y.float().square().sum(), parameters)])
        return found

    expected = steps("store")[0]
    monkeypatch.setattr(weights, "are_shared", lambda device: device.type == "cpu")
    together, prepared = [], weights._prepared

    def noted(spec: BlockSpec, layers: range, *rest: Any) -> list[Tensor | None]:
        together.append(len(layers))
        return prepared(spec, layers, *rest)

    monkeypatch.setattr(weights, "_prepared", noted)
    recorded = []
    record = replay.record
    monkeypatch.setattr(replay, "record", lambda *g: recorded.append(record(*g)) or recorded[-1])
    for memory in ("store", "recompute"):
        for found in steps(memory):
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other) and one.stride() == other.stride()
    assert len(recorded) == 4 and all(recorded)
    assert set(together) == {3}  # in the first call, and in the second, which is recorded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"bottleneck": False}, {"dilation": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_takes_gradients_as_they_are(
    layout: torch.memory_format, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """In the layout of their parameters; otherwise it copies each."""
    block = EfficientDenseBlock(2, 8, 2, 4, 0.0, **options).to(dtype=dtype, memory_format=layout)
    parameters = list(block.parameters())
    y = block(torch.randn(2, 8, 5, 5, dtype=dtype))
    for parameter, found in zip(parameters, torch.autograd.grad(y.sum(), parameters), strict=True):
        assert found.stride() == parameter.stride() and found.dtype == parameter.dtype


def test_gradients_of_parameters_with_gaps_are_contiguous() -> None:
    parameter = torch.randn(4, 12, 3, 3)[:, ::2]
    assert empty_gradient(parameter, torch.float32).is_contiguous()
