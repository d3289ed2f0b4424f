"""plan, summary, explain and info: what a network is, needs and does, without training it."""

from __future__ import annotations

import argparse
import bisect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bench.steps import DTYPES, Case
from ..memory.planner import max_batch, plan
from ..models.networks import check_image_size
from ..nn.options import MEMORY_MODES
from ..ops.info import info
from ..report.explanation import explain
from ..report.figure import draw_summary
from ..report.plan_table import plan_text
from ..report.summary import summarise
from ..train.device import check_device
from .parser import Budget, add_command, budget, count, network_from, network_options, size_options

__all__ = ["register"]


def register(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands, "plan", "predict the memory of a training step before anything is allocated"
    )
    parser.set_defaults(run=_plan)
    network_options(parser, "densenet121")
    size_options(parser, 16)
    _execution_options(parser)
    parser.add_argument(
        "--inference", action="store_true", help="plan a call without gradients instead"
    )
    parser.add_argument(
        "--all", action="store_true", help="every buffer instead of a row for each part"
    )
    parser.add_argument(
        "--budget", type=budget, metavar="SIZE",
        help="also find the largest batch within 12GB, 11.5GiB, 80%% of the device's memory, ...",
    )  # fmt: skip
    parser.add_argument(
        "--budget-gb", dest="budget", type=_gigabytes, metavar="GB", help="--budget in 10^9 bytes"
    )
    parser.add_argument(
        "--include-baseline", action="store_true",
        help="the budget must also hold parameters, their momentum and the batch of images",
    )  # fmt: skip

    parser = add_command(commands, "summary", "show the volumes through a network, block by block")
    parser.set_defaults(run=_summary)
    network_options(parser, "densenet121")
    size_options(parser, 1)
    parser.add_argument(
        "--classes", type=count, help="outputs of the classifier (default: 1000; CIFAR 10)"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="also draw the volumes, as png, svg or pdf"
    )

    parser = add_command(commands, "explain", "show which path each operator takes, and why")
    parser.set_defaults(run=_explain)
    network_options(parser, "densenet121")
    size_options(parser, 1)
    _execution_options(parser)

    parser = add_command(commands, "info", "show versions, the compiled library and its paths")
    parser.set_defaults(run=_info)


def _gigabytes(text: str) -> Budget:
    return budget(f"{text}GB")


def _execution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the activations")
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, default=MEMORY_MODES[0],
        help="compute bottlenecks again in backward, or store them",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda:0")


def _case(options: argparse.Namespace) -> Case:
    check_device(options.device)
    network = network_from(options)
    size = options.image_size or network.default_image_size
    return Case(network, options.batch, size, options.dtype, options.device)


def _plan(options: argparse.Namespace, words: list[str]) -> int:
    case = _case(options)
    dtype = DTYPES[case.dtype] or torch.float32
    image = (case.network.in_channels, case.image_size, case.image_size)
    model = case.network.build(options.memory).to(case.device)
    check_image_size(model, case.image_size)
    training = not options.inference
    print(f"{case.title}, {options.memory}\n")
    found = plan(model, (case.batch, *image), dtype, training=training)
    print(plan_text(found, every_row=options.all))
    baseline = _baseline_bytes(model, training)
    per_image = 4 * image[0] * image[1] * image[2] + 8
    without = (
        f"{'parameters and momentum' if training else 'parameters'} "
        f"({baseline / 1e6:,.1f} MB) and the images ({case.batch * per_image / 1e6:,.1f} MB)"
    )
    print(f"baseline: {without}")
    if options.budget is not None:
        size = options.budget.bytes_on(torch.device(case.device))
        if options.include_baseline:
            largest = _largest_batch(model, image, dtype, size - baseline, per_image, training)
        else:
            largest = max_batch(model, image, dtype, size, training=training)
        counted = "including" if options.include_baseline else "not counting"
        print(
            f"largest batch within {options.budget.text}, {counted} the baseline of "
            f"{'parameters, momentum' if training else 'parameters'} and images: {largest}"
        )
    return 0


def _baseline_bytes(model: nn.Module, training: bool) -> int:
    """Parameters, buffers and, for training, SGD's momentum."""
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return parameters * (1 + training) + sum(buffer.nbytes for buffer in model.buffers())


def _largest_batch(
    model: nn.Module,
    image: tuple[int, int, int],
    dtype: torch.dtype,
    size: float,
    per_image: int,
    training: bool,
) -> int:
    """The largest batch whose peak and images fit into `size` bytes; 0 where none does."""
    if size <= 0:
        return 0

    def needed(batch: int) -> int:
        peak = plan(model, (batch, *image), dtype, training=training).peak_bytes
        return peak + batch * per_image

    without_images = max_batch(model, image, dtype, size, training=training)
    return bisect.bisect_right(range(1, without_images + 1), size, key=needed)


def _summary(options: argparse.Namespace, words: list[str]) -> int:
    network = network_from(options, options.classes)
    found = summarise(network, options.batch, options.image_size)
    print(found)
    if options.figure is not None:
        draw_summary(found, options.figure)
        print(f"figure: {options.figure}")
    return 0


def _explain(options: argparse.Namespace, words: list[str]) -> int:
    case = _case(options)
    model = case.network.build(options.memory).to(case.device)
    images, _ = case.batch_of(case.batch)
    with torch.autocast(images.device.type, DTYPES[case.dtype], enabled=case.dtype != "fp32"):
        print(explain(model, images))
    return 0


def _info(options: argparse.Namespace, words: list[str]) -> int:
    print(info())
    return 0
