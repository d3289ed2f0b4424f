"""The operators, as every implementation offers them: names, arguments, shapes and meanings.

Every operator writes into tensors that its caller owns and returns nothing. Rows ``[M, C]`` and
images ``[N, H, W, C]`` are channels last and may be channel slices of a larger buffer. ``norm`` is
the table ``[5, C]`` of scale a, shift s, mean, rstd and beta, with which a normalised value is
``a x + s = (x - mean) a + beta``; ``correction`` is the table ``[4, C]`` of a, p, q and mean,
``stats`` ``[2, C]``, mean and biased variance, ``dnorm`` ``[2, C]``, dgamma and dbeta. Tables have
the accumulation dtype. `reference` specifies the values, ``csrc/ops.cpp`` holds the schemas of the
compiled operators.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

NORM_ROWS = 5
NAMES = (
    "channel_stats",
    "norm_fold",
    "norm_correction",
    "norm_correction_apply",
    "norm_relu_conv1x1_forward",
    "norm_relu_conv1x1_backward",
    "norm_relu_conv3x3_forward",
    "norm_relu_conv3x3_backward",
    "transition_forward",
    "transition_backward",
    "stem_forward",
    "stem_backward",
)
CUDA_NAMES = ("stem_conv_forward", "stem_conv_backward_weight")
"""Those that CUDA kernels and the fallback alone offer: on the CPU PyTorch's own are as good."""

CPU_NAMES = ("norm_fold_all",)
"""What CPU kernels alone offer: a GPU's forward folds the norms as it goes."""


class Operators(Protocol):
    """One implementation of all operators: a module, or an object.

    Errors of the compiled operators: ``RuntimeError`` naming the tensor, what was expected and what
    came, before anything is written; ``MissingLibraryError`` where the library is missing.
    """

    def channel_stats(self, x: Tensor, stats: Tensor) -> None:
        """Mean and biased variance of each channel of ``x [M, C]`` into ``stats [2, C]``."""

    def norm_fold(
        self, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, norm: Tensor
    ) -> None:
        """Scale, shift, mean, rstd and beta into ``norm [5, C]`` from ``stats [2, C]``."""

    def norm_correction(
        self, dnorm: Tensor, norm: Tensor, count: int, accumulate: bool, correction: Tensor
    ) -> None:
        """``a, p, q, mean`` into ``correction [4, C]`` for statistics of ``count`` rows (0 for
        constant ones), or p and q added to its first C columns."""

    def norm_correction_apply(self, dx: Tensor, x: Tensor, correction: Tensor) -> None:
        """``dx [M, C] = a dx - p - (x - mean) q``, in place; 16-bit values are rounded to either
        neighbour so that sums are kept (dithering)."""

    def norm_relu_conv1x1_forward(
        self,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        y: Tensor,
        stats: Tensor | None,
        next_stats: Tensor | None = None,
        next_gamma: Tensor | None = None,
        next_beta: Tensor | None = None,
        next_eps: float = 0.0,
        next_norm: Tensor | None = None,
    ) -> None:
        """``y [M, K] = relu(a x + s) W^T`` of ``x [M, C]``, and the stats of y as stored. Where
        ``next_norm`` is given, then what `norm_fold` makes of ``next_stats``, ``next_gamma``,
        ``next_beta`` and ``next_eps``; ``stats`` is some columns of ``next_stats``."""

    def norm_relu_conv1x1_backward(
        self,
        dz_y: Tensor,
        y: Tensor,
        correction: Tensor,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        dx: Tensor,
        dweight: Tensor | None,
        dnorm: Tensor,
        count: int = 0,
        x_correction: Tensor | None = None,
    ) -> None:
        """``dx += a dz``, the weight gradient and the norm's two sums. Where ``x_correction`` is
        given, p and q of ``dnorm`` are added to it, as by `norm_correction`."""

    def norm_relu_conv3x3_forward(
        self,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        y: Tensor,
        stats: Tensor | None,
        next_stats: Tensor | None = None,
        next_gamma: Tensor | None = None,
        next_beta: Tensor | None = None,
        next_eps: float = 0.0,
        next_norm: Tensor | None = None,
    ) -> None:
        """``y [N, H, W, K] = conv3x3(relu(a x + s))``, and the stats of y as stored; ``next_norm``
        as in `norm_relu_conv1x1_forward`."""

    def norm_relu_conv3x3_backward(
        self,
        dy: Tensor,
        y: Tensor | None,
        correction: Tensor | None,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        accumulate: bool,
        dx: Tensor,
        dweight: Tensor | None,
        dnorm: Tensor,
        count: int = 0,
        x_correction: Tensor | None = None,
    ) -> None:
        """``dx = dz`` or ``dx += a dz``, the weight gradient and the norm's two sums. Where
        ``x_correction`` is given, what `norm_correction` makes of ``dnorm``, or adds."""

    def transition_forward(
        self, x: Tensor, norm: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None
    ) -> None:
        """``y [N, H/2, W/2, K] = avg_pool2x2(relu(a x + s)) W^T``, and the stats of y."""

    def transition_backward(
        self,
        dy: Tensor,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        count: int,
        dx: Tensor,
        dweight: Tensor | None,
        dnorm: Tensor,
    ) -> None:
        """``dx [N, H, W, C]`` through pooling, ReLU and norm, written whole; dweight and dnorm."""

    def stem_forward(self, x: Tensor, norm: Tensor, y: Tensor, stats: Tensor | None) -> None:
        """``y = max_pool(relu(a x + s))`` (kernel 3, stride 2, padding 1), and the stats of y."""

    def stem_backward(
        self, dy: Tensor, x: Tensor, norm: Tensor, count: int, dx: Tensor, dnorm: Tensor
    ) -> None:
        """``dx [N, H, W, C]`` through pooling, ReLU and norm, written whole; dnorm."""

    def stem_conv_forward(self, x: Tensor, weight: Tensor, y: Tensor) -> None:
        """``y [N, ceil(H/2), ceil(W/2), K] = conv7x7(x)`` of ``x [N, H, W, C]`` (stride 2, padding
        3) in y's dtype; ``x`` and ``weight [K, C, 7, 7]`` lie in any layout and may be float32."""

    def stem_conv_backward_weight(self, dy: Tensor, x: Tensor, dweight: Tensor) -> None:
        """``dweight [K, C, 7, 7]`` of `stem_conv_forward`, in float32; dy decides about the
        dtype."""
