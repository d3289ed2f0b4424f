"""Which part of a kernel a line of the sources belongs to, by the function around it."""

from __future__ import annotations

import re
from functools import cache

from .compiler import ROOT, Place

# The parts of a tile's work, and the functions that do them; of nested ones the innermost counts.
PARTS = {
    "copies": ("load", "copy_chunk", "copy_rows", "copy_aligned", "copy_gradient",
               "copy_scale_shift", "copy_norm", "copy_tile_rows", "copy_halo", "copy_group",
               "stage_pixels", "cp_async"),
    "gradient": ("form_dy", "load_gradient", "load_gradient_panel", "correct_operand"),
    "norm": ("normalise_panel", "norm_relu_operand", "load_operand_norm"),
    "products": ("multiply_panel", "multiply_step", "multiply_tile", "multiply_add",
                 "weight_gradient", "data_gradient"),
    "epilogue": ("write_rows", "finish_rows", "store_rounded", "store_chunk", "finish_panel",
                 "add_sums", "write", "give_sums", "take_sums"),
    "moments": ("measure_panel", "add", "add_square", "merge", "start",
                "finish", "merge_shared", "RowCounts"),
}  # fmt: skip
OTHER = "rest"
_PART_OF = {function: part for part, functions in PARTS.items() for function in functions}
_FUNCTION = re.compile(
    r"^\s*(?:__device__|DE_HOST_DEVICE|__global__)[^;]*?\b(\w+)\((?!32|kM|kC|kF)"
)
_KERNEL = re.compile(r"^\s+(norm_relu_\w+_kernel)\(")
_LAMBDA = re.compile(r"^(\s*)const auto (\w+) = \[&\]")


@cache
def functions(file: str) -> dict[int, str]:
    """The innermost function around each line of a kernel file."""
    found = next((ROOT / "csrc").rglob(file), None)
    result: dict[int, str] = {}
    if found is None:
        return result
    current = ""
    around: list[tuple[str, str]] = []  # of each lambda that is open: what it is in, its indent
    for number, line in enumerate(found.read_text().splitlines(), 1):
        if (match := _FUNCTION.match(line)) or (match := _KERNEL.match(line)):
            current = match[1]
            around.clear()
        elif match := _LAMBDA.match(line):
            if line.endswith("};"):
                result[number] = match[2]
                continue
            around.append((current, match[1]))
            current = match[2]
        result[number] = current
        if around and line.startswith(around[-1][1] + "};"):
            current, _ = around.pop()
    return result


def part_of(places: tuple[Place, ...]) -> str:
    """Of an instruction's places in the source, the innermost first."""
    for file, line in places:
        part = _PART_OF.get(functions(file).get(line, ""))
        if part is not None:
            return part
    return OTHER
