"""The stem's convolution through PyTorch: two of the fallback's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

STRIDE, PADDING = 2, 3


def stem_conv_forward(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """See `interface.Operators.stem_conv_forward`."""
    operand = x.movedim(-1, 1).to(y.dtype)
    own = F.conv2d(operand, weight.to(y.dtype), stride=STRIDE, padding=PADDING)
    y.copy_(own.movedim(1, -1))


def stem_conv_backward_weight(dy: Tensor, x: Tensor, dweight: Tensor) -> None:
    """See `interface.Operators.stem_conv_backward_weight`."""
    if x.numel() == 0:
        dweight.zero_()
        return
    operand, own = _contiguous(x.to(dy.dtype)), _contiguous(dy)
    shape = list(dweight.shape)
    dweight.copy_(conv2d_weight(operand, shape, own, stride=STRIDE, padding=PADDING))


def _contiguous(x: Tensor) -> Tensor:
    """x [N, H, W, C] as [N, C, H, W] in contiguous memory: of channels-last images of one pixel
    PyTorch computes garbage in bfloat16. With one channel or pixel contiguous memory may still
    carry such strides, so they are set by a view."""
    first = x.movedim(-1, 1)
    return first.contiguous().view(-1).view(first.shape)
