"""Predicts a training step's time on a GPU, by count: each kernel's milliseconds, best, likely and
worst, and the step's, with the host's launches and as a graph.

    python -m tools.predict --network densenet121 --batch 512 --gpu h200 [--memory recompute]
    python -m tools.predict --network densenet264 --batch 256 --set latency=2 --set memory=0.7
    python -m tools.predict --fit            predicted next to measured, for the stored measurements

Needs g++, which builds the launchers for the host. --count counts the kernels of the step, or of
--waves, anew (nvcc, minutes); --write puts the tables into docs/predict.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from densenet_efficient.models.networks import NETWORKS, NetworkSpec, check_image_size
from densenet_efficient.nn.options import MEMORY_MODES
from tools.machine_code.document import replaced

from . import counts, document, fit, operators, steps, timeline, waves
from .calls import Step
from .devices import GPUS, Gpu
from .launches import Launch, emulator_for, listed
from .model import Efficiencies, Work, work_of

STEPS = (("densenet121", 512), ("densenet264", 256), ("densenet_cifar", 64))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (ValueError, LookupError, OSError) as problem:
        return error(str(problem))


def run(options: argparse.Namespace) -> int:
    given = fit.stored()
    for name, value in options.set:
        if name not in fit.FITTED and name not in ("memory", "host"):
            return error(f"--set: expected one of the efficiencies, got {name!r}")
        if not (value > 0 or (name == "host" and value == 0)):
            return error(f"--set {name}: expected a number > 0, or host=0, got {value}")
        given = replace(given, **{name: value})
    tables = options.fit or options.waves
    if options.occupancy and not options.operators:
        return error("--occupancy: expected with --operators, got it alone")
    if options.write and not tables:
        return error("--write: expected with --fit or --waves, got neither")
    if options.count and (options.fit or options.operators):
        return error("--count: expected with a network or --waves, got it with another table")
    if options.operators:
        print(operators.report(options.operators, options.occupancy))
        return 0
    if tables:
        report(options)
        return 0
    network = NetworkSpec(options.network, depth=options.depth, growth_rate=options.growth_rate)
    image_size = options.image_size or network.default_image_size
    with torch.device("meta"):
        check_image_size(network.build("store"), image_size)
    step = Step(network, options.batch, image_size, options.memory)
    gpu = GPUS[options.gpu]
    with emulator_for(step.calls()) as emulator:
        launches = list(listed(step.calls(), gpu.device, DTYPES[options.dtype], emulator))
    if options.count:
        counts.renew(launches, DTYPES[options.dtype])
    known = counts.stored()
    works = [work_of(launch, known) for launch in launches]
    print(f"{network.title}, {step.image_size} px, batch {step.batch}, {options.dtype}, "
          f"{step.memory}, {gpu.title}")  # fmt: skip
    print(prediction(works, gpu, given))
    if others := counts.stand_ins(launches, known):
        print(f"counted in another block of the same kernel (--count counts them): {others}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=NETWORKS, default="densenet121")
    parser.add_argument("--depth", type=int, help="of densenet_cifar")
    parser.add_argument("--growth-rate", type=int, help="of densenet_cifar")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--memory", choices=MEMORY_MODES, default="store")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="EFFICIENCY=VALUE"
    )
    parser.add_argument("--count", action="store_true", help="count the kernels anew")
    parser.add_argument(
        "--fit", action="store_true", help="to benchmarks/results/kernels-h200.json"
    )
    parser.add_argument(
        "--operators", type=Path, help="operators-cuda.json, to be set next to its prediction"
    )
    parser.add_argument(
        "--occupancy",
        type=Path,
        help="what that run wrote to the file that DENSENET_EFFICIENT_OCCUPANCY names",
    )
    parser.add_argument("--waves", action="store_true", help="list idle waves and lone warps")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/predict.md")
    return parser


def assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def prediction(works: list[Work], gpu: Gpu, given: Efficiencies) -> str:
    """Each stage's kernels, and the step."""
    three = cases(given)
    groups: dict[tuple[str, str], list[Work]] = {}
    for work in works:
        groups.setdefault((work.stage, work.kernel.partition("<")[0]), []).append(work)

    def milliseconds(some: Iterable[Work], case: Efficiencies) -> float:
        return 1e3 * sum(work.times * timeline.duration(work, gpu, case) for work in some)

    rows = [
        [stage, kernel, str(sum(work.times for work in some))]
        + [f"{milliseconds(some, case):.3f}" for case in three]
        for (stage, kernel), some in groups.items()
    ]
    rows.append(["step", "kernels", str(sum(work.times for work in works))]
                + [f"{milliseconds(works, case):.1f}" for case in three])  # fmt: skip
    launched = [1e3 * timeline.step_seconds(works, gpu, case) for case in three]
    rows.append(["step", "launched by the host", "", *(f"{ms:.1f}" for ms in launched)])
    head = ["stage", "kernel", "launches", "best, ms", "likely, ms", "worst, ms"]
    return document.markdown(head, rows)


