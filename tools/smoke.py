"""Does an installed package work? Needs nothing but torch and the package.

    python tools/smoke.py

Prints what `info` says, then tries every variant of the CPU kernels that this processor can run,
each in a process of its own (DENSENET_EFFICIENT_CPU names one of them): a training step of a small
network in each dtype, next to the reference in float64. The exit status is 1 where anything is
wrong, or where this processor can run none of them. Run from anywhere: the package is the installed
one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import densenet_efficient
from densenet_efficient.bench.accuracy import agreement, check_agreement, largest_difference
from densenet_efficient.bench.steps import DTYPES, Case
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.ops import cpu_variants, library

PEERS = ("store", "recompute")


def check() -> None:
    """Holds the loaded variant to the reference; raises where it is wrong."""
    library.load()
    network = NetworkSpec("densenet_cifar", depth=22, growth_rate=12, num_classes=10)
    for peer in PEERS:
        difference = largest_difference(Case(network, 2, 16), peer)
        if not difference < 1e-9:
            raise SystemExit(f"{peer}: float64 is {difference:.1e} away from the reference")
    for dtype in DTYPES:
        check_agreement(agreement(Case(network, 4, 16, dtype), PEERS, batch=4, draws=3))
    print(f"CPU kernels {library.cpu_variant()}: right in float64, {', '.join(DTYPES)}")


def main() -> int:
    """The command."""
    if os.environ.get("DENSENET_EFFICIENT_CPU"):
        check()
        return 0
    print(f"{densenet_efficient.__file__}\n{densenet_efficient.info()}", flush=True)
    present = cpu_variants.processor_features()
    statuses = []
    for name, needed in cpu_variants.compiled_variants().items():
        if present is not None and not present.issuperset(needed):
            print(f"CPU kernels {name}: not tried, this processor cannot run them", flush=True)
            continue
        environment = {**os.environ, "DENSENET_EFFICIENT_CPU": name}
        statuses.append(subprocess.run([sys.executable, __file__], env=environment).returncode)
    return int(not statuses or any(statuses))


if __name__ == "__main__":
    sys.exit(main())
