"""bench: training steps of ours and of what one would use instead."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench.comparison import compare, comparison_cells
from ..bench.steps import DTYPES, PEERS, Case
from ..bench.tables import environment
from ..report.tables import table
from ..train.device import check_device
from .parser import (
    add_command,
    count,
    json_option,
    network_from,
    network_options,
    print_json,
    size_options,
)

__all__ = ["register"]


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "bench", "compare training steps with PyTorch's: agreement, time, peak memory"
    )
    parser.set_defaults(run=_run)
    network_options(parser, "densenet121")
    size_options(parser, 8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 by autocast")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda:0")
    parser.add_argument(
        "--contiguous", action="store_true", help="contiguous images instead of channels_last"
    )
    parser.add_argument("--rounds", type=count, default=5, help="timed steps of each peer")
    parser.add_argument(
        "--peers", nargs="+", default=["eager", "checkpoint", "store", "recompute"],
        metavar="PEER", help=f"some of {', '.join(PEERS)}; ratios are to the first",
    )  # fmt: skip
    json_option(parser)


def _run(options: argparse.Namespace, words: list[str]) -> int:
    check_device(options.device)
    network = network_from(options)
    size = options.image_size or network.default_image_size
    case = Case(network, options.batch, size, options.dtype, options.device, not options.contiguous)
    if not options.json:
        print(case.title)
    rows = compare(case, options.peers, rounds=options.rounds)
    if options.json:
        print_json({**case.describe(), "environment": environment(case.device), "peers": rows})
        return 0
    print(table(*comparison_cells(rows)))
    return 0
