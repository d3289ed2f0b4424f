"""The data sets of the command line: loading, splits, normalisation.

torchvision's data sets and transforms do the work. The digits come with scikit-learn, so they need
no download. Whatever cannot be read ends in a `DataError` that names the file or folder.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..torchvision_compat import import_torchvision
from .augmentation import crops_and_flips, digit_distortions, random_crops

__all__ = ["DATASETS", "Data", "DataError", "TensorImages", "load_data"]

DATASETS = ("digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder", "synthetic")
# Mean and standard deviation per channel, of the training images scaled to 0..1.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_CLASSES = {"cifar10": 10, "cifar100": 100, "fashion-mnist": 10}
_FLOATS = ("digits", "synthetic")
_IMAGE_SIZES = {"digits": 16, "cifar10": 32, "cifar100": 32, "fashion-mnist": 28}


class DataError(RuntimeError):
    """Data that cannot be read, or that is not what was asked for."""


@dataclass(frozen=True)
class Data:
    """train, test: data sets of (image [channels, image_size, image_size] float32, class).
    classes: their names, in order."""

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    channels: int
    image_size: int
    classes: tuple[str, ...] = ()


class TensorImages(Dataset):
    """Images held in memory: images [n, C, H, W] float32, labels [n] int64, and a transform of one
    image [C, H, W] for each time it is drawn."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    @property
    def targets(self) -> list[int]:
        """The class of every image, as torchvision's data sets have it."""
        return [int(label) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, int(self.labels[index])


def load_data(
    name: str,
    *,
    root: str | os.PathLike[str] = "data",
    path: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    augment: bool = True,
    randaugment: int = 0,
    download: bool = False,
    limit: int | None = None,
    shape: tuple[int, int] = (3, 10),
) -> Data:
    """Open a data set.

    Args:
        name: one of `DATASETS`.
        root: folder of the data sets that torchvision keeps.
        path: for "imagefolder": a folder with `train/CLASS/*` and `val/CLASS/*`.
        image_size: pixels a side (None: the data set's own; 224 for "imagefolder", 32 for
            "synthetic").
        augment: random crops and flips (digits: small rotations, shifts and scalings).
        randaugment: magnitude of RandAugment on the training images; 0 for none. The images must
            have 8 bits: "digits" and "synthetic" do not.
        download: fetch what is missing in `root`.
        limit: use only so many images of each split, the first ones of every class in equal
            numbers; "synthetic" makes that many.
        shape: for "synthetic": channels and classes.

    Raises:
        ValueError: an option out of its range.
        DataError: missing or unreadable files.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    for option, value in (("image_size", image_size), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{option}: expected a positive integer, got {value!r}")
    if (path is not None) != (name == "imagefolder"):
        raise ValueError(f"path: expected with data imagefolder only, got {path!r} with {name}")
    if randaugment and name in _FLOATS:
        raise ValueError(
            f"randaugment: expected data of 8-bit images, such as cifar10 or imagefolder, got "
            f"{randaugment} with {name}"
        )
    size = image_size or _IMAGE_SIZES.get(name, 224 if name == "imagefolder" else 32)
    if name == "digits":
        data = _digits(size, augment)
    elif name == "synthetic":
        return _synthetic(size, limit or 1024, *shape)
    elif name == "imagefolder":
        data = _image_folder(Path(path or ""), size, augment, randaugment)
    else:
        changes = crops_and_flips(size, augment, randaugment)
        data = _torchvision(name, Path(root), size, changes, download)
    if limit is None:
        return data
    return dataclasses.replace(
        data, train=_evenly(data.train, limit), test=_evenly(data.test, limit)
    )


def _evenly(images: Dataset, count: int) -> Dataset:
    """The first of every class in turn, up to `count` images, in the data set's order."""
    seen: Counter[int] = Counter()
    places = []
    for index, label in enumerate(images.targets):  # type: ignore[attr-defined]
        places.append((seen[int(label)], int(label), index))
        seen[int(label)] += 1
    return Subset(images, sorted(index for _, _, index in sorted(places)[:count]))


def _digits(size: int, augment: bool) -> Data:
    """1797 handwritten digits, 8x8; a quarter of each class is held out (450 images)."""
    try:
        import numpy
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            f"data digits: expected an installed scikit-learn, which bundles them, got: {error}. "
            "Install it with `pip install 'densenet-efficient[train]'`."
        ) from error
    digits = load_digits()
    labels = torch.from_numpy(numpy.asarray(digits.target)).long()
    images = torch.from_numpy(numpy.asarray(digits.images)).float().unsqueeze(1) / 16
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(
            images, size=(size, size), mode="bilinear", align_corners=False
        )
    train, test = train_test_split(
        numpy.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels.numpy()
    )
    mean, std = images[train].mean(), images[train].std()
    background = float(-mean / std)
    images = (images - mean) / std
    transform = None
    if augment:
        transform = digit_distortions(background)
    return Data(
        "digits",
        TensorImages(images[train], labels[train], transform),
        TensorImages(images[test], labels[test]),
        10,
        1,
        size,
        tuple("0123456789"),
    )


