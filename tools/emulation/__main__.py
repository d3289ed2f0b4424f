"""Runs one operator's CUDA kernels on the host and prints what they did to memory.

python -m tools.emulation norm_relu_conv1x1_forward 3136 256 128
"""

from __future__ import annotations

import argparse
import sys

import torch

from tools.op_cases import CUDA_OPERATORS, dimensions, kernel_file, make

from .build import EmulationError
from .emulator import Emulator
from .report import tensor_table

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def main(arguments: list[str] | None = None) -> int:
    sizes = "\n".join(f"  {op:30}{' '.join(dimensions(op))}" for op in CUDA_OPERATORS)
    parser = argparse.ArgumentParser(
        prog="python -m tools.emulation",
        description="Runs an operator's CUDA kernels on the host and prints their counters.",
        epilog=f"operators and their sizes:\n{sizes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operator", choices=CUDA_OPERATORS, metavar="operator")
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0, help="order in which threads run")
    parser.add_argument("--before", type=int, default=0, help="channels in front of each slice")
    options = parser.parse_args(arguments)
    try:
        case = make(
            options.operator, tuple(options.sizes), DTYPES[options.dtype], before=options.before
        )
        with Emulator([kernel_file(options.operator)]) as emulator:
            launches = emulator.call(case.op, *case.arguments.values(), seed=options.seed)
    except (EmulationError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for launch in launches:
        print(launch.table(), end="\n\n")
    print(tensor_table(launches, case.sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
