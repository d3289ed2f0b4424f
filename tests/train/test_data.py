"""Data sets: real files of each format where they are small, splits, and clear errors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from densenet_efficient.train.batches import held_out_batches, on_device, training_batches
from densenet_efficient.train.data import DataError, TensorImages, _open_image, load_data


def test_the_digits_are_split_once_and_evenly() -> None:
    data = load_data("digits", image_size=8, augment=False)
    assert (len(data.train), len(data.test)) == (1347, 450)
    held_out = {image.numpy().tobytes() for image, _ in data.test}
    assert not any(image.numpy().tobytes() in held_out for image, _ in data.train)
    counts = torch.bincount(torch.tensor([label for _, label in data.test]))
    assert len(counts) == 10 and counts.min() >= 43 and counts.max() <= 46
    pixels = torch.stack([image for image, _ in data.train])
    assert abs(float(pixels.mean())) < 1e-5 and abs(float(pixels.std()) - 1) < 1e-4


def test_digits_are_augmented_in_training_only() -> None:
    data = load_data("digits")
    assert data.train[0][0].shape == (1, 16, 16) == (data.channels, data.image_size, 16)
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.test[0][0], data.test[0][0])


def write_fashion_mnist(root: Path, count: int = 6) -> None:
    """The four files of Fashion-MNIST, in its idx format."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = bytes(range(256)) * 4 * count
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images[: count * 784])
        labels = struct.pack(">ii", 2049, count) + bytes(i % 10 for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("size", [None, 32])
def test_fashion_mnist_is_read_from_its_own_files(tmp_path: Path, size: int | None) -> None:
    write_fashion_mnist(tmp_path)
    data = load_data("fashion-mnist", root=tmp_path, image_size=size)
    image, label = data.test[3]
    assert image.shape == (1, size or 28, size or 28) and label == 3
    assert image.dtype == torch.float32 and data.num_classes == 10 and len(data.train) == 6


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"data {name}: expected its files, whole, in {tmp_path}"):
        load_data(name, root=tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    images = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:300])
    with pytest.raises(DataError, match="data fashion-mnist: expected its files, whole"):
        load_data("fashion-mnist", root=tmp_path)