def _synthetic(size: int, count: int, channels: int, classes: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, size, size, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    images_and_labels = TensorImages(images, labels)
    names = tuple(str(label) for label in range(classes))
    return Data("synthetic", images_and_labels, images_and_labels, classes, channels, size, names)


def _torchvision(name: str, root: Path, size: int, changes: list[Any], download: bool) -> Data:
    datasets = import_torchvision("torchvision.datasets")
    v2 = import_torchvision("torchvision.transforms.v2")
    classes = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fashion-mnist": datasets.FashionMNIST,
    }
    own = _IMAGE_SIZES[name]
    resize = [] if size == own else [v2.Resize(size)]
    common = _to_normalised(v2, name)
    parts = []
    for train in (True, False):
        steps = [*resize, *(changes if train else []), *common]
        try:
            parts.append(
                classes[name](root, train=train, transform=v2.Compose(steps), download=download)
            )
        except (RuntimeError, OSError, urllib.error.URLError, EOFError, ValueError) as error:
            hint = "" if download else "; --download fetches it where there is a network"
            raise DataError(
                f"data {name}: expected its files, whole, in {root.resolve()}, got: {error}{hint}"
            ) from error
    train, test = parts
    names = tuple(train.classes)
    return Data(name, train, test, _CLASSES[name], len(_STATISTICS[name][0]), size, names)


def _image_folder(path: Path, size: int, augment: bool, randaugment: int) -> Data:
    datasets = import_torchvision("torchvision.datasets")
    v2 = import_torchvision("torchvision.transforms.v2")
    common = _to_normalised(v2, "imagefolder")
    plain = [*random_crops(size, False, 0), *common]
    random = [*random_crops(size, augment, randaugment), *common]
    parts: list[Any] = []
    for split in ("train", "val"):
        steps = random if split == "train" else plain
        try:
            parts.append(datasets.ImageFolder(path / split, v2.Compose(steps), loader=_open_image))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"data imagefolder: expected images in {path / split}/CLASS/, got: {error}"
            ) from error
    train, test = parts
    if train.classes != test.classes:
        raise DataError(
            f"data imagefolder: expected the same classes in train and val, got "
            f"{len(train.classes)} and {len(test.classes)}, differing in "
            f"{sorted(set(train.classes) ^ set(test.classes))[:5]}"
        )
    _check_headers(path for path, _ in (*train.samples, *test.samples))
    return Data("imagefolder", train, test, len(train.classes), 3, size, tuple(train.classes))


def _check_headers(paths: Iterable[str]) -> None:
    """Open every image without decoding it: what is no image is named before any training."""

    def check(path: str) -> None:
        with _opened(path):
            pass

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(check, paths):
            pass


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file as a PIL image. Raises DataError also for what the caller reads from it."""
    from PIL import Image

    try:
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    # A damaged file raises any of the first three.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"data imagefolder: {path}: expected an image, got: {error}") from error


def _open_image(path: str) -> Any:
    """The image in RGB, 8 bits a channel. Greys of 16 bits keep their upper 8."""
    with _opened(path) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range is not known")
        if not image.mode.startswith("I"):
            return image.convert("RGB")
        greys = image.convert("I")
        lowest, highest = greys.getextrema()
        if lowest < 0 or highest > 65535:
            raise ValueError(f"greys of {lowest}..{highest}, where 0..65535 can be read")
        return greys.point(lambda grey: grey * (1 / 256)).convert("L").convert("RGB")


def _to_normalised(v2: Any, name: str) -> list[Any]:
    mean, std = _STATISTICS[name]
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
