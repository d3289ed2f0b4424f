"""The command line: train, bench, plan, summary, explain, info, demo.

Each command takes the network options (`--model` and what belongs to it). A wrong option or
unreadable file ends with one line on stderr and exit status 2, before anything is written;
ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench.steps import DTYPES, PEERS, Case, MeasurementError
from ..models.networks import CIFAR, NETWORKS, NetworkSpec
from ..train.checkpoint import CheckpointError
from ..train.data import DATASETS, DataError, load_data
from ..train.recipes import SCHEDULES, recipe_for
from ..train.trainer import AMP, CHECKPOINT, Trainer, TrainingError, TrainingOptions, check_device

__all__ = ["main"]

PROGRAM = "python -m densenet_efficient"
MEMORY_MODES = ("recompute", "store")


def _network_options(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=NETWORKS, default=default)
    group.add_argument("--depth", type=int, help=f"of {CIFAR} (100)")
    group.add_argument("--growth-rate", type=int, help=f"k, of {CIFAR} (12)")
    group.add_argument("--no-bottleneck", action="store_true", help=f"of {CIFAR}: plain layers")
    group.add_argument("--compression", type=float, help=f"of {CIFAR} (0.5; 1 when plain)")
    group.add_argument("--drop-rate", type=float, default=0.0)


def _network(options: argparse.Namespace, classes: int | None, channels: int = 3) -> NetworkSpec:
    if classes is None:
        classes = 10 if options.model == CIFAR else 1000
    return NetworkSpec(
        options.model,
        depth=options.depth,
        growth_rate=options.growth_rate,
        bottleneck=False if options.no_bottleneck else None,
        compression=options.compression,
        drop_rate=options.drop_rate,
        num_classes=classes,
        in_channels=channels,
    )


def _size_options(parser: argparse.ArgumentParser, batch: int) -> None:
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--image-size", type=int, help="pixels a side (224; CIFAR networks 32)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    _train_options(command("train", "train a network; logs, checkpoint and weights go into --out"))

    bench = command("bench", "ours against the reference: agreement, time, peak memory, ratios")
    _network_options(bench, "densenet121")
    _size_options(bench, 8)
    bench.add_argument("--dtype", choices=DTYPES, default="fp32")
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    bench.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    bench.add_argument(
        "--peers", nargs="+", default=["eager", "checkpoint", "store", "recompute"],
        metavar="PEER", help=f"some of {', '.join(PEERS)}; the first is the base of the ratios",
    )  # fmt: skip

    plan = command("plan", "the memory of a step, buffer by buffer, before anything is allocated")
    _network_options(plan, "densenet121")
    _size_options(plan, 16)
    plan.add_argument("--dtype", choices=DTYPES, default="fp32")
    plan.add_argument("--memory", choices=MEMORY_MODES, default="recompute")
    plan.add_argument("--inference", action="store_true", help="of a call without gradients")
    plan.add_argument("--budget-gb", type=float, help="also: the largest batch within so many GB")

    summary = command("summary", "the volumes through a network, block by block")
    _network_options(summary, "densenet121")
    _size_options(summary, 1)
    summary.add_argument("--classes", type=int)

    explain = command("explain", "which path every stage takes, and why")
    _network_options(explain, "densenet121")
    _size_options(explain, 1)
    explain.add_argument("--dtype", choices=DTYPES, default="fp32")
    explain.add_argument("--memory", choices=MEMORY_MODES, default="recompute")
    explain.add_argument("--device", default="cpu")

    command("info", "versions, the compiled library, and the path of each device")

    demo = command("demo", "train on the bundled digits, then compare with the reference")
    demo.add_argument("--out", type=Path, default=Path("demo"))
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--epochs", type=int, help="fewer for a quick look (25)")
    return parser


def _train_options(parser: argparse.ArgumentParser) -> None:
    _network_options(parser, CIFAR)
    group = parser.add_argument_group("execution")
    group.add_argument("--memory", choices=MEMORY_MODES, help="recompute")
    group.add_argument("--reference", action="store_true", help="the plain PyTorch twin instead")
    group.add_argument("--amp", choices=AMP, help="autocast")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    group.add_argument("--workers", type=int, default=0, help="processes that load data")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", nargs="+", default=["digits"], metavar="DATA",
        help=f"one of {', '.join(DATASETS)}; imagefolder is followed by its PATH",
    )  # fmt: skip
    group.add_argument("--data-root", type=Path, default=Path("data"))
    group.add_argument("--download", action="store_true")
    group.add_argument("--image-size", type=int)
    group.add_argument("--limit", type=int, help="use the first images of each split only")
    group = parser.add_argument_group("recipe (each data set has its own; these replace values)")
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch", type=int)
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--momentum", type=float)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=SCHEDULES)
    group.add_argument("--milestones", type=float, nargs="+", help="fractions of the epochs")
    group.add_argument("--warmup-epochs", type=float)
    group.add_argument("--label-smoothing", type=float)
    group.add_argument("--augment", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--out", type=Path, default=Path("runs/run"))
    group.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="continue (out's checkpoint)"
    )
    group.add_argument("--overwrite", action="store_true", help="start anew in a used folder")
    group.add_argument("--tensorboard", action="store_true")
    group.add_argument("--quiet", action="store_true")


def _train(options: argparse.Namespace) -> int:
    if options.reference and options.memory:
        raise ValueError(f"memory: expected without --reference, got {options.memory!r} with it")
    name, *rest = options.data
    if len(rest) > 1 or (name == "imagefolder") != bool(rest):
        raise ValueError(
            f"data: expected one name, or imagefolder and its PATH, got {' '.join(options.data)!r}"
        )
    recipe = recipe_for(
        name,
        epochs=options.epochs,
        batch_size=options.batch,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        milestones=tuple(options.milestones) if options.milestones else None,
        warmup_epochs=options.warmup_epochs,
        label_smoothing=options.label_smoothing,
        augment=options.augment,
    )
    data = load_data(
        name,
        root=options.data_root,
        path=rest[0] if rest else None,
        image_size=options.image_size,
        augment=recipe.augment,
        download=options.download,
        limit=options.limit,
        shape=(3, 10 if options.model == CIFAR else 1000),
    )
    resume = options.resume
    trainer = Trainer(
        TrainingOptions(
            network=_network(options, data.num_classes, data.channels),
            recipe=recipe,
            out=options.out,
            execution="reference" if options.reference else options.memory or "recompute",
            amp=options.amp,
            device=options.device,
            channels_last=not options.contiguous,
            seed=options.seed,
            resume=None if resume is None else Path(resume) if resume else options.out / CHECKPOINT,
            overwrite=options.overwrite,
            workers=options.workers,
            tensorboard=options.tensorboard,
            progress=not options.quiet,
        ),
        data,
    )
    try:
        history = trainer.run()
    except KeyboardInterrupt:
        saved = f"continue them with --resume ({trainer.checkpoint})" if trainer.epoch else "none"
        print(f"\ninterrupted; epochs finished: {trainer.epoch}; {saved}", file=sys.stderr)
        return 130
    best = max(history, key=lambda row: row["test_accuracy"])
    print(
        f"{trainer.options.network.title} on {data.name}: held-out accuracy "
        f"{history[-1]['test_accuracy']:.2%} (best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}); weights in {options.out / 'model.safetensors'}"
    )
    return 0


def _case(options: argparse.Namespace, device: str) -> Case:
    network = _network(options, None)
    size = options.image_size or network.default_image_size
    layout = not getattr(options, "contiguous", False)
    return Case(network, options.batch, size, options.dtype, device, layout)


def _bench(options: argparse.Namespace) -> int:
    from ..bench.comparison import compare, comparison_table

    check_device(options.device)
    case = _case(options, options.device)
    if options.rounds < 1:
        raise ValueError(f"rounds: expected a positive integer, got {options.rounds}")
    print(case.title)
    rows = compare(case, options.peers, rounds=options.rounds)
    print(comparison_table(rows))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from ..memory.planner import max_batch, plan

    case = _case(options, "cpu")
    dtype = DTYPES[case.dtype] or torch.float32
    image = (case.network.in_channels, case.image_size, case.image_size)
    model = case.network.build(options.memory)
    training = not options.inference
    print(case.title.removesuffix(", cpu"))
    print(plan(model, (case.batch, *image), dtype, training=training))
    if options.budget_gb is not None:
        largest = max_batch(model, image, dtype, options.budget_gb * 1e9, training=training)
        print(f"largest batch within {options.budget_gb:g} GB: {largest}")
    return 0


def _summary(options: argparse.Namespace) -> int:
    from ..report.summary import summarise

    network = _network(options, options.classes)
    print(summarise(network, options.batch, options.image_size))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from ..report.explanation import explain

    check_device(options.device)
    case = _case(options, options.device)
    model = case.network.build(options.memory).to(options.device)
    images, _ = case.batch_of(case.batch)
    with torch.autocast(images.device.type, DTYPES[case.dtype], enabled=case.dtype != "fp32"):
        print(explain(model, images))
    return 0


def _info(options: argparse.Namespace) -> int:
    from ..ops.library import info

    print(info())
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(options.out, seed=options.seed, epochs=options.epochs)


_COMMANDS = {
    "train": _train,
    "bench": _bench,
    "plan": _plan,
    "summary": _summary,
    "explain": _explain,
    "info": _info,
    "demo": _demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (TrainingError, MeasurementError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, ImportError, DataError, CheckpointError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2
