"""The program: `python -m densenet_efficient COMMAND`, or `densenet-efficient COMMAND`.

A wrong option or unreadable file ends with one line on stderr and exit status 2, before anything is
written; what fails later with one line and 1; ctrl-C with 130.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..bench.steps import MeasurementError
from ..train.checkpoint import CheckpointError
from ..train.data import DataError
from ..train.trainer import TrainingError
from ..version import __version__
from . import bench, catalogue, demo, inspect, train, weights
from .parser import Help, Parser, UsageError

__all__ = ["main"]

PROGRAM = "python -m densenet_efficient"


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Train, measure and inspect DenseNets. COMMAND --help lists its options.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"densenet-efficient {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train, bench, inspect, catalogue, weights, demo):
        module.register(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(words)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return options.run(options, words[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except CheckpointError as error:
        advice = "resume another checkpoint, or train anew with --overwrite"
        print(f"{PROGRAM} {options.command}: {error}; {advice}", file=sys.stderr)
        return 2
    except (ValueError, ImportError, DataError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2
    except (TrainingError, MeasurementError, OSError) as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 1
