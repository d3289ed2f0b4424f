"""The efficient models: construction and options here, agreement with torchvision in
test_exactness.py."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from densenet_efficient import reference
from densenet_efficient.models import densenet as models
from densenet_efficient.models.pretrained import fetch_weights, load_weights
from tests.support.peer import Weights, WeightsEnum, torchvision

SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}


def count_parameters(build: Any, *args: Any, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(*args, **options).parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("densenet121", 7_978_856),
        ("densenet169", 14_149_480),
        ("densenet201", 20_013_928),
        ("densenet161", 28_681_000),
        ("densenet264", 33_337_704),
        ("densenet264_k48", 72_686_632),
    ],
)
def test_imagenet_parameter_counts(name: str, expected: int) -> None:
    assert count_parameters(getattr(models, name)) == expected


@pytest.mark.parametrize(
    ("depth", "growth_rate", "bottleneck", "expected"),
    [
        (40, 12, False, 1_019_722),
        (100, 12, False, 6_979_642),
        (100, 24, False, 27_249_082),
        (100, 12, True, 769_162),
        (250, 24, True, 15_324_406),
        (190, 40, True, 25_624_430),
    ],
)
def test_cifar_parameter_counts(
    depth: int, growth_rate: int, bottleneck: bool, expected: int
) -> None:
    actual = count_parameters(models.densenet_cifar, depth, growth_rate, bottleneck)
    assert actual == expected


def test_tree_and_initial_weights_are_torchvisions() -> None:
    torch.manual_seed(1)
    ours = models.EfficientDenseNet(**SMALL, num_classes=5)
    torch.manual_seed(1)
    theirs = torchvision.models.DenseNet(**SMALL, num_classes=5)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("size", [32, 33, 45])
def test_any_input_of_32_pixels_and_more(size: int) -> None:
    model = models.EfficientDenseNet(4, (1, 1, 1, 1), 8, num_classes=5)
    assert model(torch.randn(3, 3, size, size + 2)).shape == (3, 5)


def test_too_small_or_misshapen_input_is_refused() -> None:
    model = models.EfficientDenseNet(4, (1, 1, 1, 1), 8, num_classes=5)
    with pytest.raises(ValueError, match="at least 29 pixels"):
        model(torch.randn(2, 3, 28, 40))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        model(torch.randn(3, 32, 32))


@pytest.mark.parametrize("num_classes", [None, 0])
def test_without_classes_features_come_out(num_classes: int | None) -> None:
    model = models.EfficientDenseNet(**SMALL, num_classes=num_classes).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.forward_features(x)
    assert model.num_features == maps.shape[1]
    torch.testing.assert_close(model(x), maps.mean((2, 3)))
    assert not any(key.startswith("classifier") for key in model.state_dict())


def test_logits_at_every_place_without_global_pooling() -> None:
    pooled = models.EfficientDenseNet(**SMALL, num_classes=5).eval()
    dense = models.EfficientDenseNet(**SMALL, num_classes=5, global_pool=False).eval()
    dense.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 3, 32, 40)
    assert dense(x).shape == (2, 5, 4, 5)
    torch.testing.assert_close(dense(x).mean((2, 3)), pooled(x))
    features = models.EfficientDenseNet(**SMALL, num_classes=0, global_pool=False)
    assert features(x).shape == (2, features.num_features, 4, 5)


def test_reset_classifier_keeps_dtype_and_mode() -> None:
    model = models.EfficientDenseNet(**SMALL, num_classes=5).double().eval()
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 32, 32).double()).shape == (2, 3)
    assert not model.classifier.training and model.num_classes == 3
    model.reset_classifier(None)
    assert isinstance(model.classifier, nn.Identity)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("growth_rate", 0),
        ("growth_rate", 12.0),
        ("growth_rate", True),
        ("block_config", ()),
        ("block_config", (2, 0)),
        ("block_config", 4),
        ("num_init_features", -1),
        ("bn_size", 0),
        ("drop_rate", -0.1),
        ("drop_rate", 1.1),
        ("drop_rate", float("nan")),
        ("drop_rate", "half"),
        ("num_classes", -2),
        ("compression", 0.0),
        ("compression", 1.5),
        ("compression", float("inf")),
        ("in_channels", 0),
        ("init_mode", "fan_both"),
        ("memory", "forget"),
    ],
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option}(\[1\])? must be"):
        models.EfficientDenseNet(**{**SMALL, option: value})


@pytest.mark.parametrize(("depth", "bottleneck"), [(41, False), (102, True), (4, True), (0, False)])
def test_cifar_depth_must_give_whole_blocks(depth: int, bottleneck: bool) -> None:
    with pytest.raises(ValueError, match=r"^depth must be"):
        models.densenet_cifar(depth, 12, bottleneck)


def test_cifar_networks_start_and_compress_as_in_the_paper() -> None:
    plain = models.densenet_cifar(10, 12, bottleneck=False)
    assert plain.features.conv0.weight.shape == (16, 3, 3, 3)
    assert plain.features.transition1.conv.weight.shape[0] == 16 + 2 * 12
    bc = models.densenet_cifar(16, 12)
    assert bc.features.conv0.weight.shape == (24, 3, 3, 3)
    assert bc.features.transition1.conv.weight.shape[0] == (24 + 2 * 12) // 2
    assert plain(torch.randn(2, 3, 32, 32)).shape == bc(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_models_can_be_traced_and_exported(how: str) -> None:
    model = models.EfficientDenseNet(**SMALL, num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    if how == "trace":
        other: Any = torch.jit.trace(model, torch.randn(2, 3, 32, 32))
    else:
        other = torch.export.export(model, (torch.randn(2, 3, 32, 32),)).module()
    torch.testing.assert_close(other(x), model(x))


# Weights made elsewhere


def old_keys(state: dict[str, Any]) -> dict[str, Any]:
    """As torchvision before 0.4 wrote them."""
    renamed = {}
    for key, value in state.items():
        for part in ("norm", "conv"):
            for index in "12":
                if "denselayer" in key:
                    key = key.replace(f".{part}{index}.", f".{part}.{index}.")
        if not key.endswith("num_batches_tracked"):
            renamed[key] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "module.", "densenet121.", "backbone.0."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_foreign_state_dicts_load(prefix: str, container: str | None) -> None:
    source = torchvision.models.DenseNet(**SMALL, num_classes=5)
    state: dict[str, Any] = {prefix + k: v for k, v in old_keys(source.state_dict()).items()}
    if container:
        state = {container: state, "epoch": 3}
    model = load_weights(models.EfficientDenseNet(**SMALL, num_classes=5), state)
    for name, value in source.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    model = models.EfficientDenseNet(**SMALL, num_classes=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = reference.DenseNet(**{**SMALL, "growth_rate": 6}, num_classes=5).state_dict()
    lacking = {k: v for k, v in before.items() if "conv0" not in k}
    classes = reference.DenseNet(**SMALL, num_classes=7).state_dict()
    for state, message in (
        (other, "wrong features.denseblock1.denselayer1"),
        (lacking, "missing features.conv0.weight"),
        ({**before, "extra": torch.zeros(1)}, "unexpected extra"),
        (classes, "wrong classifier.weight: expected shape"),
        ({"some": torch.zeros(1)}, "missing"),
        ({**before, "classifier.bias": 3}, "got int"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    load_weights(model, classes, strict=False)
    assert torch.equal(model.features.conv0.weight, classes["features.conv0.weight"])
    assert torch.equal(model.classifier.weight, before["classifier.weight"])


def saved(state: dict[str, Any], folder: Path) -> str:
    """The URL of a file named as torch.hub's are, with the beginning of its hash."""
    path = folder / "weights.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(folder / f"small-{digest}.pth").as_uri()


def test_weights_entries_and_urls_are_fetched_with_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    source = torchvision.models.DenseNet(**SMALL, num_classes=5)
    url = saved(old_keys(source.state_dict()), tmp_path)

    class SmallWeights(WeightsEnum):
        V1 = Weights(url=url, transforms=lambda x: x, meta={})

    for entry in (SmallWeights.V1, url):
        state = fetch_weights(entry, "densenet121", progress=False)
        model = load_weights(models.EfficientDenseNet(**SMALL, num_classes=5), state)
        assert torch.equal(model.features.conv0.weight, source.features.conv0.weight)
    forged = url.replace("small-", "other-")
    Path(forged.removeprefix("file://")).write_bytes(b"not these weights")
    with pytest.raises(RuntimeError, match="hash"):
        fetch_weights(forged, "densenet121", progress=False)


def test_unknown_weights_are_named() -> None:
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        models.densenet121(weights="IMAGENET22K")
    with pytest.raises(ValueError, match="densenet999"):
        fetch_weights("DEFAULT", "densenet999")
    with pytest.raises(ValueError, match="got 3"):
        fetch_weights(3, "densenet121")
