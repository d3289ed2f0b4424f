"""The demonstration: train a DenseNet-BC on real digits, then compare ours with the reference.

1. BC-40-12 on the 1,797 handwritten digits that scikit-learn bundles (8x8, shown at 16x16), a
   quarter of them held out.
2. For that network and for DenseNet-121 at 224 px: agreement with the reference in float64, time of
   a training step in turns, peak memory in processes of their own.
3. Memory against depth, as Pleiss et al. (arXiv 1707.06990) draw it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.accuracy import largest_difference
from ..bench.comparison import compare
from ..bench.steps import Case, measure_memory
from ..bench.tables import markdown_table, megabytes, write_results
from ..models.networks import NetworkSpec
from ..train.data import load_data
from ..train.outputs import check_installed
from ..train.recipes import recipe_for
from ..train.trainer import Trainer, TrainingOptions
from .parser import add_command, count, whole_number

__all__ = ["TARGET_ACCURACY", "register", "run_demo"]

TARGET_ACCURACY = 0.985
DIGITS = NetworkSpec("densenet_cifar", depth=40, growth_rate=12, num_classes=10, in_channels=1)
PEERS = ("eager", "checkpoint", "store", "recompute")
LABELS = {
    "eager": "reference",
    "checkpoint": "reference, checkpointed",
    "store": "ours, store",
    "recompute": "ours, recompute",
}
DEPTHS = (40, 100, 160)
DEPTH_BATCH = 8


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "demo", "train on the bundled digits, then compare with the reference"
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--seed", type=whole_number, default=0, help="of weights and order")
    parser.add_argument("--epochs", type=count, help="fewer for a quick look (default: 25)")


def _run(options: argparse.Namespace, words: list[str]) -> int:
    check_installed("safetensors", "tqdm", "matplotlib", "torchvision")
    return run_demo(options.out, seed=options.seed, epochs=options.epochs)


def run_demo(out: Path, *, seed: int = 0, epochs: int | None = None) -> int:
    """Train, compare, draw; writes `demo.md`, `demo.json`, `demo.png` and the run into `out`.

    Args:
        epochs: instead of the recipe's; the accuracy is then only reported, not required.

    Returns the exit status: 1 where the held-out accuracy is below `TARGET_ACCURACY`.
    """
    start = time.perf_counter()
    print("1. DenseNet-BC-40-12 on handwritten digits, a quarter held out", flush=True)
    recipe = recipe_for("digits", epochs=epochs)
    options = TrainingOptions(DIGITS, recipe, out / "run", seed=seed, overwrite=True)
    history = Trainer(options, load_data("digits")).run()
    accuracy = history[-1]["test_accuracy"]

    print("\n2. Ours against the reference", flush=True)
    cases = [Case(DIGITS, 64, 16), Case(NetworkSpec("densenet121"), 8, 224)]
    compared: list[dict[str, Any]] = []
    for case in cases:
        print(f"   measuring {case.title}", flush=True)
        rows = compare(case, PEERS, rounds=5, warm_up=1)
        for row in rows:
            row["largest_difference"] = largest_difference(case, row["peer"])
        compared.append({"case": case.describe(), "title": case.title, "peers": rows})

    print("\n3. Memory against depth", flush=True)
    curves = _memory_against_depth()
    _draw(history, compared, curves, out / "demo.png")

    tables = "\n\n".join(f"{entry['title']}\n\n{_table(entry['peers'])}" for entry in compared)
    verdict = f"held-out accuracy on the digits: {accuracy:.2%}"
    print(f"\n{tables}\n\n{verdict}")
    figures = {
        "history": history,
        "comparison": compared,
        "depths": DEPTHS,
        "peak_bytes": curves,
    }
    text = f"{verdict}\n\n{tables}\n\n![figure](demo.png)"
    page = write_results(out, "demo", "Demonstration", figures, text, "cpu")
    print(f"figure: {out / 'demo.png'}, page: {page}; {time.perf_counter() - start:.0f} s")
    if epochs is None and accuracy < TARGET_ACCURACY:
        print(f"accuracy: expected at least {TARGET_ACCURACY:.1%}, got {accuracy:.2%}")
        return 1
    return 0


def _table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    return markdown_table(
        ["", "peak MB", "/ reference", "ms/step", "/ reference", "largest difference (fp64)"],
        [
            [
                LABELS[row["peer"]],
                megabytes(row["peak"]),
                f"{row['peak'] / first['peak']:.3f}",
                f"{row['median']:.1f}",
                f"{row['time_ratio']:.2f}",
                f"{row['largest_difference']:.1e}",
            ]
            for row in rows
        ],
    )


def _memory_against_depth() -> dict[str, list[int]]:
    """Peak bytes of a training step of DenseNet-BC with k = 12 at 32 px."""
    curves: dict[str, list[int]] = {}
    for peer in ("eager", "checkpoint", "recompute"):
        curves[peer] = []
        for depth in DEPTHS:
            network = NetworkSpec("densenet_cifar", depth=depth, growth_rate=12, num_classes=10)
            curves[peer].append(measure_memory(Case(network, DEPTH_BATCH, 32), peer)["peak"])
    return curves


def _draw(
    history: list[dict[str, Any]],
    compared: list[dict[str, Any]],
    curves: dict[str, list[int]],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"eager": "C3", "checkpoint": "C1", "store": "C2", "recompute": "C0"}
    figure, (training, bars, depth) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    epochs = [row["epoch"] for row in history]
    training.plot(epochs, [1 - row["train_accuracy"] for row in history], label="training")
    training.plot(epochs, [1 - row["test_accuracy"] for row in history], label="held out")
    training.axhline(1 - TARGET_ACCURACY, color="grey", linestyle=":", label="target")
    training.set(title="Digits, DenseNet-BC-40-12", xlabel="epoch", ylabel="error", yscale="log")
    training.set_ylim(top=1)

    rows = compared[-1]["peers"]
    names = [LABELS[row["peer"]].replace(", ", ",\n") for row in rows]
    peaks = [row["peak"] / 1e6 for row in rows]
    drawn = bars.bar(names, peaks, color=[colours[row["peer"]] for row in rows])
    bars.bar_label(drawn, fmt="%.0f")
    bars.set_title("DenseNet-121, 224 px, batch 8, fp32")
    bars.set_ylabel("peak of a training step, MB")
    bars.margins(y=0.1)

    for peer, values in curves.items():
        depth.plot(DEPTHS, [v / 1e6 for v in values], "o-", color=colours[peer], label=LABELS[peer])
    depth.set(title=f"DenseNet-BC, k = 12, 32 px, batch {DEPTH_BATCH}", xlabel="depth (layers)")
    depth.set_ylabel("peak of a training step, MB")
    depth.set_ylim(bottom=0)
    for axis in (training, depth):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
