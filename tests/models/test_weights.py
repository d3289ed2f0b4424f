"""Weights of other libraries: Keras' layout, MONAI's keys, files, and the command that converts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_efficient import EfficientDenseNet, load_weights
from densenet_efficient.cli.main import main
from densenet_efficient.models import densenet as models
from densenet_efficient.models import keras
from densenet_efficient.models.keras_weights import EPSILON, keras_state, load_keras_weights
from densenet_efficient.models.pretrained import fetch_weights, read_weights

SMALL: dict[str, Any] = {
    "growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 5,
}  # fmt: skip


def keras_arrays(slashes: bool = False) -> dict[str, Any]:
    """Arrays of a network of the size SMALL in Keras' layout, drawn at random."""
    arrays: dict[str, Any] = {}

    def add(layer: str, kind: str, *shape: int) -> None:
        value = torch.rand(shape) + 0.5 if kind == "moving_variance" else torch.randn(shape) * 0.3
        arrays[f"{layer}/{layer}/{kind}:0"] = value.numpy()

    def norm(layer: str, channels: int) -> None:
        for kind in ("gamma", "beta", "moving_mean", "moving_variance"):
            add(layer, kind, channels)

    stem = "conv1/" if slashes else "conv1_"
    add(stem + "conv", "kernel", 7, 7, 3, 8)
    norm(stem + "bn", 8)
    for block, first in ((2, 8), (3, 8)):
        for i in (1, 2):
            channels = first + 4 * (i - 1)
            norm(f"conv{block}_block{i}_0_bn", channels)
            add(f"conv{block}_block{i}_1_conv", "kernel", 1, 1, channels, 16)
            norm(f"conv{block}_block{i}_1_bn", 16)
            add(f"conv{block}_block{i}_2_conv", "kernel", 3, 3, 16, 4)
    norm("pool2_bn", 16)
    add("pool2_conv", "kernel", 1, 1, 16, 8)
    norm("bn", 16)
    last = "fc1000" if slashes else "predictions"
    add(last, "kernel", 16, 5)
    add(last, "bias", 5)
    return arrays


def keras_forward(arrays: dict[str, Any], x: Tensor) -> Tensor:
    """That network, written after Keras' definition."""

    def get(layer: str, kind: str) -> Tensor:
        return torch.from_numpy(arrays[f"{layer}/{layer}/{kind}:0"]).double()

    def norm_relu(x: Tensor, layer: str) -> Tensor:
        mean, var = get(layer, "moving_mean"), get(layer, "moving_variance")
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1.001e-5).sqrt()
        return (x * get(layer, "gamma")[:, None, None] + get(layer, "beta")[:, None, None]).relu()

    def conv(x: Tensor, layer: str, stride: int = 1) -> Tensor:
        kernel = get(layer, "kernel").permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    x = F.max_pool2d(F.pad(norm_relu(conv(x, "conv1_conv", 2), "conv1_bn"), [1] * 4), 3, 2)
    for block in (2, 3):
        for i in (1, 2):
            name = f"conv{block}_block{i}"
            new = conv(norm_relu(x, f"{name}_0_bn"), f"{name}_1_conv")
            x = torch.cat((x, conv(norm_relu(new, f"{name}_1_bn"), f"{name}_2_conv")), 1)
        if block == 2:
            x = F.avg_pool2d(conv(norm_relu(x, "pool2_bn"), "pool2_conv"), 2)
    pooled = norm_relu(x, "bn").mean((2, 3))
    return pooled @ get("predictions", "kernel") + get("predictions", "bias")


