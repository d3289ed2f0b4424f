"""The comparison of a converted network with the plain one, and of all cases as a table:

python -m tests.support.conversion_comparison
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densenet_efficient import convert, unconvert
from densenet_efficient.bench.accuracy import moved_norms
from densenet_efficient.core import dropout
from densenet_efficient.nn.dense_block import DenseBlockExecution
from densenet_efficient.nn.transition import TransitionExecution
from densenet_efficient.report.tables import table
from tests.support.conversion_cases import CASES, DROPOUT_CASES, Case
from tests.support.libraries import version_of


class Replay(TorchFunctionMode):
    """Every dropout multiplies by the next of the given masks."""

    _DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout,
                 torch.feature_dropout)  # fmt: skip

    def __init__(self, masks: list[Tensor]) -> None:
        super().__init__()
        self._masks = iter(masks)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func not in self._DROPOUTS:
            return func(*args, **options)
        given = {**dict(zip(("input", "p", "training"), args, strict=False)), **options}
        if not given["training"] or given["p"] == 0:
            return given["input"]
        return given["input"] * next(self._masks)


@contextmanager
def recorded_masks() -> Iterator[list[Tensor]]:
    """The masks that forward passes of ours draw, ``[N, k, ...]``, in order."""
    masks: list[Tensor] = []
    draw = dropout.draw_mask

    def recording(*args: Any) -> Tensor:
        mask = draw(*args)
        masks.append(mask.clone().movedim(-1, 1))
        return mask

    dropout.draw_mask = recording
    try:
        yield masks
    finally:
        dropout.draw_mask = draw


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Whatever the model returns, as a list."""
    found = model(x)
    return [found] if isinstance(found, Tensor) else list(found)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of input and parameters, and buffers after one training step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    found = [y for y in outputs(model, x) if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in found]
    masks_end = sum((y * w).sum() for y, w in zip(found, weights, strict=True))
    masks_end.backward()  # type: ignore[union-attr]
    values = {f"output {index}": y.detach() for index, y in enumerate(found)}
    values["gradient of the input"] = x.grad  # type: ignore[assignment]
    for name, p in model.named_parameters():
        if p.grad is not None:
            values[f"gradient of {name}"] = p.grad
    return values | {name: buffer.clone() for name, buffer in model.named_buffers()}


def largest_error(expected: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The largest difference of any value, relative to its tensor's largest value or 1."""
    assert expected.keys() == got.keys()
    errors = [0.0]
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        if value.is_floating_point() and value.numel():
            scale = max(1.0, value.abs().max().item())
            errors.append((got[name] - value).abs().max().item() / scale)
        else:
            assert torch.equal(got[name], value), name
    return max(errors)


def pair(case: Case) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain network in float64, its norms moved away from 1 and 0; a converted copy; an
    input."""
    torch.manual_seed(0)
    plain = case.make().double()
    moved_norms(plain)
    x = torch.randn(case.shape, dtype=torch.float64)
    return plain, convert(copy.deepcopy(plain)), x


def without_checkpoints(model: nn.Module) -> nn.Module:
    """Checkpointing in the source would update norms twice."""
    for module in model.modules():
        for name in ("memory_efficient", "grad_checkpointing"):
            if hasattr(module, name):
                setattr(module, name, False)
    return model


def compare(case: Case, plain: nn.Module, ours: nn.Module, x: Tensor) -> float:
    """The largest error of a training step, an inference call and a step with exchanged weights;
    everything else that the conversion promises is asserted."""
    kinds = [type(module) for module in plain.modules()]
    found = list(ours.modules())
    assert sum(isinstance(m, DenseBlockExecution) for m in found) == case.blocks
    assert sum(isinstance(m, TransitionExecution) for m in found) == case.transitions
    assert all(isinstance(m, kind) for m, kind in zip(found, kinds, strict=True))
    assert list(ours.state_dict()) == list(plain.state_dict())
    without_checkpoints(plain)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no block may run its original forward
        errors = [largest_error(step(plain, x), step(ours, x))]
        modes = [module.training for module in plain.modules()]
        with torch.no_grad():
            for model in (plain, ours):
                model.eval()
            answers = [outputs(model, x) for model in (plain, ours)]
        for expected, got in zip(*answers, strict=True):
            errors.append(largest_error({"y": expected}, {"y": got}))
    for model in (plain, ours):
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode

    fresh = [copy.deepcopy(plain), pickle.loads(pickle.dumps(ours))]
    for target, source in zip(fresh, (ours, plain), strict=True):
        for p in target.parameters():
            nn.init.normal_(p)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
    expected, *others = (step(model, x) for model in (plain, ours, *fresh))
    errors += [largest_error(expected, other) for other in others]

    back = unconvert(copy.deepcopy(ours))
    assert [type(module) for module in back.modules()] == kinds
    for (name, p), q in zip(back.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    return max(errors)


def compare_dropout(case: Case) -> float:
    """The largest error of a training step under the masks of ours."""
    plain, ours, x = pair(case)
    with recorded_masks() as masks:
        with torch.no_grad():
            outputs(copy.deepcopy(ours), x)  # the forward's masks alone
        assert masks and any((mask == 0).any() for mask in masks)
        torch.manual_seed(3)
        start = len(masks)
        with torch.no_grad():
            outputs(copy.deepcopy(ours), x)
        forward = masks[start:]
    torch.manual_seed(3)
    got = step(ours, x)
    with Replay(forward):
        expected = step(plain, x)
    return largest_error(expected, got)


def main() -> None:
    """Prints the comparison of every case."""
    rows = []
    for case in [*CASES, *DROPOUT_CASES]:
        dropout = case in DROPOUT_CASES
        error = compare_dropout(case) if dropout else compare(case, *pair(case))
        name = f"{case.structure}, dropout" if dropout else case.structure
        home = case.library.split()[0] if case.library else ""
        source = f"{home} {version_of(home)}" if home else "written after it"
        rows.append((name, source, str(case.blocks), str(case.transitions), f"{error:.1e}"))
    head = ["structure", "library", "blocks", "transitions", "largest error"]
    print(table(head, rows, left=("structure", "library")))


if __name__ == "__main__":
    main()
