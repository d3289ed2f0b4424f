"""Output strides, end points and dropout after every convolution, next to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientDenseNet, densenet121, explain, plan, reference

SMALL: dict[str, Any] = {
    "growth_rate": 4, "block_config": (2, 2, 2, 2), "num_init_features": 8, "num_classes": 5,
}  # fmt: skip


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """End points, gradients and buffers of one training step."""
    x = x.clone().requires_grad_()
    points = model.forward_end_points(x)  # type: ignore[operator]
    loss = sum((y * torch.arange(y.numel()).view_as(y).sin()).sum() for y in points.values())
    loss.backward()  # type: ignore[union-attr]
    found = {name: y.detach() for name, y in points.items()}
    found["input"] = x.grad
    found |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return found | {name: b.double() for name, b in model.named_buffers()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_stride": 8},
        {"output_stride": 16, "initial_output_stride": 2},
        {"initial_output_stride": 2, "output_stride": 2},
        {"bias": True, "bottleneck": False, "eps": 1e-3},
        {"drop_rate": 1.0, "drop_everywhere": True},
        {"drop_rate": 1.0, "drop_everywhere": True, "output_stride": 16},
        {"small_inputs": True, "output_stride": 2},
        {"global_pool": False},
    ],
    ids=str,
)
def test_options_agree_with_the_reference(options: dict[str, Any]) -> None:
    ours = EfficientDenseNet(**{**SMALL, **options}).double()
    theirs = reference.DenseNet(**{**SMALL, **options}).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    found, expected = step(ours, x), step(theirs, x)
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) < 1e-12 * scale, name
    kinds = {chosen.kind for name, chosen in explain(ours, x).entries if name != "features.stem"}
    assert kinds == {"kernels"}


@pytest.mark.parametrize("initial", [2, 4])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_output_strides_at_224_pixels(initial: int, stride: int) -> None:
    options = {"output_stride": stride, "initial_output_stride": initial, "global_pool": False}
    with torch.device("meta"):
        if (initial, stride) == (2, 32):
            with pytest.raises(ValueError, match=r"output_stride must be one of 2, 4, 8, 16 for"):
                densenet121(**options)
            return
        model = densenet121(**options)
        logits = model(torch.empty(1, 3, 224, 224))
    assert logits.shape == (1, 1000, 224 // stride, 224 // stride)
    assert sum(p.numel() for p in model.parameters()) == 7_978_856
    dilations = {
        m.dilation[0] for m in model.features.denseblock4.modules() if hasattr(m, "dilation")
    }
    assert max(dilations) == 32 // stride // (4 // initial)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 64}, "output_stride must be one of 4, 8, 16, 32 for 4 blocks"),
        ({"output_stride": 12}, "after a stem of stride 4, got 12"),
        ({"output_stride": True}, "got True"),
        ({"initial_output_stride": 8}, "initial_output_stride must be 2 or 4, got 8"),
        ({"initial_output_stride": 2, "small_inputs": True}, "must be 1 with small_inputs, got 2"),
        ({"output_stride": 16, "small_inputs": True}, "output_stride must be one of 1, 2, 4, 8"),
    ],
)
def test_unreachable_strides_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientDenseNet(**{**SMALL, **options})


def test_stride_options_change_the_smallest_image() -> None:
    for options in ({}, {"output_stride": 8}, {"initial_output_stride": 2}, {"output_stride": 4}):
        model = EfficientDenseNet(**SMALL, **options).eval()
        least = model.min_input_size
        assert model(torch.randn(1, 3, least, least)).shape == (1, 5)
        with pytest.raises(ValueError, match="at least"):
            model(torch.randn(1, 3, least - 1, least))


def test_features_only_gives_a_map_for_each_resolution() -> None:
    model = EfficientDenseNet(**SMALL, features_only=True)
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in model.feature_info]
    assert [64 // m.shape[2] for m in maps] == [2, 4, 8, 16, 32]
    assert [entry["reduction"] for entry in model.feature_info] == [2, 4, 8, 16, 32]
    assert not any("classifier" in key for key in model.state_dict())
    dilated = EfficientDenseNet(**SMALL, features_only=True, output_stride=8)
    assert [64 // m.shape[2] for m in dilated(torch.randn(2, 3, 64, 64))] == [2, 4, 8]


def test_end_points_are_named_and_unknown_ones_refused() -> None:
    model = EfficientDenseNet(**SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    points = model.forward_end_points(x)
    assert torch.equal(points["logits"], model(x))
    torch.testing.assert_close(points["predictions"].sum(1), torch.ones(2))
    assert list(model.forward_end_points(x, ["denseblock2"])) == ["denseblock2"]
    with pytest.raises(
        ValueError, match=r"names: expected some of relu0, stem, denseblock1.*norm7"
    ):
        model.forward_end_points(x, ["norm7"])


def test_logits_keep_their_place_without_spatial_squeeze() -> None:
    model = EfficientDenseNet(**SMALL, spatial_squeeze=False)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5, 1, 1)


def test_dropout_follows_every_convolution_but_the_first() -> None:
    torch.manual_seed(0)
    model = EfficientDenseNet(**SMALL, drop_rate=0.5, drop_everywhere=True)
    layer = model.features.denseblock1.denselayer1
    assert (layer.bottleneck_drop_rate, layer.drop_rate) == (0.5, 0.5)
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(drops) == 3
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    transition = EfficientDenseNet(
        **SMALL, drop_rate=0.3, drop_everywhere=True
    ).features.transition1
    plain = nn.Sequential(*transition.children())
    y = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = plain(y.clone())
    torch.manual_seed(1)
    torch.testing.assert_close(transition(y), expected)


def test_the_plan_follows_the_options() -> None:
    shape = (4, 3, 64, 64)
    kept = {}
    for name, options in {
        "plain": {},
        "dilated": {"output_stride": 8},
        "wide": {"initial_output_stride": 2},
        "dropping": {"drop_rate": 0.2, "drop_everywhere": True},
    }.items():
        model = EfficientDenseNet(**SMALL, **options, memory="recompute")
        kept[name] = plan(model, shape).kept_bytes
    assert all(kept[name] > kept["plain"] for name in ("dilated", "wide", "dropping"))