def test_keras_weights_give_keras_outputs() -> None:
    arrays = keras_arrays()
    model = load_keras_weights(EfficientDenseNet(**SMALL), arrays).double().eval()
    assert model.features.norm5.eps == EPSILON
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = keras_forward(arrays, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_older_keras_files_name_their_layers_otherwise() -> None:
    state = keras_state(keras_arrays(slashes=True))
    assert set(state) == set(keras_state(keras_arrays()))
    with pytest.raises(ValueError, match="weights: expected the layers conv1_conv"):
        keras_state({"dense/kernel:0": torch.zeros(2, 2)})


def test_keras_weights_that_do_not_fit_change_nothing() -> None:
    model = EfficientDenseNet(**SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arrays = keras_arrays()
    del arrays["pool2_conv/pool2_conv/kernel:0"]
    with pytest.raises(ValueError, match=r"missing features.transition1.conv.weight"):
        load_keras_weights(model, arrays)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.features.norm5.eps == 1e-5


class FakeFile:
    """What is used of an h5py.File."""

    def __init__(self, path: Any, mode: str) -> None:
        if b"h5" not in Path(path).read_bytes():
            raise OSError("file signature not found")

    def __enter__(self) -> FakeFile:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def visititems(self, visit: Any) -> None:
        torch.manual_seed(5)
        visit("a group", object())
        for name, array in keras_arrays().items():
            visit(name, array)


def test_h5_files_are_read_by_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.h5"
    path.write_bytes(b"h5")
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=FakeFile))
    load_weights(EfficientDenseNet(**SMALL), fetch_weights(path, "densenet121"))
    path.write_bytes(b"?")
    with pytest.raises(ValueError, match="expected an h5 file, got: file signature"):
        read_weights(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="reading h5 needs h5py"):
        keras.DenseNet121(weights=str(path))


def test_monais_keys_load() -> None:
    source = EfficientDenseNet(**SMALL)
    state = {}
    for key, value in source.state_dict().items():
        block, layer, rest = key.partition(".denselayer")
        if layer:
            number, _, part = rest.partition(".")
            key = f"{block}{layer}{number}.layers.{part}"
        state[key.replace("classifier", "class_layers.out")] = value
    model = load_weights(EfficientDenseNet(**SMALL), state)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_files_of_every_kind_and_what_cannot_be_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = EfficientDenseNet(**SMALL).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.ckpt"):
        load_weights(EfficientDenseNet(**SMALL), fetch_weights(str(tmp_path / name), "any"))
    with pytest.raises(ValueError, match="expected a file, got none"):
        fetch_weights("nowhere.pth", "densenet121")
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match="expected weights, got"):
            read_weights(tmp_path / name)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        read_weights(tmp_path / "list.pth")


def test_a_constructor_takes_a_file_and_another_number_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: SMALL[name] for name in ("growth_rate", "block_config", "num_init_features")}
    monkeypatch.setitem(models.CONFIGURATIONS, "densenet121", small)
    source = EfficientDenseNet(**SMALL)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    path = str(tmp_path / "w.pth")
    model = models.densenet121(weights=path, num_classes=3)
    assert model.classifier.out_features == 3
    assert torch.equal(model.features.conv0.weight, source.features.conv0.weight)
    maps = models.densenet121(weights=path, features_only=True)
    assert torch.equal(maps.features.conv0.weight, source.features.conv0.weight)
    monkeypatch.setattr(models, "fetch_weights", lambda weights, *_, **__: {"asked": weights})
    with (
        pytest.warns(DeprecationWarning, match="write weights='DEFAULT'"),
        pytest.raises(ValueError, match="unexpected asked"),
    ):
        models.densenet121(pretrained=True)
    with pytest.warns(DeprecationWarning, match="write weights=None"):
        models.densenet121(pretrained=False)
    with pytest.raises(ValueError, match="pretrained: expected without weights"):
        models.densenet121(pretrained=True, weights=path)


def test_convert_weights_writes_our_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models.densenet_cifar(40, 12, bottleneck=False, num_classes=3)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "theirs.pth")
    command = ["convert-weights", "--model", "densenet_40_12", str(tmp_path / "theirs.pth")]
    for name in ("ours.safetensors", "ours.pth"):
        assert main([*command, str(tmp_path / name)]) == 0
        assert "3 classes" in capsys.readouterr().out
        found = read_weights(tmp_path / name)
        assert sorted(found) == sorted(source.state_dict())
    for arguments, message in (
        ([str(tmp_path / "ours.pth")], "out: expected a new file"),
        ([str(tmp_path / "ours.h5")], "out: expected FILE.safetensors or FILE.pth"),
        ([str(tmp_path / "o.pth"), "--model", "densenet121"], "does not fit"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
