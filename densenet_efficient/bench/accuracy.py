"""Is it right? Errors of ours and of the framework against float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .steps import DTYPES, OURS, Case, MeasurementError

__all__ = [
    "agreement",
    "check_agreement",
    "largest_difference",
    "moved_norms",
    "outputs_and_gradients",
]

AGREEMENT_BOUND = 1.2


def agreement(case: Case, peers: Sequence[str], batch: int = 2, draws: int = 5) -> dict[str, float]:
    """Each peer's error against float64 in train mode, the same weights everywhere.

    For a batch of images: the root mean square of |difference| / |float64 value| (2-norms) over the
    logits, the images' gradient and all parameter gradients. Of that the median over `draws`
    batches, because an activation that rounding puts on the other side of a ReLU's zero changes a
    gradient by far more than rounding does, and falls on any implementation by chance. "eager" is
    always among the peers.
    """
    names = list(dict.fromkeys(("eager", *(p for p in peers if not p.startswith("compile")))))
    errors: dict[str, list[Tensor]] = {name: [] for name in names}
    for seed in range(draws):
        images, labels = case.batch_of(min(batch, case.batch), seed)
        exact_model = moved_norms(case.build("eager")).double()
        exact = outputs_and_gradients(exact_model, images.double(), labels)
        shares = {}
        for name in names:
            model = moved_norms(case.build(name))
            got = outputs_and_gradients(model, images, labels, DTYPES[case.dtype])
            pairs = zip(got, exact, strict=True)
            shares[name] = torch.stack([(g.double() - e).norm() / e.norm() for g, e in pairs])
        for name in names:
            errors[name].append(shares[name].square().mean().sqrt())
    return {name: float(torch.stack(found).median()) for name, found in errors.items()}


def moved_norms(model: nn.Module) -> nn.Module:
    """Norms away from where they are initialised: with beta 0 the network does not depend on the
    scale of its first norm, whose gradient is then nothing but rounding."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                gamma, beta = torch.rand(2, module.num_features, generator=generator)
                module.weight.copy_(0.7 + 0.6 * gamma)
                module.bias.copy_(0.4 * beta - 0.2)
    return model


def outputs_and_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Logits, the gradient of the images and of every parameter, of one training step with cross
    entropy, under autocast to `dtype`."""
    model.train()
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    gradients = [tensor.grad for tensor in (images, *model.parameters())]
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def check_agreement(errors: dict[str, float], bound: float = AGREEMENT_BOUND) -> None:
    """MeasurementError where ours is further from float64 than `bound` times the framework's own
    error: what is wrong is not timed."""
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
        outputs_and_gradients(moved_norms(case.build(name)).double(), images.double(), labels)
        for name in ("eager", peer)
    )
    shares = [(g - e).abs().max() / e.abs().max() for g, e in zip(got, expected, strict=True)]
    return float(torch.stack(shares).max())
