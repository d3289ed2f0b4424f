"""This checkout next to an earlier revision of itself, step by step in turns: what did a change
cost, or save?

    python benchmarks/bench_revision.py 9905c77          build that revision, measure both
    python benchmarks/bench_revision.py main --rounds 15 --network densenet169

The revision is exported and built under build/revisions, once. Either tree runs in a process of its
own that imports nothing but its own package, through names that are public in both, so the order of
files inside does not matter. Measured for each memory mode:

- time: a training step at the given batch and size, fp32 and bf16 autocast, channels-last; medians
  of the turns.
- peak: memory of a training step above what was live before it, each in a fresh process.
- host: processor time of a step of DenseNet-BC-100-12 (8 px images, batch 2, one thread) with every
  operator of the library replaced by one that returns at once: what Python and the dispatcher cost.

Writes benchmarks/results/revision-cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODES = ("store", "recompute")
DTYPES = ("fp32", "bf16")

NO_OPERATOR = """
#include <torch/library.h>
static void nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}
TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  for (const char* name : {%s}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&nothing>());
  }
}
"""


# The process that measures one tree -----------------------------------------------------------


def worker(root: Path) -> None:
    """Answers requests, one JSON object a line, with the package of `root`."""
    sys.path.insert(0, str(root))
    import torch

    import densenet_efficient

    assert Path(densenet_efficient.__file__).is_relative_to(root), densenet_efficient.__file__
    steps: dict[tuple[Any, ...], Callable[[], None]] = {}
    removed = False

    def step_of(request: dict[str, Any]) -> Callable[[], None]:
        key = tuple(sorted(request.items()))
        if key not in steps:
            steps[key] = Step(torch, densenet_efficient, **request)
            steps[key]()
        return steps[key]

    def timed(clock: Callable[[], float], step: Callable[[], None]) -> float:
        begin = clock()
        step()
        return clock() - begin

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("kind")
        answer: Any
        if kind == "time":
            answer = timed(time.perf_counter, step_of(request))
        elif kind == "peak":
            step = Step(torch, densenet_efficient, **request)
            step()
            measure = measure_step_of(ROOT)
            answer = measure(step.forward, step.rest, torch.device("cpu")).peak
        else:
            torch.set_num_threads(1)
            request |= {"network": "densenet_cifar", "size": 8, "batch": 2, "dtype": "fp32"}
            step = step_of(request)  # loads the library with its first call
            if not removed:
                remove_operators(torch)
                removed = True
                step()
            answer = statistics.median(timed(time.process_time, step) for _ in range(25))
        print(json.dumps(answer), flush=True)


class Step:
    """A training step: forward, cross entropy, backward."""

    def __init__(
        self, torch: Any, package: Any, network: str, batch: int, size: int, dtype: str, memory: str
    ) -> None:
        torch.manual_seed(0)
        make = getattr(package, network)
        self.torch, self.dtype = torch, dtype
        model = make(100, 12, memory=memory) if network == "densenet_cifar" else make(memory=memory)
        self.model = model.to(memory_format=torch.channels_last)
        images = torch.randn(batch, 3, size, size)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,))

    def forward(self) -> Any:
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.dtype == "bf16"):
            logits = self.model(self.images)
        return self.torch.nn.functional.cross_entropy(logits.float(), self.labels)

    def rest(self, loss: Any) -> None:
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.rest(self.forward())


def measure_step_of(root: Path) -> Callable[..., Any]:
    """The same measurement for both trees: this checkout's, which needs nothing but torch."""
    path = root / "densenet_efficient" / "memory" / "process.py"
    spec = importlib.util.spec_from_file_location("step_memory", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["step_memory"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure_step


def remove_operators(torch: Any) -> None:
    """From now on the library's operators on the CPU do nothing."""
    from torch.utils import cpp_extension

    prefix = "densenet_efficient::"
    names = torch._C._dispatch_get_all_op_names()
    ours = sorted(name.split(".")[0] for name in names if name.startswith(prefix))
    quoted = ", ".join(f'"{name}"' for name in ours)
    folder = ROOT / "build" / "revisions" / f"no-operator-{zlib.crc32(quoted.encode()):x}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.cpp").write_text(NO_OPERATOR % quoted)
    cpp_extension.load(
        "no_operator",
        [str(folder / "source.cpp")],
        extra_cflags=["-O2"],  # without, it takes longer than what is measured
        build_directory=str(folder),
        is_python_module=False,
    )


# The program ----------------------------------------------------------------------------------


class Tree:
    """A checkout, and the process that measures it."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, __file__, "--worker", str(root)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, **(environment or {})},
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench_revision: a measuring process ended; see its message above")
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def exported(revision: str) -> tuple[Path, str]:
    """The revision's tree, built for the CPU, and its short name."""
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "--verify", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise SystemExit(f"revision: expected one that git knows, got {revision!r}")
    name = found.stdout.strip()
    tree = ROOT / "build" / "revisions" / name
    if not (tree / "built").exists():
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", name], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
        environment = {**os.environ, "DENSENET_EFFICIENT_CUDA": "0"}
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, env=environment, check=True)
        (tree / "built").touch()
    return tree, name


