"""plan, summary, explain and info: what a network is, needs and does, without training it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..bench.steps import DTYPES, Case
from ..memory.planner import max_batch, plan
from ..models.networks import check_image_size
from ..nn.options import MEMORY_MODES
from ..ops.info import info
from ..report.explanation import explain
from ..report.figure import draw_summary
from ..report.plan_table import plan_text
from ..report.summary import summarise
from ..train.capacity import image_bytes, largest_batch, state_bytes
from ..train.device import check_device
from .parser import (
    Budget,
    add_command,
    budget,
    count,
    json_option,
    network_from,
    network_options,
    print_json,
    size_options,
)

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
    json_option(parser)

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
    json_option(parser)

    parser = add_command(commands, "info", "show versions, the compiled library and its paths")
    parser.set_defaults(run=_info)
    json_option(parser)


def _gigabytes(text: str) -> Budget:
    return budget(f"{text}GB")


def _execution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the activations")
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, default=MEMORY_MODES[0],
        help="keep the bottlenecks that the peak has room for, compute all again in backward, or "
        "store all",
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
    found = plan(model, (case.batch, *image), dtype, training=training)
    state = state_bytes(model, momentum=training)
    images = case.batch * image_bytes(image[0], case.image_size)
    largest = None
    if options.budget is not None:
        size = options.budget.bytes_on(torch.device(case.device))
        if options.include_baseline:
            largest = largest_batch(model, image, dtype, size - state, training=training)
        else:
            largest = max_batch(model, image, dtype, size, training=training)
    if options.json:
        figures = {"state_bytes": state, "images_bytes": images, "largest_batch": largest}
        print_json({**case.describe(), "memory": options.memory, **figures, **found.describe()})
        return 0
    print(f"{case.title}, {options.memory}\n")
    print(plan_text(found, every_row=options.all))
    what = "parameters and momentum" if training else "parameters"
    print(f"baseline: {what} ({state / 1e6:,.1f} MB) and the images ({images / 1e6:,.1f} MB)")
    if options.budget is not None:
        counted = "including" if options.include_baseline else "not counting"
        print(
            f"largest batch within {options.budget.text}, {counted} the baseline of "
            f"{'parameters, momentum' if training else 'parameters'} and images: {largest}"
        )
    return 0


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
        found = explain(model, images)
    if options.json:
        print_json({**case.describe(), "memory": options.memory, "modules": found.describe()})
    else:
        print(found)
    return 0


def _info(options: argparse.Namespace, words: list[str]) -> int:
    found = info()
    if options.json:
        print_json(dataclasses.asdict(found))
    else:
        print(found)
    return 0
