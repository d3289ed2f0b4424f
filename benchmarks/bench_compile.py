"""torch.compile of a whole network: time to compile and run the first training step, ours next to
torchvision's, and that the compiled network does what the eager one does.

    python benchmarks/bench_compile.py                          DenseNet-264 of both, minutes
    python benchmarks/bench_compile.py --peer-network densenet121   a smaller one of torchvision's

Each network is compiled in a process of its own, with `fullgraph=True`, the default backend and an
empty cache: forward and backward of the cross entropy, from the call to the gradients. torchvision
has no DenseNet-264; its DenseNet class builds one. The first step's loss and gradients are compared
with those of the same network in eager mode, float32, relative to the largest gradient; then the
batch changes twice, and the number of graphs is counted: one for the first size, one for any.

Writes benchmarks/results/compile-cpu.{json,md}; exit status 1 where ours takes more than a tenth of
torchvision's time, or differs from eager mode by more than twice what torchvision's does, which
counts as 1e-5 where it is less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import nn

from densenet_efficient.bench.tables import markdown_table, write_results
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.nn.architecture import CONFIGURATIONS
from densenet_efficient.torchvision_compat import import_torchvision

KINDS = ("ours", "torchvision")


def build(kind: str, name: str, memory: str) -> nn.Module:
    """The network, with the same random weights of either kind."""
    torch.manual_seed(0)
    if kind == "ours":
        return NetworkSpec(name).build(memory)
    return import_torchvision().models.DenseNet(**CONFIGURATIONS[name])


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradients of one step."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One network in this process."""
    torch.set_num_threads(options.threads)
    model = build(options.kind, options.network, options.memory)
    x = torch.randn(options.batch, 3, options.image_size, options.image_size)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = gradients(model, x)
    model.load_state_dict(state)
    compiled = torch.compile(model, fullgraph=True, backend=options.backend)
    before, cpu = time.perf_counter(), time.process_time()
    found = gradients(compiled, x)
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    largest = max(float(g.abs().max()) for g in expected)
    error = max(
        float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)
    ) / largest  # fmt: skip
    nodes = torch._dynamo.utils.counters["stats"]["calls_captured"]
    result = {"seconds": seconds, "cpu_seconds": cpu, "calls": nodes, "error": error}
    if options.kind == "ours":
        for size in (options.batch + 1, options.batch + 3):
            gradients(compiled, torch.randn(size, 3, options.image_size, options.image_size))
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        result["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return result


def measured(kind: str, network: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--kind", kind, "--network", network, *arguments]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        text = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        return json.loads(text.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=CONFIGURATIONS, default="densenet264")
    parser.add_argument("--peer-network", choices=CONFIGURATIONS, help="default: the same")
    parser.add_argument("--memory", default="recompute")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--kind", choices=KINDS, help="measure this one alone and print it")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options)))
        return 0
    arguments = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("memory", "batch", "image_size", "threads", "backend")
    ]
    peer = options.peer_network or options.network
    data, rows = {}, []
    for kind, network in (("ours", options.network), ("torchvision", peer)):
        found = measured(kind, network, arguments)
        data[kind] = {"network": network, **found}
        times = (f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}")
        graphs = str(found.get("graphs", ""))
        rows.append(
            (f"{kind}, {network}", *times, str(found["calls"]), f"{found['error']:.1e}", graphs)
        )
        print(rows[-1], flush=True)
    ratio = data["ours"]["seconds"] / data["torchvision"]["seconds"]
    data["ratio"] = ratio
    columns = ("network", "s", "CPU s, compilers apart", "calls in the graph",
               "error to eager", "graphs, three batch sizes")  # fmt: skip
    text = (
        f"Compilation and first training step, {options.image_size} px, batch {options.batch}, "
        f"float32, {options.threads} threads, backend {options.backend}.\n\n"
        + markdown_table(columns, rows)
        + f"\n\nOurs takes {ratio:.3f} of torchvision's time."
    )
    print(text)
    results = Path(__file__).resolve().parent / "results"
    path = write_results(results, "compile-cpu", "Compilation", data, text, "cpu")
    print(f"\nwritten: {path} and .json")
    error, most = data["ours"]["error"], 2 * max(data["torchvision"]["error"], 1e-5)
    broken = []
    if ratio > 0.1:
        broken.append(f"at most a tenth of torchvision's time was expected, got {ratio:.3f}")
    if not error <= most:
        broken.append(f"an error of at most {most:.1e} was expected, got {error:.1e}")
    for sentence in broken:
        print(f"bench_compile: {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
