"""One call of an operator, drawn at random, and what its results must be.

In float64 an output is the reference's to 1e-9 of the largest value at stake. In lower precision it
errs at most twice as much as PyTorch's own layers do on the same arguments, or by a few roundings
of the largest value at stake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.ops import compiled
from tools.op_cases import OPERATORS, Case, dimensions, eager_outputs, make, reference_outputs

EXACT = 1e-9
ROUNDINGS = 8
CHANNELS = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 130]))
SIDE = st.integers(1, 6)


@dataclass(frozen=True)
class Call:
    """op and sizes: see `op_cases.make`. before: channels in front of each activation's own.
    margin: columns on either side of each table. running: norms by statistics of their own, not the
    batch's. wanted: whether statistics and weight gradients are. shared: whether y lies after x in
    one buffer. changes: arguments to set otherwise."""

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    before: int
    margin: int
    running: bool
    wanted: bool
    shared: bool
    changes: tuple[tuple[str, Any], ...]
    seed: int

    def make(self) -> Case:
        torch.manual_seed(self.seed)
        case = make(
            self.op, self.sizes, self.dtype, before=self.before, table_margin=self.margin,
            **dict(self.changes),
        )  # fmt: skip
        given = case.arguments
        if self.running:
            for name in ("norm", "correction"):
                table = given.get(name)
                if name not in case.written and table is not None:
                    table.copy_(torch.randn_like(table))
                    if name == "norm":
                        table[1] = table[4] - table[2] * table[0]
        if not self.wanted:
            for name in {"stats", "dweight"} & set(case.written):
                if self.op != "channel_stats":
                    given[name] = None
            case.written = tuple(n for n in case.written if given[n] is not None)
        if self.shared and given["x"].shape[:-1] == given["y"].shape[:-1]:
            self._share(case)
        return case

    def _share(self, case: Case) -> None:
        """x and y as slices of one buffer, y after x: what a dense layer does."""
        x, y = case.arguments["x"], case.arguments["y"]
        channels = x.shape[-1]
        whole = x.new_full((*x.shape[:-1], channels + y.shape[-1]), torch.nan)
        case.arguments["x"] = whole[..., :channels].copy_(x)
        case.arguments["y"] = whole[..., channels:]


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    op = draw(st.sampled_from(OPERATORS))
    names = dimensions(op)
    sizes: list[int] = []
    if names[0] == "N":
        sides = draw(st.lists(SIDE, min_size=1, max_size=3))
        sizes = [draw(st.integers(1, 3)), *sides]
        names = names[3:]
    for name in names:
        sizes.append(draw(st.integers(1, 80) if name == "M" else CHANNELS))
    changes: dict[str, Any] = {}
    if op == "norm_relu_conv3x3_backward":
        changes["accumulate"] = draw(st.booleans())
        if draw(st.booleans()):
            changes |= {"y": None, "correction": None}
    if op in ("norm_correction", "transition_backward", "stem_backward") and draw(st.booleans()):
        changes["count"] = 0
    if op == "norm_fold":
        changes |= {name: None for name in ("gamma", "beta") if draw(st.booleans())}
    forward = op.endswith("_forward")
    return Call(
        op=op,
        sizes=tuple(sizes),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        before=draw(st.integers(0, 5)),
        margin=draw(st.integers(0, 3)),
        running=draw(st.booleans()),
        wanted=draw(st.booleans()),
        shared=forward and draw(st.booleans()),
        changes=tuple(changes.items()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


CALLS = _calls()


def decided(case: Case) -> bool:
    """Whether no normalised value lies so close to 0 that rounding decides about its ReLU."""
    x, norm = case.arguments.get("x"), case.arguments.get("norm")
    if x is None or norm is None:
        return True
    scaled, shift = x.double() * norm[0], norm[1].double()
    size = scaled.abs() + shift.abs()
    return bool(((scaled + shift).abs() > 4 * torch.finfo(norm.dtype).eps * size).all())


def judge(case: Case) -> None:
    """Runs the operator and fails where a result is wrong, or something else was written."""
    inputs = case.inputs()
    getattr(compiled, case.op)(*case.arguments.values())
    case.check_outside()
    for name, before in inputs.items():
        if isinstance(before, Tensor) and name not in case.written:
            assert torch.equal(case.arguments[name], before), f"{name} changed"
    exact = reference_outputs(case.op, inputs)
    in_float64 = inputs_dtype(case) is torch.float64
    theirs = dict(exact) if in_float64 else peers(case.op, inputs) or dict(exact)
    if "y" in case.outputs and "stats" in exact:  # of the values as stored
        exact["stats"] = reference.channel_stats(case.outputs["y"].double().flatten(0, -2))
        peer = reference.channel_stats(theirs["y"].double().flatten(0, -2))
        theirs = theirs | {"stats": theirs["stats"].double() - peer + exact["stats"]}
    given = [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    stake = max(
        float(v.detach().double().nan_to_num().abs().amax())
        for v in (*given, *exact.values())
        if v.numel()
    )
    for name, value in case.outputs.items():
        # float16 overflows where there is one row, and in PyTorch as well.
        representable = exact[name].abs() < torch.finfo(value.dtype).max / 2
        compared = representable & theirs[name].isfinite()
        assert value[compared].isfinite().all(), f"{case.op}: {name} is not finite"
        error, peer = (_error(v, exact[name], compared) for v in (value, theirs[name]))
        if in_float64:
            allowed = EXACT * max(1.0, stake)
        else:
            rounding = torch.finfo(inputs_dtype(case)).eps * max(1.0, stake)
            allowed = max(2 * peer, ROUNDINGS * rounding)
        assert error <= allowed, f"{case.op}, {name}: error {error:.3g}, allowed {allowed:.3g}"


def peers(op: str, inputs: dict[str, Any]) -> dict[str, Tensor] | None:
    """What PyTorch's layers make of the same arguments. They take no batch of one value and, on the
    CPU, pool no volumes of 16 bits: None there, and only roundings are allowed."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    try:
        return eager_outputs(op, copies)
    except (ValueError, NotImplementedError):
        return None


def inputs_dtype(case: Case) -> torch.dtype:
    """Of the activations, or of the tables where there are none."""
    first = next(v for v in case.arguments.values() if isinstance(v, Tensor))
    return first.dtype


def _error(value: Tensor, exact: Tensor, compared: Tensor) -> float:
    """The largest error of the elements to compare."""
    difference = (value.double() - exact)[compared].abs()
    return float(difference.amax()) if difference.numel() else 0.0
