"""Bytes that a training step with SyncBatchNorm exchanges: ours next to PyTorch's scheme.

    python benchmarks/bench_sync.py                     DenseNet-121, 2 and 4 processes, CPU, gloo

Ours are counted where they are handed to `torch.distributed`, in every process of a real step, and
must be the same in all of them. PyTorch's SyncBatchNorm does not run on the CPU; its collectives
are those of `torch/nn/modules/_functions.py`: for a norm of C channels an all_gather of 2 C + 1
values (mean, inverse deviation, count) forward and an all_reduce of 2 C values backward, in the
dtype of its statistics, float32 for float32 images as here.

    handed in           the tensor that a process hands to a collective
    in and back         and what it gets back: all processes' tensors of an all_gather, the sum of
                        an all_reduce
    sent                what a process sends when a ring of n processes executes it: (n - 1) times
                        the tensor for an all_gather, 2 (n - 1) / n times for an all_reduce

Writes benchmarks/results/sync-cpu.{json,md}; exit status 1 where ours takes more than a fifth of
PyTorch's bytes, in and back.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import densenet_efficient
from densenet_efficient.bench.tables import markdown_table, write_results

MODELS = ("densenet121", "densenet169", "densenet201", "densenet264")


@dataclass(frozen=True)
class Call:
    """One collective: its name, and the bytes that a process hands in."""

    name: str
    size: int

    def in_and_back(self, processes: int) -> int:
        """Bytes that a process hands in and gets back."""
        return self.size * (1 + (processes if self.name == "all_gather" else 1))

    def sent(self, processes: int) -> float:
        """Bytes that a process sends in a ring."""
        times = processes - 1 if self.name == "all_gather" else 2 * (processes - 1) / processes
        return self.size * times


def pytorch_calls(model: nn.Module) -> list[Call]:
    """The collectives of a training step by PyTorch's SyncBatchNorm."""
    item = torch.float32.itemsize
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    forward = [Call("all_gather", (2 * c + 1) * item) for c in channels]
    return forward + [Call("all_reduce", 2 * c * item) for c in channels]


def build(name: str) -> nn.Module:
    """The model, of ours, with random weights."""
    torch.manual_seed(0)
    model: nn.Module = getattr(densenet_efficient, name)()
    return model


def _process(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=processes)  # fmt: skip
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(options.model))
    x = torch.randn(options.batch + rank, 3, options.image_size, options.image_size)
    calls: list[tuple[str, int]] = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
                 "all_to_all_single", "broadcast"):  # fmt: skip
        setattr(dist, name, _noting(name, getattr(dist, name), calls))
    model(x).square().sum().backward()
    torch.save(calls, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _noting(name: str, function: Any, calls: list[tuple[str, int]]) -> Any:
    def call(*args: Any, **keywords: Any) -> Any:
        calls.append((name, args[0].numel() * args[0].element_size()))
        return function(*args, **keywords)

    return call


def our_calls(processes: int, options: argparse.Namespace) -> list[Call]:
    """The collectives of a training step of ours, counted."""
    with tempfile.TemporaryDirectory() as folder:
        given = (processes, folder, options)
        torch.multiprocessing.spawn(_process, given, nprocs=processes)  # type: ignore[no-untyped-call]
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(processes)]
    assert all(calls == found[0] for calls in found), "the processes issued different collectives"
    calls = [Call(*call) for call in found[0]]
    assert {call.name for call in calls} == {"all_reduce"}, "no byte count for another collective"
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="densenet121")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="of the first process; one more each")
    options = parser.parse_args()
    theirs, rows, data, worst = pytorch_calls(build(options.model)), [], {}, float("inf")
    for processes in options.processes:
        ours = our_calls(processes, options)
        sums = {}
        for who, calls in (("PyTorch's scheme", theirs), ("ours", ours)):
            sums[who] = {
                "collectives": len(calls),
                "handed in": sum(call.size for call in calls),
                "in and back": sum(call.in_and_back(processes) for call in calls),
                "sent": round(sum(call.sent(processes) for call in calls)),
            }
            cells = [f"{value:,}" for value in sums[who].values()]
            rows.append((f"{processes} processes, {who}", *cells))
        ratio = {key: value / sums["ours"][key] for key, value in sums["PyTorch's scheme"].items()}
        rows.append((f"{processes} processes, times fewer", *(f"{r:.2f}" for r in ratio.values())))
        worst = min(worst, ratio["in and back"])
        data[str(processes)] = sums
    columns = ("bytes of a step in one process", "collectives", "handed in", "in and back", "sent")
    text = f"{options.model}, float32.\n\n" + markdown_table(columns, rows)
    print(text)
    results = Path(__file__).resolve().parent / "results"
    title = "Bytes exchanged by SyncBatchNorm"
    path = write_results(results, "sync-cpu", title, data, text, "cpu")
    print(f"\nwritten: {path} and .json")
    if worst < 5:
        print(f"ours takes more than a fifth of PyTorch's bytes: {worst:.2f} times fewer",
              file=sys.stderr)  # fmt: skip
    return 1 if worst < 5 else 0


if __name__ == "__main__":
    sys.exit(main())