def write_images(root: Path, classes: dict[str, list[str]]) -> None:
    for split, names in classes.items():
        for index, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for shade in (0, 200):
                colour = (shade, 40 * index, 10)
                Image.new("RGB", (50, 40), colour).save(folder / f"{shade}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = load_data("imagefolder", path=tmp_path, image_size=32)
    assert data.num_classes == 2 and len(data.train) == 4
    image, label = data.test[3]
    assert image.shape == (3, 32, 32) and label == 1
    # Red 200 and blue 10 of 255, normalised with ImageNet's statistics.
    expected = [(200 / 255 - 0.485) / 0.229, (10 / 255 - 0.406) / 0.225]
    assert image[[0, 2], 16, 16].tolist() == pytest.approx(expected, abs=1e-3)


def test_a_file_without_an_image_is_named_before_training(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": ["cat"], "val": ["cat"]})
    bad = tmp_path / "val" / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=r"val/cat/0\.png: expected an image"):
        load_data("imagefolder", path=tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path, {"train": ["cat"], "val": ["cat"]})
    bad = tmp_path / "val" / "cat" / "0.png"
    pixels = Image.frombytes("RGB", (50, 40), bytes(range(250)) * 24)
    pixels.save(bad)
    bad.write_bytes(bad.read_bytes()[:-100])
    data = load_data("imagefolder", path=tmp_path, image_size=32)
    batches = held_out_batches(data.test, 2, workers=workers, pin=False)
    message = r"\Adata imagefolder: .*val/cat/0\.png: expected an image, got: [^\n]*\Z"
    with pytest.raises(DataError, match=message):
        list(on_device(batches, torch.device("cpu"), torch.channels_last))


@pytest.mark.slow
def test_a_picture_of_20000_pixels_a_side_is_refused_before_training(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": ["cat"], "val": ["cat"]})
    Image.new("1", (20_000, 20_000)).save(tmp_path / "train" / "cat" / "huge.png")
    with pytest.raises(
        DataError, match=r"huge\.png: expected an image, got: Image size .400000000"
    ):
        load_data("imagefolder", path=tmp_path)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_greys_of_16_bits_keep_their_upper_8(tmp_path: Path, name: str) -> None:
    greys = numpy.arange(2000, 30000, 7, "uint16")[:3600].reshape(60, 60)
    Image.fromarray(greys).save(tmp_path / name)
    image = numpy.asarray(_open_image(str(tmp_path / name)))
    assert image.shape == (60, 60, 3)
    assert (image == (greys >> 8)[..., None]).all()


@pytest.mark.parametrize("values", [numpy.int32([[70_000]]), numpy.float32([[0.5]])])
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, values: Any) -> None:
    Image.fromarray(values).save(tmp_path / "grey.tif")
    with pytest.raises(DataError, match=r"grey\.tif: expected an image, got: (greys|floating)"):
        _open_image(str(tmp_path / "grey.tif"))


def test_a_limit_is_taken_evenly_over_the_classes(tmp_path: Path) -> None:
    write_images(tmp_path, {split: ["ant", "bee", "cat"] for split in ("train", "val")})
    data = load_data("imagefolder", path=tmp_path, image_size=32, limit=3)
    assert [label for _, label in data.train] == [0, 1, 2] and data.classes == ("ant", "bee", "cat")
    digits = load_data("digits", image_size=8, augment=False, limit=45)
    for part in (digits.train, digits.test):
        counts = torch.bincount(torch.tensor([label for _, label in part]))
        assert counts.tolist() == [5] * 5 + [4] * 5


@pytest.mark.parametrize(
    "classes, message",
    [
        ({"train": ["cat"]}, r"expected images in .*/val/CLASS/"),
        ({"val": ["cat"]}, r"expected images in .*/train/CLASS/"),
        ({"train": ["cat", "dog"], "val": ["cat"]}, r"got 2 and 1, differing in \['dog'\]"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, classes: Any, message: str) -> None:
    write_images(tmp_path, classes)
    with pytest.raises(DataError, match=message):
        load_data("imagefolder", path=tmp_path)


def test_synthetic_data_has_the_shape_asked_for() -> None:
    data = load_data("synthetic", image_size=24, limit=5, shape=(1, 7))
    image, label = data.train[4]
    assert image.shape == (1, 24, 24) and 0 <= label < 7 and len(data.train) == 5
    again = load_data("synthetic", image_size=24, limit=5, shape=(1, 7))
    assert torch.equal(image, again.train[4][0])


def test_the_order_follows_from_the_seed_alone() -> None:
    data = TensorImages(torch.arange(10.0).view(10, 1, 1, 1), torch.zeros(10))

    def order(seed: int, epoch: int = 0) -> list[float]:
        batches = training_batches(data, 4, seed=seed, epoch=epoch, workers=0, pin=False)
        return torch.cat([images.flatten() for images, _ in batches]).tolist()

    first = order(3)
    torch.rand(5)
    assert first == order(3) != order(4) and sorted(first) == list(range(10))
    assert first != order(3, epoch=1)


def test_a_last_batch_of_one_image_is_left_out_of_training() -> None:
    data = TensorImages(torch.zeros(9, 1, 1, 1), torch.zeros(9))
    train = training_batches(data, 4, seed=0, epoch=0, workers=0, pin=False)
    assert [len(labels) for _, labels in train] == [4, 4]
    test = held_out_batches(data, 4, workers=0, pin=False)
    assert [len(labels) for _, labels in test] == [4, 4, 1]
    nothing = TensorImages(torch.zeros(0, 1, 1, 1), torch.zeros(0))
    with pytest.raises(DataError, match="expected at least one image"):
        held_out_batches(nothing, 4, workers=0, pin=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "mnist"}, "data: expected one of digits"),
        ({"name": "digits", "image_size": 0}, "image_size: expected a positive integer, got 0"),
        ({"name": "digits", "limit": -1}, "limit: expected a positive integer, got -1"),
        ({"name": "imagefolder"}, "path: expected with data imagefolder only, got None"),
        ({"name": "digits", "path": "x"}, "path: expected with data imagefolder only, got 'x'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)
