"""See the package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import computed, measured

# Where a picture lies in the repository, and what draws it.
PICTURES: dict[str, Callable[[Path], None]] = {
    "benchmarks/results/memory-cpu.png": lambda path: measured.curves(
        measured.stored("memory-cpu"), path
    ),
    "docs/pictures/time-and-memory.png": measured.time_and_memory,
    "docs/pictures/bytes-of-an-image.png": computed.bytes_of_an_image,
    "docs/pictures/timeline-of-a-step.png": computed.timeline_of_a_step,
    "docs/pictures/volumes.png": computed.volumes,
}


def main() -> None:
    """Draws them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--output", type=Path, default=measured.ROOT)
    output = parser.parse_args().output
    for name, draw in PICTURES.items():
        draw(output / name)
        print(output / name)


if __name__ == "__main__":
    main()