def in_turns(trees: list[Tree], rounds: int, request: dict[str, Any]) -> list[list[float]]:
    """The figures of each tree; who comes first changes from round to round."""
    figures: list[list[float]] = [[] for _ in trees]
    for turn in range(rounds + 1):
        order = range(len(trees)) if turn % 2 else reversed(range(len(trees)))
        for index in order:
            value = trees[index].ask(**request)
            if turn:  # the first round warms up
                figures[index].append(value)
    return figures


def measure(roots: list[Path], options: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """Rows: what, unit, the revision's figure, this checkout's."""
    from densenet_efficient.memory.process import ALLOCATOR_SETTINGS

    rows = []

    def add(what: str, unit: str, values: list[float]) -> None:
        rows.append((what, unit, values[0], values[1]))
        print(f"{what}: {values[0]:.1f} -> {values[1]:.1f} {unit}", flush=True)

    work = {"network": options.network, "batch": options.batch, "size": options.image_size}
    trees = [Tree(root) for root in roots]
    for dtype in DTYPES:
        for memory in MODES:
            request = {"kind": "time", **work, "dtype": dtype, "memory": memory}
            seconds = in_turns(trees, options.rounds, request)
            medians = [1e3 * statistics.median(values) for values in seconds]
            add(f"time, {dtype}, {memory}", "ms", medians)
    for tree in trees:
        tree.close()
    for dtype in DTYPES:
        for memory in MODES:
            peaks = []
            for root in roots:
                tree = Tree(root, ALLOCATOR_SETTINGS)
                peak = tree.ask(kind="peak", **work, dtype=dtype, memory=memory)
                peaks.append(peak / 1e6)
                tree.close()
            add(f"peak, {dtype}, {memory}", "MB", peaks)
    for memory in MODES:
        trees = [
            Tree(root, {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}) for root in roots
        ]
        seconds = in_turns(trees, options.rounds, {"kind": "host", "memory": memory})
        add(f"host, {memory}", "ms", [1e3 * statistics.median(values) for values in seconds])
        for tree in trees:
            tree.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="any name git knows; this checkout is compared with it")
    parser.add_argument("--network", default="densenet121", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: 9)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from densenet_efficient.bench.tables import markdown_table, write_results

    tree, name = exported(options.revision)
    rows = measure([tree, ROOT], options)
    table = markdown_table(
        ["measure", f"at {name}", "now", "now / then"],
        [
            (what, f"{old:,.1f} {u}", f"{new:,.1f} {u}", f"{new / old:.3f}")
            for what, u, old, new in rows
        ],
    )
    path = write_results(
        options.output,
        "revision-cpu",
        f"This checkout next to revision {name}",
        {"revision": name, "rows": [dict(what=w, unit=u, then=o, now=n) for w, u, o, n in rows]},
        f"{options.network}, {options.image_size} px, batch {options.batch}\n\n{table}",
        "cpu",
    )
    print(f"\n{table}\n\nwritten: {path} and .json")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
