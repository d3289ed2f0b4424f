"""The options of train."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..nn.options import MEMORY_MODES
from ..ops.dtypes import AUTOCAST
from ..train.data import DATASETS
from ..train.recipes import PUBLISHED, SCHEDULES
from .parser import budget, count, network_options, number, whole_number

__all__ = ["AUTO", "OUT", "add_options", "recipe_values"]

OUT = Path("runs/run")
AUTO = "auto"
_AVERAGE = (
    "evaluate and save a moving average of the weights, which keeps this share of itself at each "
    "step; usual: 0.999"
)
# Recipe's fields that options replace.
_RECIPE_FIELDS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "momentum",
    "weight_decay",
    "schedule",
    "milestones",
    "warmup_epochs",
    "label_smoothing",
    "augment",
    "randaugment",
    "mixup",
    "cutmix",
    "accumulate",
    "clip_norm",
    "ema_decay",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups."""
    network_options(parser, None)
    _execution_options(parser.add_argument_group("execution"))
    _data_options(parser.add_argument_group("data"))
    _recipe_options(
        parser.add_argument_group("recipe", "each data set has its own; these replace its values")
    )
    _start_options(parser.add_argument_group("weights to start from"))
    _run_options(parser.add_argument_group("run"))


def recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    """The values of a `Recipe` that were given; None for the others."""
    values = {name: getattr(options, name) for name in _RECIPE_FIELDS}
    values["milestones"] = tuple(options.milestones) if options.milestones else None
    values["batch_size"] = None if options.batch_size == AUTO else options.batch_size
    return values


def _batch_size(text: str) -> int | str:
    """An option's type: a positive integer, or auto."""
    return AUTO if text == AUTO else count(text)


def _execution_options(group: Any) -> None:
    group.add_argument(
        "--memory", choices=MEMORY_MODES,
        help="keep the bottlenecks that the peak has room for, compute all again in backward, or "
        f"store all (default: {MEMORY_MODES[0]})",
    )  # fmt: skip
    group.add_argument(
        "--reference", action="store_true", help="the plain PyTorch reference instead of ours"
    )
    group.add_argument("--amp", choices=AUTOCAST, help="autocast to this dtype (default: fp32)")
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="such as cpu or cuda:0",
    )  # fmt: skip
    group.add_argument(
        "--contiguous", action="store_true", help="contiguous images instead of channels_last"
    )
    group.add_argument(
        "--workers", type=whole_number, default=0, metavar="N", help="processes that load data"
    )
    group.add_argument(
        "--budget", type=budget, default=budget("80%"), metavar="SIZE",
        help="of --batch-size auto: 12GB, 11.5GiB, or a share of the device's memory "
        "(default: 80%%)",
    )  # fmt: skip
    group.add_argument(
        "--sync-batch-norm", action="store_true",
        help="under torchrun: batch statistics over all processes",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=False,
        help="on a GPU: capture a step once and replay it, for small and deep networks",
    )  # fmt: skip
    group.add_argument(
        "--deterministic", action="store_true",
        help="PyTorch's deterministic algorithms, or an error where there is none",
    )  # fmt: skip


def _data_options(group: Any) -> None:
    group.add_argument(
        "--data", nargs="+", default=["digits"], metavar=("DATA", "PATH"),
        help=f"one of {', '.join(DATASETS)}; imagefolder PATH reads PATH/train/CLASS/* and "
        "PATH/val/CLASS/*",
    )  # fmt: skip
    group.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="folder of downloaded data sets",
    )
    group.add_argument("--download", action="store_true", help="fetch what is missing there")
    group.add_argument(
        "--image-size", type=count, metavar="PIXELS",
        help="pixels a side (default: the data set's; imagefolder 224, synthetic 32)",
    )  # fmt: skip
    group.add_argument(
        "--limit", type=count, metavar="N",
        help="use N images of each split, taken evenly over the classes",
    )  # fmt: skip


def _recipe_options(group: Any) -> None:
    group.add_argument(
        "--recipe", choices=PUBLISHED, metavar="NAME",
        help=f"a published recipe instead of the data set's: {', '.join(PUBLISHED)}",
    )  # fmt: skip
    group.add_argument("--epochs", type=count, metavar="N", help="passes over the training images")
    group.add_argument(
        "--batch", "--batch-size", dest="batch_size", type=_batch_size, metavar="N",
        help="images in a batch, of all processes together; auto: the largest that --budget holds, "
        "with the learning rate in proportion",
    )  # fmt: skip
    group.add_argument(
        "--accumulate", type=count, metavar="PARTS",
        help="compute a batch in so many parts and add their gradients up (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--lr", "--learning-rate", dest="learning_rate", type=number, metavar="RATE",
        help="the highest learning rate of the schedule",
    )  # fmt: skip
    group.add_argument("--momentum", type=number, metavar="M", help="Nesterov momentum of SGD")
    group.add_argument("--weight-decay", type=number, metavar="W", help="on every parameter")
    group.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate")
    group.add_argument(
        "--milestones", type=number, nargs="+", metavar="SHARE",
        help="step only: where the learning rate is divided by 10, as fractions of the epochs",
    )  # fmt: skip
    group.add_argument(
        "--warmup-epochs", type=number, metavar="N", help="length of the linear warm-up"
    )
    group.add_argument("--label-smoothing", type=number, metavar="S", help="of the training loss")
    group.add_argument(
        "--augment", action=argparse.BooleanOptionalAction,
        help="the data set's own augmentation of the training images",
    )  # fmt: skip
    for name, metavar, kind, text in (
        ("--randaugment", "MAGNITUDE", whole_number, "RandAugment after it, up to 30; usual: 9"),
        ("--mixup", "ALPHA", number, "MixUp, shares from Beta(ALPHA, ALPHA); usual: 0.2"),
        ("--cutmix", "ALPHA", number, "CutMix likewise; with both, one a batch; usual: 1"),
        ("--clip-norm", "NORM", number, "clip the norm of all gradients together; usual: 1"),
        ("--ema-decay", "SHARE", number, _AVERAGE),
    ):
        group.add_argument(name, type=kind, metavar=metavar, help=f"{text} (default: 0, without)")


def _start_options(group: Any) -> None:
    group.add_argument(
        "--weights", metavar="SOURCE",
        help="a file (safetensors, torch.save's, Keras' h5), a URL, hf-hub:OWNER/NAME or a "
        "torchvision entry such as IMAGENET1K_V1; a classifier of another size stays new",
    )  # fmt: skip
    group.add_argument(
        "--freeze", nargs="+", default=[], metavar="MODULE",
        help="modules that keep parameters and running statistics, such as features (default: "
        "none)",
    )  # fmt: skip
    group.add_argument(
        "--test-only", action="store_true",
        help="evaluate --weights, or the checkpoint of --resume, and write nothing",
    )  # fmt: skip


def _run_options(group: Any) -> None:
    group.add_argument(
        "--seed", type=whole_number, default=0, metavar="N",
        help="of weights, order and augmentation",
    )  # fmt: skip
    group.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"folder of the results (default: {OUT})"
    )
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="continue --out's checkpoint, or FILE, with its options; --epochs may extend it",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="start anew in a folder that holds a run"
    )
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's log")
    group.add_argument(
        "--profile", action="store_true",
        help="write what steps 3 to 5 do: trace.json for ui.perfetto.dev, profile.txt",
    )  # fmt: skip
    group.add_argument(
        "--memory-snapshot", action="store_true",
        help="on a GPU, write the allocator's history of 5 steps: memory.pickle for "
        "pytorch.org/memory_viz",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="print the result only")
