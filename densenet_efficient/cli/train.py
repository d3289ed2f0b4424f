"""train: a network on a data set, by the papers' recipes; logs, checkpoint and weights."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from ..models.networks import CIFAR
from ..nn.options import MEMORY_MODES
from ..train.checkpoint import CheckpointError, read_checkpoint
from ..train.data import DATASETS, Data, load_data
from ..train.recipes import PUBLISHED, SCHEDULES, Recipe, recipe_for
from ..train.trainer import AMP, CHECKPOINT, Trainer, TrainingOptions
from .parser import (
    Parser,
    add_command,
    count,
    is_small,
    network_from,
    network_options,
    number,
    whole_number,
)

__all__ = ["register"]

OUT = Path("runs/run")
# Recipe's fields that options replace.
RECIPE_OPTIONS = (
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
)


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "train", "train a network; logs, checkpoint and weights go into --out"
    )
    parser.set_defaults(run=functools.partial(_run, parser))
    network_options(parser, None)
    _execution_options(parser.add_argument_group("execution"))
    _data_options(parser.add_argument_group("data"))
    _recipe_options(
        parser.add_argument_group("recipe", "each data set has its own; these replace its values")
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        metavar="N",
        help="of weights, order and augmentation",
    )
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
    group.add_argument("--quiet", action="store_true", help="print the result only")


def _execution_options(group: Any) -> None:
    group.add_argument(
        "--memory", choices=MEMORY_MODES,
        help=f"compute bottlenecks again in backward, or store them (default: {MEMORY_MODES[0]})",
    )  # fmt: skip
    group.add_argument(
        "--reference", action="store_true", help="the plain PyTorch reference instead of ours"
    )
    group.add_argument("--amp", choices=AMP, help="autocast to this dtype (default: fp32)")
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
        "--batch",
        "--batch-size",
        dest="batch_size",
        type=count,
        metavar="N",
        help="images in a batch",
    )
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


def _run(parser: Parser, options: argparse.Namespace, words: list[str]) -> int:
    recipe = None
    if options.resume is not None:
        options, recipe, words = _resumed(parser, options, words)
    out = options.out or OUT
    if options.reference and options.memory:
        raise ValueError(f"memory: expected without --reference, got {options.memory!r} with it")
    name, *rest = options.data
    if len(rest) > 1 or (name == "imagefolder") != bool(rest):
        raise ValueError(
            f"data: expected one name, or imagefolder and its PATH, got {' '.join(options.data)!r}"
        )
    options.model = options.model or ("densenet121" if name == "imagefolder" else CIFAR)
    if options.recipe and PUBLISHED[options.recipe].drop_rate and options.drop_rate is None:
        options.drop_rate, options.drop_everywhere = PUBLISHED[options.recipe].drop_rate, True
    recipe = recipe or recipe_for(options.recipe or name, **_recipe_values(options))
    data = _load(options, name, rest[0] if rest else None, recipe)
    trainer = Trainer(
        TrainingOptions(
            network=network_from(options, data.num_classes, data.channels),
            recipe=recipe,
            out=out,
            execution="reference" if options.reference else options.memory or MEMORY_MODES[0],
            amp=options.amp,
            device=options.device,
            channels_last=not options.contiguous,
            seed=options.seed,
            resume=None if options.resume is None else Path(options.resume),
            overwrite=options.overwrite,
            workers=options.workers,
            tensorboard=options.tensorboard,
            progress=not options.quiet,
            arguments=tuple(words),
        ),
        data,
    )
    try:
        history = trainer.run()
    except KeyboardInterrupt:
        saved = f"continue them with --resume {trainer.checkpoint}" if trainer.epoch else "none"
        print(f"\ninterrupted; epochs finished: {trainer.epoch}; {saved}", file=sys.stderr)
        return 130
    best = max(history, key=lambda row: row["test_accuracy"])
    print(
        f"{trainer.options.network.title} on {data.name}: held-out accuracy "
        f"{history[-1]['test_accuracy']:.2%} (best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}); weights in {out / 'model.safetensors'}, the best in "
        f"{out / 'best.safetensors'}"
    )
    return 0


def _recipe_values(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in RECIPE_OPTIONS}
    values["milestones"] = tuple(options.milestones) if options.milestones else None
    return values


def _resumed(
    parser: Parser, options: argparse.Namespace, words: list[str]
) -> tuple[argparse.Namespace, Recipe, list[str]]:
    """The checkpoint's options, with those that are given now in their place, its recipe likewise,
    and all words together. Without --out, a FILE's run goes on in its folder."""
    file = Path(options.resume) if options.resume else (options.out or OUT) / CHECKPOINT
    out = options.out or file.parent
    state = read_checkpoint(file)
    words = [*state["arguments"], *words]
    try:
        recipe = Recipe.from_description(state["description"].get("recipe"))
        found = parser.parse_args(words)
    except (ValueError, SystemExit) as error:
        raise CheckpointError(f"checkpoint {file}: its options cannot be read: {error}") from error
    found.resume, found.out = str(file), out
    return found, recipe.replaced(**_recipe_values(options)), words


def _load(options: argparse.Namespace, name: str, path: str | None, recipe: Recipe) -> Data:
    return load_data(
        name,
        root=options.data_root,
        path=path,
        image_size=options.image_size,
        augment=recipe.augment,
        download=options.download,
        limit=options.limit,
        shape=(3, 10 if is_small(options.model) else 1000),
    )
