"""Fully convolutional DenseNets for dense prediction, built of the efficient blocks: those of Jegou
et al., "The One Hundred Layers Tiramisu", arXiv 1611.09326, tables 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import eager
from ..core.functions import PointwiseFunction
from ..nn import execution, handover, watch
from ..nn.dense_block import EfficientDenseBlock
from ..nn.first_convolution import by_pytorch
from ..nn.fully_convolutional import FC_CONFIGURATIONS, FCDenseNetBase
from ..nn.options import check_memory
from ..nn.transition import EfficientTransition

__all__ = ["EfficientFCDenseNet", "fc_densenet56", "fc_densenet67", "fc_densenet103"]


class EfficientFCDenseNet(FCDenseNetBase):
    """An FC-DenseNet that trains in (nearly) the least memory exact back-propagation allows.

    Args:
        growth_rate: k, the channels every layer adds.
        block_config: the number of layers of every block: those of the way down, the one between,
            those of the way up.
        num_init_features: channels of the first convolution.
        drop_rate: dropout after every convolution of a layer or a transition, 0 to 1.
        num_classes: of the logits. None or 0: no classifier, the features come out.
        memory: as in `EfficientDenseBlock`.

    Keyword Args:
        in_channels (int): channels of the input.
        bottleneck (bool): layers of a 1x1 convolution to bn_size * k channels and a 3x3
            convolution.
        bn_size (int): width of a bottleneck, in growth rates.
        compression (float): the share of channels a transition keeps, above 0 and at most 1.
        pooling (str): of the transitions, "max" or "average".
        upsampling (str): "deconv", transposed convolutions; "upsampling", the nearest pixel;
            "subpixel", rearranged channels between two convolutions.
        bias (bool): of every convolution but those of the upsampling.
        bias_up (bool): of the convolutions of the upsampling.
        relu_up (bool): ReLU after them.
        norm_first (bool): norm and ReLU after the first convolution.
        drop_transitions (bool): False: dropout in the dense layers alone.
        early_transition (bool): a transition in front of the first block, and an upsampling after
            the last.
        eps (float): of every norm.
        memory_efficient (bool): accepted for the reference's sake; the blocks always are.

    Input [N, in_channels, H, W] with sides of at least `min_input_size`, output [N, num_classes,
    H, W], contiguous for a contiguous input. Sides need not be multiples of anything: as in the
    paper, what a transposed convolution gives is cropped to the skip connection. The other two
    kinds of upsampling give even sides only, so there they must be multiples of `min_input_size`.

    Raises:
        ValueError: an option out of its range, named.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        num_classes: int | None = 11,
        *,
        memory: str = "auto",
        **options: Any,
    ) -> None:
        self._memory = check_memory(memory)
        super().__init__(
            growth_rate, block_config, num_init_features, drop_rate, num_classes, **options
        )

    def _make_block(self, **options: Any) -> nn.Module:
        return EfficientDenseBlock(**options, memory=self._memory)

    def _make_transition(
        self, num_input_features: int, num_output_features: int, **options: Any
    ) -> nn.Module:
        return EfficientTransition(num_input_features, num_output_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        """See `FCDenseNetBase.forward`."""
        if torch.compiler.is_compiling():
            return self._traced_forward(x)
        return self._efficient_forward(x)

    def _traced_forward(self, x: Tensor) -> Tensor:
        self.check_images(x)
        if eager.is_exporting() or not handover.prefers_contiguous(x):
            return super().forward(x)
        return super().forward(x.contiguous(memory_format=torch.channels_last)).contiguous()

    @torch.compiler.disable  # one opaque step, as its blocks are
    def _efficient_forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.contiguous() if self._is_ordinary(x) and handover.prefers_contiguous(x) else y

    @staticmethod
    def _is_ordinary(x: Tensor) -> bool:
        return not torch.compiler.is_compiling() and execution.input_problem(x) is None

    def _first(self, x: Tensor) -> Tensor:
        if not self._is_ordinary(x) or watch.own_change(self.conv0) or watch.patch():
            return super()._first(x)
        return by_pytorch(self.conv0, handover.match_layout(x), self.conv0.weight)

    def _call(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Channels last in memory from child to child, so that no block copies its output."""
        if torch.compiler.is_compiling():
            return super()._call(module, *inputs)
        with handover.asking_for(handover.Asked(contiguous=False)):
            return module(*inputs)

    def _classify(self, x: Tensor) -> Tensor:
        """As a matrix product: PyTorch's convolution would copy the last block's feature buffer,
        which x shares copy-on-write."""
        conv: Any = self.classifier
        plain = type(conv) is nn.Conv2d and set(conv.kernel_size + conv.stride) == {1}
        if not plain or any(conv.padding) or conv.groups != 1 or not self._is_ordinary(x):
            return conv(x)
        if watch.own_change(conv) or watch.patch():
            return conv(x)
        dtype = execution.working_dtype(x)
        bias = None if conv.bias is None else conv.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return PointwiseFunction.apply(x.to(dtype), conv.weight.to(dtype), bias)


def _build(name: str, options: dict[str, Any]) -> EfficientFCDenseNet:
    return EfficientFCDenseNet(**{**FC_CONFIGURATIONS[name], **options})


def fc_densenet56(**options: Any) -> EfficientFCDenseNet:
    """FC-DenseNet56 (k = 12), 1.4 M parameters. options: of `EfficientFCDenseNet`."""
    return _build("fc_densenet56", options)


def fc_densenet67(**options: Any) -> EfficientFCDenseNet:
    """FC-DenseNet67 (k = 16), 3.5 M parameters. options: of `EfficientFCDenseNet`."""
    return _build("fc_densenet67", options)


def fc_densenet103(**options: Any) -> EfficientFCDenseNet:
    """FC-DenseNet103 (k = 16), 9.3 M parameters. options: of `EfficientFCDenseNet`."""
    return _build("fc_densenet103", options)
