"""Error against float64, tensor by tensor: ours over eager execution's, same input.

    python benchmarks/bench_error.py                    fp32 and bf16, 224 px, batch 2, CPU
    python benchmarks/bench_error.py --device cuda      bf16, fp16 and fp32 (in TF32)

torchvision's DenseNet-121 in float32 and under autocast to 16 bits, converted and not: the output,
the input's gradient and all parameter gradients, every tensor counted, each error
||x - float64|| / ||float64|| as the median over the draws. Once at torchvision's initial values,
where the gradient of the first norm is zero but for rounding, and once with norms that have moved
away from them. Both memory modes give the same bits (tests/models). In float32 single
ReLUs that rounding puts on the other side of zero are most of the error, of eager execution's too:
the smaller the images and the fewer the draws, the more chance decides.
Writes benchmarks/results/error-DEVICE.{json,md}; exit status 1 where ours is beyond 1.2 times
eager's error over all tensors together, or 2 times on any of them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import densenet_efficient
from densenet_efficient.bench.accuracy import (
    ErrorRatio,
    moved_norms,
    ratio_of_errors,
    relative_errors,
    training_step,
)
from densenet_efficient.bench.steps import DTYPES
from densenet_efficient.bench.tables import markdown_table, write_results
from densenet_efficient.torchvision_compat import import_torchvision


def compare(moved: bool, dtype: str, options: argparse.Namespace) -> ErrorRatio:
    """The errors of ours and of eager execution, the medians over the draws."""
    torch.manual_seed(0)
    models = import_torchvision("torchvision.models")
    eager = models.densenet121(weights=None, num_classes=10).to(options.device)
    if moved:
        moved_norms(eager)
    exact = copy.deepcopy(eager).double()
    ours = densenet_efficient.convert(copy.deepcopy(eager))
    found: tuple[list[dict[str, float]], ...] = ([], [])
    for _ in range(options.draws):
        x = torch.randn(options.batch, 3, options.image_size, options.image_size)
        x = x.to(options.device, memory_format=torch.channels_last)
        target = torch.randint(10, (options.batch,)).to(options.device)
        truth = training_step(exact, x.double(), target)
        for errors, model in zip(found, (ours, eager), strict=True):
            errors.append(relative_errors(training_step(model, x, target, DTYPES[dtype]), truth))
    return ratio_of_errors(*found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    on_cpu = torch.device(options.device).type == "cpu"
    dtypes = options.dtypes or (("fp32", "bf16") if on_cpu else ("bf16", "fp16", "fp32"))
    sections, failed, data = [], [], {}
    cases = [(dtype, moved) for dtype in dtypes for moved in (False, True)]
    for dtype, moved in cases:
        title = f"{dtype}, {'moved norms' if moved else 'initial values'}"
        ratio = compare(moved, dtype, options)
        ranked = sorted(ratio.errors.items(), key=lambda item: item[1][0] / item[1][1])
        rows = [
            (name, f"{ours:.2e}", f"{eager:.2e}", f"{ours / eager:.2f}")
            for name, (ours, eager) in ranked[:-6:-1]
        ]
        rows.append(("all tensors together", "", "", f"{ratio.together:.2f}"))
        if not ratio.accepted:
            failed.append(title)
        sections.append(
            f"## {title}\n\n" + markdown_table(("tensor", "ours", "eager", "ratio"), rows)
        )
        data[title] = {name: list(pair) for name, pair in ratio.errors.items()}
    text = "\n\n".join(sections)
    print(text)
    results = Path(__file__).resolve().parent / "results"
    name = f"error-{torch.device(options.device).type}"
    path = write_results(results, name, "Error against float64", data, text, options.device)
    print(f"\nwritten: {path} and .json")
    if failed:
        print(f"error exceeds the tolerance: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
