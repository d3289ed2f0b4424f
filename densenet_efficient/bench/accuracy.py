"""Is it right? The one measure of numerical error, on which acceptance tests, benchmarks and the
check before every timing rest: distance from float64, next to eager execution's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .steps import DTYPES, OURS, Case, MeasurementError, forward_loss

__all__ = [
    "ErrorRatio",
    "agreement",
    "check_agreement",
    "error_ratio",
    "largest_difference",
    "moved_norms",
    "relative_error",
    "training_step",
    "typical_error",
]

# Acceptance: error against float64 over eager's own, of all tensors together and of the worst one.
TOGETHER_BOUND = 1.2
WORST_BOUND = 2.0


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact||, in float64; the norm itself where exact is zero."""
    exact = exact.detach().double()
    size = exact.norm().item()
    error = (value.detach().double() - exact).norm().item()
    return error / size if size else error


def relative_errors(values: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """`relative_error` of every tensor, by name. ValueError where the names differ."""
    if values.keys() != exact.keys():
        names = ", ".join(sorted(values.keys() ^ exact.keys()))
        raise ValueError(f"values: expected the tensors of exact, got other names: {names}")
    return {name: relative_error(value, exact[name]) for name, value in values.items()}


def median_errors(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each tensor's median over the draws."""
    return {name: _median([draw[name] for draw in draws]) for name in draws[0]}


def _median(errors: Sequence[float]) -> float:
    """NaN where an error is not finite: one result that is no number is no matter of chance."""
    return statistics.median(errors) if all(map(math.isfinite, errors)) else math.nan


def root_mean_square(errors: Mapping[str, float]) -> float:
    """Over the tensors: each counts alike, whatever its magnitude."""
    return math.hypot(*errors.values()) / math.sqrt(len(errors))


def typical_error(
    draws: Sequence[Mapping[str, float]], median_of: Literal["tensors", "draws"] = "tensors"
) -> float:
    """One figure for the errors of several inputs.

    A median, because an activation that rounding puts on the other side of a ReLU's zero changes a
    gradient by far more than rounding does, and falls on any implementation by chance.

    Args:
        draws: each input's relative errors, by the tensor's name.
        median_of: "tensors": each tensor's median over the draws, then the root mean square over
            the tensors. So the acceptance tests measure, which bound single tensors, too.
            "draws": the root mean square over the tensors, then the median over the draws. A draw
            in which a ReLU turned, and with it every tensor before it, is left out as a whole; so
            a timing is guarded, with few draws of a network as it is.
    """
    if median_of == "tensors":
        return root_mean_square(median_errors(draws))
    return _median([root_mean_square(draw) for draw in draws])


@dataclass
class ErrorRatio:
    """Our error against float64 over eager's own on the same inputs: of all tensors together, and
    of the tensor where it is largest; each tensor's two errors, ours first."""

    together: float
    worst: float
    worst_name: str
    errors: dict[str, tuple[float, float]]

    @property
    def accepted(self) -> bool:
        """At most 1.2 over all tensors together, at most 2 on any."""
        return self.together <= TOGETHER_BOUND and self.worst <= WORST_BOUND

    def __str__(self) -> str:
        return (
            f"error {self.together:.3f} times eager's over all tensors, "
            f"{self.worst:.3f} times on {self.worst_name}"
        )


def error_ratio(
    ours: Sequence[Mapping[str, Tensor]],
    eager: Sequence[Mapping[str, Tensor]],
    exact: Sequence[Mapping[str, Tensor]],
) -> ErrorRatio:
    """Compares `typical_error` of all tensors, and the errors tensor by tensor. One mapping per
    input. ValueError where the names of the tensors differ."""
    own = [relative_errors(*pair) for pair in zip(ours, exact, strict=True)]
    peer = [relative_errors(*pair) for pair in zip(eager, exact, strict=True)]
    return ratio_of_errors(own, peer)


def ratio_of_errors(
    ours: Sequence[Mapping[str, float]], eager: Sequence[Mapping[str, float]]
) -> ErrorRatio:
    """`error_ratio` of relative errors that are known already."""
    mine, theirs = median_errors(ours), median_errors(eager)
    ratios = {
        name: mine[name] / theirs[name] if theirs[name] else mine[name] and math.inf
        for name in mine
    }
    worst = max(ratios, key=lambda name: ratios[name])
    together = typical_error(ours) / typical_error(eager)
    return ErrorRatio(
        together, ratios[worst], worst, {name: (mine[name], theirs[name]) for name in mine}
    )


def moved_norms(
    model: nn.Module,
    scale: tuple[float, float] = (0.5, 1.5),
    shift: float = 0.5,
    *,
    statistics: bool = False,
    seed: int = 2,
) -> nn.Module:
    """Moves norms away from where they are initialised, in place: with beta 0 the network does not
    depend on the scale of its first norm, whose gradient is then nothing but rounding.

    Args:
        scale: gamma is uniform between these.
        shift: beta's standard deviation; it is normal.
        statistics: move running means (deviation 0.1) and variances (0.8 to 1.2) as well.
        seed: the values depend on it alone, not on torch's generator.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = scale
    with torch.no_grad():
        for norm in model.modules():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            normal = torch.randn(2, norm.num_features, generator=generator)
            uniform = torch.rand(2, norm.num_features, generator=generator)
            if norm.affine:
                norm.weight.copy_(low + (high - low) * uniform[0])
                norm.bias.copy_(shift * normal[0])
            if statistics and norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.copy_(0.1 * normal[1])
                norm.running_var.copy_(0.8 + 0.4 * uniform[1])
    return model


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """One forward and backward pass with cross entropy, under autocast to `dtype` if given: the
    output, the gradient of the images and of every parameter, by name. ValueError where a parameter
    gets no gradient."""
    images = images.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    output, loss = forward_loss(model, images, labels, dtype)
    loss.backward()
    gradients = {"input.grad": images.grad}
    gradients |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    tensors = {"output": output.detach()}
    for name, gradient in gradients.items():
        if gradient is None:
            raise ValueError(f"model: expected a gradient for every parameter, got no {name}")
        tensors[name] = gradient
    return tensors


def agreement(case: Case, peers: Sequence[str], batch: int = 2, draws: int = 5) -> dict[str, float]:
    """Each peer's error against float64 in train mode, the same weights everywhere: the
    `typical_error` of "draws" over the logits, the images' gradient and all parameter gradients.
    "eager" is always among the peers."""
    names = list(dict.fromkeys(("eager", *(p for p in peers if not p.startswith("compile")))))
    errors: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(draws):
        images, labels = case.batch_of(min(batch, case.batch), seed)
        exact = training_step(_network(case, "eager").double(), images.double(), labels)
        for name in names:
            got = training_step(_network(case, name), images, labels, DTYPES[case.dtype])
            errors[name].append(relative_errors(got, exact))
    return {name: typical_error(found, "draws") for name, found in errors.items()}


def check_agreement(errors: dict[str, float], bound: float = TOGETHER_BOUND) -> None:
    """MeasurementError where ours is further from float64 than `bound` times eager's own error:
    what is wrong is not timed."""
    for peer in OURS:
        if peer in errors and not errors[peer] <= bound * errors["eager"]:
            raise MeasurementError(
                f"{peer}: expected an error against float64 of at most {bound} times eager's "
                f"{errors['eager']:.2e}, got {errors[peer]:.2e}; nothing was timed"
            )


def largest_difference(case: Case, peer: str, batch: int = 2) -> float:
    """The largest difference between a peer and the reference in float64, over the logits and all
    gradients of one training step: |difference| over the tensor's largest value."""
    images, labels = case.batch_of(batch)
    expected, got = (
        training_step(_network(case, name).double(), images.double(), labels)
        for name in ("eager", peer)
    )
    return max(
        float((got[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )


def _network(case: Case, peer: str) -> nn.Module:
    """A peer's network in train mode, its norms moved a little."""
    return moved_norms(case.build(peer), (0.7, 1.3), 0.1).train()