def report(options: argparse.Namespace) -> None:
    """Predicted next to measured, or idle waves; into the document where asked."""
    tables = {}
    if options.fit:
        found = fit.measured()
        given = fit.fit(found.fitted, found.gpu)
        hosts = sorted(step["host_ms"] * 1e-3 / step["launches"] for step in found.steps)
        given = replace(given, host=hosts[len(hosts) // 2])
        if options.write:
            fit.write(given)
        tables[document.EFFICIENCIES] = document.efficiency_table(given)
        tables[document.KERNELS] = document.kernel_table(
            [group for group in found.groups if group.seconds > 1e-4 or group.source == "ncu"],
            found.gpu, given,
        )  # fmt: skip
        tables[document.MEASURED_STEPS] = steps.table(found, given)
        tables[document.STEPS] = step_table(given)
    if options.waves:
        if options.count:
            placed = (one.launch for name in waves.NETWORKS for one in waves.persistent(name))
            counts.renew(placed, torch.bfloat16)
        idle = [one for network in waves.NETWORKS for one in waves.worst(network) if one.misses]
        tables[document.WAVES] = document.idle_table(idle)
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    if options.write:
        text = document.DOCUMENT.read_text()
        for title, table in tables.items():
            text = replaced(text, title, table)
        document.DOCUMENT.write_text(text)


def step_table(given: Efficiencies) -> str:
    """Whole steps with today's kernels, as far as they were counted."""
    rows = []
    chosen = []
    for name, batch in STEPS:
        network = NetworkSpec(name)
        chosen.append(Step(network, batch, network.default_image_size, "store"))
    with emulator_for(call for step in chosen for call in step.calls()) as emulator:
        for gpu in GPUS.values():
            for step in chosen:
                launches = listed(step.calls(), gpu.device, torch.bfloat16, emulator)
                rows.append([gpu.title, *_step_row(step, list(launches), gpu, given)])
    head = ["GPU", "step", "launches", "best, ms", "likely, ms", "worst, ms", "with the host, ms"]
    return document.markdown(head, rows)


def _step_row(step: Step, launches: list[Launch], gpu: Gpu, given: Efficiencies) -> list[str]:
    known = counts.stored()
    works = [work_of(launch, known) for launch in launches]
    graphs = [replace(case, host=0.0) for case in cases(given)]
    times = [timeline.step_seconds(works, gpu, case) for case in (*graphs, given)]
    title = f"{step.network.title}, batch {step.batch}"
    return [title, str(sum(work.times for work in works)), *(f"{1e3 * t:.1f}" for t in times)]


def cases(given: Efficiencies) -> list[Efficiencies]:
    """Best, likely and worst: where a tenth and nine tenths of the measured time lie."""
    measured = fit.measured()
    low, high = fit.spread(measured.groups, measured.gpu, given)
    return [given.scaled(low), given, given.scaled(high)]


def error(message: str) -> int:
    print(f"predict: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
