"""Pictures of stored results: memory against depth and batch, time against memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import style

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Other networks: their file, as far as it was measured, their name here, their marker.
OTHERS = {
    "segmentation-cpu": ("FC-DenseNet103", "P"),
    "volumes-cpu": ("MONAI, 3-D DenseNet-121", "s"),
    "super-resolution-cpu": ("spandrel, RRDBNet (ESRGAN)", "^"),
}
CHECKPOINTED = "plain, checkpointed layers"
# Where a label would meet another: its offset from the point, and the side of it at the point.
LABELS = {
    "checkpoint": ((-10, -3), "right"),
    "store": ((-8, -12), "right"),
    "auto": ((12, -4), "left"),
}


def stored(name: str) -> dict[str, Any]:
    """The figures of a stored run."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def curves(parts: dict[str, Any], path: Path) -> None:
    """Memory against depth and against the batch, side by side, as far as they were measured."""
    names = [name for name in ("depth", "batch") if name in parts]
    figure, axes = style.panels(len(names))
    shown: dict[str, float] = {}
    for axis, name in zip(axes[0], names, strict=True):
        part = parts[name]
        across, sizes = ("depths", "bytes_per_image") if name == "depth" else ("batches", "peaks")
        scale = 1e6 if name == "depth" else 1e9
        for peer, values in part[sizes].items():
            colour, label = style.PEERS[peer]
            x, y = part[across], [value / scale for value in values]
            axis.plot(x, y, "o-", color=colour, markersize=4.5, linewidth=1.8)
            text = f"{label}: " + (f"{y[-1]:,.0f} MB" if name == "depth" else f"{y[-1]:.2f} GB")
            axis.annotate(
                text, (x[-1], y[-1]), (7, 0), textcoords="offset points", color=colour,
                va="center", fontsize=9, annotation_clip=False,
            )  # fmt: skip
            shown |= {f"{name} {across} {n} {peer}": v for n, v in zip(x, y, strict=True)}
        if name == "depth":
            style.from_zero(
                axis, "DenseNet-BC, k = 12, 32 px", "depth (layers)", "activations per image (MB)"
            )
        else:
            style.from_zero(axis, "DenseNet-BC-100-12, 32 px", "batch (images)", "peak (GB)")
        axis.set_xlim(0)
        axis.set_xticks([0, *part[across]] if name == "depth" else part[across][2:])
    figure.subplots_adjust(wspace=0.95)
    style.save(figure, path, shown)


def _relative() -> list[tuple[str, str, str, float, float]]:
    """(network, marker, peer, memory, time) next to the original with the least of each."""
    found = []
    for case in stored("training-cpu")["cases"]:
        rows = {row["peer"]: row for row in case["peers"]}
        dtype = case["case"]["dtype"]
        marker = {"fp32": "o", "bf16": "D"}.get(dtype, "v")
        for peer, row in rows.items():
            ratios = [row[key] / rows["eager"][key] for key in ("peak", "median")]
            found.append((f"torchvision, DenseNet-121, {dtype}", marker, peer, *ratios))
    for file, (network, marker) in OTHERS.items():
        if not (RESULTS / f"{file}.json").exists():
            continue
        rows = stored(file)["peers"]
        originals = [row for row in rows if not row["peer"].startswith(("ours", CHECKPOINTED))]
        least = {key: min(row[key] for row in originals) for key in ("peak", "median")}
        for row in rows:
            if row not in originals:
                peer = {CHECKPOINTED: "checkpoint"}.get(row["peer"], row["peer"])
                peer = peer.removeprefix("ours, ")
                ratios = [row[key] / least[key] for key in ("peak", "median")]
                found.append((network, marker, peer, *ratios))
    return found


def time_and_memory(path: Path) -> None:
    """Every peer measured so far: DenseNet-121 in absolute figures, all networks next to their
    originals."""
    figure, axes = style.panels(2, size=(5.8, 4.6))
    shown: dict[str, float] = {}
    axis = axes[0][0]
    for case in stored("training-cpu")["cases"]:
        dtype, batch = case["case"]["dtype"], case["case"]["batch"]
        points = [(row["peak_per_image"] / 1e6, row["median"] / batch) for row in case["peers"]]
        for row, (memory, time) in zip(case["peers"], points, strict=True):
            colour, label = style.PEERS[row["peer"]]
            fill = colour if dtype == "fp32" else "white"
            axis.plot(memory, time, "o", color=colour, markerfacecolor=fill, markersize=9)
            if dtype == "fp32":
                offset, side = LABELS.get(row["peer"], ((0, 11), "center"))
                axis.annotate(
                    label, (memory, time), offset, textcoords="offset points", color=colour,
                    ha=side, fontsize=9,
                )  # fmt: skip
            shown |= {f"{dtype} {row['peer']} MB": memory, f"{dtype} {row['peer']} ms": time}
    axis.plot([], [], "o", color="#555555", markersize=8, label="float32")
    axis.plot([], [], "o", color="#555555", mfc="white", markersize=8, label="bfloat16")
    axis.legend(loc="lower right")
    axis.set_xscale("log")
    axis.set_xlim(8, 220)
    ticks = (10, 20, 50, 100, 200)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    style.from_zero(
        axis, "DenseNet-121, 224 px, batch 8, two CPU cores",
        "peak memory per image (MB), log scale",
        "time of a training step per image (ms)",
    )  # fmt: skip
    axis.set_ylim(0, 1.12 * max(shown[name] for name in shown if name.endswith(" ms")))

    axis = axes[0][1]
    axis.axhline(1, color="#888888", linewidth=1)
    axis.axvline(1, color="#888888", linewidth=1)
    labelled: set[str] = set()
    for network, marker, peer, memory, time in _relative():
        if peer == "eager":
            continue
        colour, label = style.PEERS[peer]
        axis.plot(memory, time, marker, color=colour, markersize=8, alpha=0.95)
        shown[f"{network}, {peer}: memory"] = memory
        shown[f"{network}, {peer}: time"] = time
        labelled |= {peer}
    axis.annotate(
        "the original", (1, 1), (-6, 6), textcoords="offset points", ha="right", color="#555555"
    )
    handles = [
        axis.plot([], [], "o", color=style.PEERS[peer][0], label=style.PEERS[peer][1])[0]
        for peer in style.PEERS
        if peer in labelled
    ]
    networks = dict.fromkeys((network, marker) for network, marker, *_ in _relative())
    handles += [
        axis.plot([], [], marker, color="#555555", label=network)[0] for network, marker in networks
    ]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.02), fontsize=9)
    axis.set_xlim(0, 1.1)
    style.from_zero(
        axis,
        "Every network next to its original",
        "peak memory, share of the original's",
        "time of a training step, share of the original's",
    )
    axis.set_ylim(0, 1.35)
    figure.subplots_adjust(wspace=0.25)
    style.save(figure, path, shown)
