"""Each operator alone: milliseconds, bandwidth, arithmetic rate, and the bare convolution next to
it.

    python benchmarks/bench_operators.py                       CUDA where there is one, else the CPU
    python benchmarks/bench_operators.py --batch 64 --operators norm_relu_conv1x1_forward

Shapes: the middle layer of each block of DenseNet-121 at 224 px, and of BC-100-12 at 32 px. x is a
slice of its block's feature buffer, as in training. Bytes are the least an operator must move (each
input read once, each output written once), FLOPs those of its products; they are set against a
copy of 1 GB and a large matrix product measured in the same run. `bare` is PyTorch's own
convolution, product or pooling of the same shape on packed tensors, without norm, ReLU, statistics
or slices. Correctness comes first: on two images, no output may be further from float64 than twice
the results of PyTorch's own operators in the same dtype. Writes
benchmarks/results/operators-DEVICE.{json,md}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from operator_work import LAYER, SHAPES, STEM, STEM_SHAPE, TRANSITION, Shape, Work, work

from densenet_efficient.bench.accuracy import relative_error
from densenet_efficient.bench.steps import MeasurementError, check_kernels, quantiles, time_in_turns
from densenet_efficient.bench.tables import markdown_table, write_results
from densenet_efficient.ops.interface import CUDA_NAMES
from tools.op_cases import eager_outputs, reference_outputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = 1e-6  # what summation in another order may cost in fp32


def check(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """MeasurementError where an output is further from float64 than twice what PyTorch's operators
    give in the same dtype, on two images."""
    small = work(op, shape, 2, dtype, device)
    inputs = small.case.inputs()
    small.run()
    exact = reference_outputs(op, inputs)
    eager = eager_outputs(
        op, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    )
    for name, got in small.case.outputs.items():
        error, bound = (relative_error(t, exact[name]) for t in (got, eager[name]))
        if not error <= 2 * bound + ROUNDING:
            raise MeasurementError(
                f"{op}, {shape.name}, {name}: expected an error of at most twice PyTorch's "
                f"{bound:.2e}, got {error:.2e}; nothing was timed"
            )


def measure(timed: Work, rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of ours and of the bare kernel, in turns."""
    for _ in range(2):
        timed.run()
        timed.bare()
    times = time_in_turns({"ours": timed.run, "bare": timed.bare}, rounds, device, inner=3)
    return {name: quantiles(values)["median"] for name, values in times.items()}


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy (read and written) and FLOP/s of a matrix product, on this device."""
    big = device.type == "cuda"
    source = torch.zeros(2**30 if big else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if big else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    steps = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    for step in steps.values():
        step()
    times = time_in_turns(steps, 7, device)  # type: ignore[arg-type]
    copy, product = (quantiles(times[name])["median"] * 1e-3 for name in ("copy", "product"))
    return 2 * source.numel() / copy, 2 * side**3 / product


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="(bf16 on a GPU, fp32 on the CPU)")
    parser.add_argument("--batch", type=int, help="images (256 on a GPU, 8 on the CPU)")
    parser.add_argument("--operators", nargs="+", help="some only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions may, and our kernels with them
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    batch = options.batch or (256 if on_gpu else 8)
    check_kernels(device, dtype)
    bandwidth, rate = ceilings(dtype, device)
    rows: list[list[Any]] = []
    figures = []
    plan = [(op, shape) for shape in SHAPES for op in LAYER]
    plan += [(op, shape) for shape in SHAPES[:3] for op in TRANSITION]
    plan += [(op, STEM_SHAPE) for op in STEM]
    if on_gpu and dtype.itemsize == 2:  # PyTorch's own serves all others
        plan += [(op, STEM_SHAPE) for op in CUDA_NAMES]
    for name, shape in plan:
        if options.operators and name not in options.operators:
            continue
        check(name, shape, dtype, device)
        timed = work(name, shape, batch, dtype, device)
        found = measure(timed, options.rounds, device)
        seconds = found["ours"] * 1e-3
        moved, done = timed.size / seconds, timed.flops / seconds
        sizes, widths = shape.sizes(name, batch)
        figures.append({"operator": name, "shape": shape.name, **found, "bytes": timed.size})
        figures[-1].update(sizes=sizes, stride=widths.get("x"))
        figures[-1].update(flops=timed.flops, bandwidth=moved, rate=done)
        rows.append(
            [
                f"{name}, {shape.name}",
                f"{found['ours']:.3f}",
                f"{moved / 1e12:.3f}",
                f"{moved / bandwidth:.0%}",
                f"{done / 1e12:.2f}",
                f"{done / rate:.0%}",
                f"{found['bare']:.3f}",
                f"{found['ours'] / found['bare']:.2f}",
            ]
        )
        print(f"{rows[-1][0]:50} {found['ours']:9.3f} ms  bare {found['bare']:9.3f} ms", flush=True)
    columns = ["operator", "ms", "TB/s", "of copy", "TFLOP/s", "of product", "bare ms", "/ bare"]
    text = (
        f"batch {batch}, {dtype}; copy {bandwidth / 1e12:.3f} TB/s, product "
        f"{rate / 1e12:.2f} TFLOP/s\n\n{markdown_table(columns, rows)}"
    )
    print(text)
    path = write_results(
        options.output,
        f"operators-{device.type}",
        "Operators",
        {"batch": batch, "dtype": str(dtype), "copy": bandwidth, "product": rate, "rows": figures},
        text,
        options.device,
    )
    print(f"written: {path} and .json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, MeasurementError) as error:
        sys.exit(f"bench_operators: {error}")
