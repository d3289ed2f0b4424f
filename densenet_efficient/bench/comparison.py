"""Peers compared on one case: agreement first, then time in turns, then memory; and the table."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..core import arena
from .accuracy import agreement, check_agreement
from .steps import PEERS, Case, TrainingStep, measure_memory, quantiles, time_in_turns
from .tables import markdown_table, megabytes

__all__ = ["compare", "comparison_cells", "comparison_table"]

GRAPH = "-graph"


def compare(
    case: Case,
    peers: Sequence[str],
    *,
    rounds: int = 9,
    inner: int = 1,
    warm_up: int = 2,
    memory: bool = True,
    exact_memory: bool = False,
) -> list[dict[str, Any]]:
    """One row of figures per peer: `error` against float64 (see `agreement`), milliseconds a step
    (`median`, `p10`, `p90`), `time_ratio` to the first peer, and, with `memory`, bytes (`peak`,
    `kept`, `before`).

    Args:
        peers: names of `PEERS`; with "-graph" after it the whole step is replayed as a CUDA graph.

    Raises:
        ValueError: an unknown peer; a graph without a CUDA device.
        MeasurementError: ours disagrees with float64, or the kernels would not run it: nothing is
            timed. A step that is to be a graph runs eagerly.
    """
    kinds = {peer: peer.removesuffix(GRAPH) for peer in peers}
    for kind in kinds.values():
        if kind not in PEERS:
            raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {kind!r}")
    device = torch.device(case.device)
    with _fastest_settings(device):
        errors = agreement(case, list(kinds.values()))
        check_agreement(errors)
        _free(device)
        steps = {
            peer: TrainingStep(case, kind, warm_up=warm_up, graph=peer.endswith(GRAPH))
            for peer, kind in kinds.items()
        }
        times = time_in_turns(dict(steps), rounds, device, inner)
        warm_up_seconds = {peer: step.warm_up_seconds for peer, step in steps.items()}
        plain = [peer for peer in peers if memory and not peer.endswith(GRAPH)]
        if device.type == "cuda":
            found = {peer: steps[peer].memory() for peer in plain}
            steps.clear()
        else:
            steps.clear()
            _free(device)
            found = {peer: measure_memory(case, kinds[peer], exact=exact_memory) for peer in plain}
        rows = []
        for peer, kind in kinds.items():
            row: dict[str, Any] = {
                "peer": peer,
                "error": errors.get(kind),
                **quantiles(times[peer]),
            }
            row["images_per_second"] = case.batch / row["median"] * 1e3
            row["warm_up_seconds"] = warm_up_seconds[peer]
            row["milliseconds"] = times[peer]
            if peer in found:
                row.update(found[peer], peak_per_image=found[peer]["peak"] / case.batch)
            rows.append(row)
    for row in rows:
        row["time_ratio"] = row["median"] / rows[0]["median"]
    return rows


@contextlib.contextmanager
def _fastest_settings(device: torch.device) -> Iterator[None]:
    """TF32 and cuDNN's search, for every peer alike; the caller's settings come back."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def _free(device: torch.device) -> None:
    gc.collect()
    arena.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """`comparison_cells` in Markdown."""
    return markdown_table(*comparison_cells(rows))


def comparison_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and a row of text for each peer; ratios are to the first row."""
    first = rows[0]
    columns = ["peer", "ms/step", "10 %..90 %", "images/s", f"time / {first['peer']}"]
    columns += ["peak MB", "MB/image", f"memory / {first['peer']}", "error / eager's"]
    reference = next((row["error"] for row in rows if row["peer"] == "eager"), None)
    table = []
    for row in rows:
        cells = [
            row["peer"],
            f"{row['median']:,.1f}",
            f"{row['p10']:,.1f}..{row['p90']:,.1f}",
            f"{row['images_per_second']:,.1f}",
            f"{row['time_ratio']:.2f}",
        ]
        if "peak" in row:
            cells += [megabytes(row["peak"]), megabytes(row["peak_per_image"])]
            cells.append(f"{row['peak'] / first['peak']:.3f}" if "peak" in first else "-")
        else:
            cells += ["-", "-", "-"]
        known = reference and row["error"] is not None
        cells.append(f"{row['error'] / reference:.2f}" if known else "-")
        table.append(cells)
    return columns, table
