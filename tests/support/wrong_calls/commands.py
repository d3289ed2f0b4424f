"""Wrong command lines, and wrong options of a training run from Python."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from densenet_efficient.cli.main import main
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.train.data import DataError, load_data
from densenet_efficient.train.options import TrainingOptions
from densenet_efficient.train.recipes import Recipe, recipe_for

from .use import WrongUse, options

CIFAR = "train --model densenet_cifar --depth 10 --growth-rate 4 --epochs 1 --limit 20"

# Command lines, and what they answer; each ends with status 2 and one line.
COMMANDS: list[tuple[str, str]] = [
    ("", "the following arguments are required: COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("info --everything", "unrecognized arguments: --everything"),
    ("plan --model resnet50", "--model: invalid choice: 'resnet50'"),
    ("plan --batch 0", "--batch.*expected a positive integer, got 0"),
    ("plan --batch many", "--batch.*expected a positive integer, got many"),
    ("plan --batch", "--batch.*expected one argument"),
    ("plan --image-size -3", "--image-size.*expected"),
    ("plan --image-size 4", "image_size: expected at least 29 pixels a side.*got 4"),
    ("plan --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("plan --memory least", "--memory: invalid choice: 'least'"),
    ("plan --device mps", "device: expected cpu or a CUDA device, got 'mps'"),
    ("plan --device toaster", "device: expected such as cpu or cuda:0, got 'toaster'"),
    ("plan --device cuda:99", "device: expected.*got 'cuda:99'"),
    ("plan --budget much", "--budget.*much"),
    ("plan --budget 0GB", "--budget.*0GB"),
    ("plan --budget -1GB", "--budget"),
    ("plan --budget 120%", "--budget: expected at most 100% of the device's memory, got 120%"),
    ("plan --budget-gb x", "--budget-gb.*x"),
    (
        "plan --budget-gb nan",
        "--budget-gb: expected a size such as 12GB, 11.5GiB, 80% or a number of bytes, got nan",
    ),
    ("plan --depth 40", "depth: expected only with model densenet_cifar, got 40"),
    ("plan --growth-rate 12", "growth_rate: expected only with model densenet_cifar, got 12"),
    ("plan --model densenet_cifar --depth 41", r"depth must be 6 \* N \+ 4"),
    ("plan --model densenet_cifar --compression 2", "compression.*2"),
    ("plan --drop-rate 2", "drop_rate must be a probability between 0 and 1, got 2"),
    ("plan --drop-rate nan", "--drop-rate.*expected a number, got nan"),
    ("summary --classes 0", "--classes.*expected a positive integer, got 0"),
    ("summary --classes many", "--classes: expected a positive integer, got many"),
    ("summary --depth 40", "depth: expected only with model densenet_cifar"),
    ("summary --image-size 8", "input must be at least 29 pixels"),
    ("summary --figure", "--figure.*expected one argument"),
    ("explain --device nowhere", "device: expected"),
    ("explain --batch -1", "--batch.*got -1"),
    ("bench --rounds 0", "--rounds.*expected a positive integer, got 0"),
    ("bench --peers nobody --batch 1 --image-size 32", "peers: expected some of eager.*nobody"),
    ("bench --dtype fp8", "--dtype: invalid choice: 'fp8'"),
    ("demo --epochs 0", "--epochs.*expected a positive integer, got 0"),
    ("demo --seed -1", "--seed.*expected an integer of at least 0, got -1"),
    ("convert-weights", "required"),
    ("convert-weights nowhere.pth out.pth", "expected a file, got none at nowhere.pth"),
    ("convert-weights a b c", "unrecognized arguments: c"),
    ("convert-weights nowhere.pth out.pth --model resnet", "--model: invalid choice: 'resnet'"),
    ("train --data mnist", "data: expected one of digits.*mnist"),
    ("train --data imagefolder", "imagefolder and its PATH, got 'imagefolder'"),
    ("train --data digits here", "imagefolder and its PATH, got 'digits here'"),
    ("train --data imagefolder nowhere", "nowhere"),
    ("train --data cifar10 --data-root nowhere", "data cifar10: expected its files.*nowhere"),
    (
        "train --data synthetic --image-size 224 --limit 1 --batch 100000 --device cpu",
        "batch_size: expected one whose step fits into",
    ),
    ("train --epochs 0", "--epochs: expected a positive integer, got 0"),
    ("train --depth 41", r"depth must be 6 \* N \+ 4"),
    ("train --growth-rate 0", "--growth-rate: expected a positive integer, got 0"),
    ("train --drop-rate 2", "drop_rate must be a probability"),
    (f"{CIFAR} --memory least", "--memory: invalid choice: 'least'"),
    (f"{CIFAR} --reference --memory store", "memory: expected without --reference"),
    (f"{CIFAR} --amp fp8", "--amp: invalid choice: 'fp8'"),
    (f"{CIFAR} --device mps", "device: expected cpu or a CUDA device, got 'mps'"),
    (f"{CIFAR} --device cuda:77", "device: expected one of"),
    (f"{CIFAR} --workers -1", "--workers.*got -1"),
    (f"{CIFAR} --seed x", "--seed.*got x"),
    (f"{CIFAR} --batch 0", "--batch-size: expected a positive integer, got 0"),
    (f"{CIFAR} --batch some", "--batch-size: expected a positive integer, got some"),
    (f"{CIFAR} --batch auto --reference", "batch_size: expected a number with --reference"),
    (f"{CIFAR} --batch auto --budget 1kB", "budget: expected one that holds a step with one image"),
    (
        f"{CIFAR} --batch auto --budget 200kB --accumulate 4",
        "budget: expected one that holds a step with two images in each part, got 200kB",
    ),
    (f"{CIFAR} --budget 101%", "--budget: expected at most 100% of the device's memory, got 101%"),
    (f"{CIFAR} --accumulate 100", r"accumulate: expected at most batch_size \(64\), got 100"),
    (f"{CIFAR} --clip-norm -1", r"clip_norm: expected a finite number >= 0, got -1\.0"),
    (f"{CIFAR} --ema-decay 1", r"ema_decay: expected a number in \[0, 1\), got 1\.0"),
    (f"{CIFAR} --mixup much", "--mixup: expected a number, got much"),
    (f"{CIFAR} --randaugment 9", "randaugment: expected data of 8-bit images"),
    (
        f"{CIFAR} --randaugment 99 --data cifar10",
        r"randaugment: expected an integer in 0\.\.30, got 99",
    ),
    (f"{CIFAR} --profile", "profile: expected at least 5 steps an epoch, got 1"),
    (f"{CIFAR} --memory-snapshot", "memory_snapshot: expected at least 5 steps an epoch, got 1"),
    (
        f"{CIFAR} --memory-snapshot --batch 2 --device cpu",
        "memory_snapshot: expected a CUDA device.*got cpu",
    ),
    (
        f"{CIFAR} --sync-batch-norm",
        r"sync_batch_norm: expected several processes \(torchrun\), got one",
    ),
    (f"{CIFAR} --test-only", "test_only: expected with --weights or --resume, got neither"),
    (f"{CIFAR} --lr 0", "learning_rate: expected a number > 0, got 0"),
    (f"{CIFAR} --lr fast", "--lr.*expected a number, got fast"),
    (f"{CIFAR} --momentum 1", r"momentum: expected a number in \[0, 1\), got 1"),
    (f"{CIFAR} --weight-decay -1", "weight_decay: expected a finite number >= 0, got -1"),
    (f"{CIFAR} --schedule often", "--schedule: invalid choice: 'often'"),
    (f"{CIFAR} --milestones 0.9 0.1", r"milestones: expected rising fractions in \(0, 1\)"),
    (f"{CIFAR} --warmup-epochs 5", r"warmup_epochs: expected less than epochs \(1\), got 5"),
    (f"{CIFAR} --label-smoothing 1", "label_smoothing: expected"),
    (f"{CIFAR} --recipe best", "--recipe: invalid choice: 'best'"),
    (f"{CIFAR} --resume nowhere.pt", "checkpoint nowhere.pt: expected a file"),
    (f"{CIFAR} --weights nowhere.pth", "weights: expected a file, got none at nowhere.pth"),
    (f"{CIFAR} --freeze head", "freeze: expected names of modules such as features.*got 'head'"),
    (f"{CIFAR} --image-size 2", "image_size: expected at least 4 pixels"),
]


def _command(line: str) -> None:
    """The command line; what it prints as an error is raised. Its process, and with it torch's
    random state, ends where it does."""
    said, random = io.StringIO(), torch.random.fork_rng(devices=[])
    with random, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(line.split())
    if status != 2:
        raise AssertionError(f"status {status}: {said.getvalue()}")
    if "Traceback" in said.getvalue() or said.getvalue().count("\n") != 1:
        raise AssertionError(f"more than one line: {said.getvalue()}")
    raise ValueError(said.getvalue())


RECIPE: dict[str, tuple[Any, ...]] = {
    "epochs": (0, -1, 1.5, True, "3", None),
    "batch_size": (0, 2.5, None),
    "learning_rate": (0, -0.1, math.nan, "0.1"),
    "momentum": (1, -0.1, None),
    "weight_decay": (-1, math.inf),
    "schedule": ("often", None),
    "milestones": ((0.5, 0.5), (0, 0.5), (0.9, 0.2), ("half",)),
    "warmup_epochs": (-1, 300),
    "label_smoothing": (1, math.nan),
    "augment": (1, None),
}
NETWORK: dict[str, tuple[Any, ...]] = {"name": ("resnet50", None)}


def _training(**changes: Any) -> TrainingOptions:
    given: dict[str, Any] = {"network": NetworkSpec(), "recipe": Recipe(), "out": Path("run")}
    return TrainingOptions(**given | changes)


def uses() -> Iterator[WrongUse]:
    """Command lines, recipes, networks, training options and data."""
    for line, message in COMMANDS:
        yield WrongUse(
            "command line", line, functools.partial(_command, line), ValueError, f"(?s){message}"
        )  # fmt: skip
    yield from options("training", "Recipe", Recipe, {}, RECIPE)
    yield from options("training", "TrainingOptions", _training, {}, {
        "amp": ("fp8", 16), "seed": (-1, 1.5, True), "workers": (-1, "2"), "device": ("mps", "x"),
    })  # fmt: skip
    for name in ("resnet50", "", None):
        yield WrongUse(
            "training", f"NetworkSpec({name!r})", functools.partial(NetworkSpec, name), ValueError,
            "model: expected one of densenet121",
        )  # fmt: skip
    for option, value in (("depth", 40), ("growth_rate", 12), ("bottleneck", False)):
        yield WrongUse(
            "training", f"NetworkSpec(densenet121, {option}={value})",
            functools.partial(NetworkSpec, **{option: value}), ValueError,
            f"{option}: expected only with model densenet_cifar",
        )  # fmt: skip
    for execution in ("fast", None):
        yield WrongUse(
            "training", f"NetworkSpec().build({execution!r})",
            functools.partial(NetworkSpec().build, execution), ValueError,
            "execution: expected one of",
        )  # fmt: skip
    yield WrongUse(
        "training", "recipe_for('nothing')", lambda: recipe_for("nothing"), ValueError, "nothing"
    )
    for what, given, error, message in (
        ("another name", {"name": "mnist"}, ValueError, "data: expected one of.*mnist"),
        ("no folder", {"name": "imagefolder", "path": "nowhere"}, DataError, "nowhere"),
        ("no path", {"name": "imagefolder"}, ValueError, "path"),
        ("limit 0", {"name": "digits", "limit": 0}, ValueError, "limit"),
        ("image size 0", {"name": "digits", "image_size": 0}, ValueError, "image_size"),
        ("not downloaded", {"name": "cifar10", "root": "nowhere"}, DataError, "nowhere|download"),
    ):  # fmt: skip
        yield WrongUse(
            "training", f"load_data: {what}", functools.partial(load_data, **given),  # type: ignore[arg-type]
            error, message,
        )  # fmt: skip


USES = [*uses()]
