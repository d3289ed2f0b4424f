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
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import densenet_efficient
from densenet_efficient.bench.tables import markdown_table, write_results
from densenet_efficient.torchvision_compat import import_torchvision

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def step(
    model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The output, the input's gradient and every parameter's, by name; dtype: autocast's."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        output = model(x)
    nn.functional.cross_entropy(output.to(x.dtype), target).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


def errors(moved: bool, dtype: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Name -> (ours, eager's), the medians over the draws."""
    torch.manual_seed(0)
    models = import_torchvision("torchvision.models")
    eager = models.densenet121(weights=None, num_classes=10).to(options.device)
    if moved:
        for norm in (m for m in eager.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    exact = copy.deepcopy(eager).double()
    ours = densenet_efficient.convert(copy.deepcopy(eager))
    found: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(options.draws):
        x = torch.randn(options.batch, 3, options.image_size, options.image_size)
        x = x.to(options.device, memory_format=torch.channels_last)
        target = torch.randint(10, (options.batch,)).to(options.device)
        truth = step(exact, x.double(), target, None)
        for which, model in enumerate((ours, eager)):
            for name, value in step(model, x, target, AUTOCAST[dtype]).items():
                error = (value.double() - truth[name]).norm() / truth[name].norm()
                found.setdefault(name, ([], []))[which].append(error.item())
    return {k: (statistics.median(a), statistics.median(b)) for k, (a, b) in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(AUTOCAST))
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
        found = errors(moved, dtype, options)
        worst = sorted(found, key=lambda name: found[name][0] / found[name][1], reverse=True)
        together = math.hypot(*(a for a, _ in found.values())) / math.hypot(
            *(b for _, b in found.values())
        )
        rows = [
            (name, f"{found[name][0]:.2e}", f"{found[name][1]:.2e}", f"{a / b:.2f}")
            for name in worst[:5]
            for a, b in (found[name],)
        ]
        rows.append(("all tensors together", "", "", f"{together:.2f}"))
        first = worst[0]
        if together > 1.2 or found[first][0] > 2 * found[first][1]:
            failed.append(title)
        sections.append(
            f"## {title}\n\n" + markdown_table(("tensor", "ours", "eager", "ratio"), rows)
        )
        data[title] = {name: list(pair) for name, pair in found.items()}
    text = "\n\n".join(sections)
    print(text)
    results = Path(__file__).resolve().parent / "results"
    name = f"error-{torch.device(options.device).type}"
    path = write_results(results, name, "Error against float64", data, text, options.device)
    print(f"\nwritten: {path} and .json")
    if failed:
        print(f"beyond the bars: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
