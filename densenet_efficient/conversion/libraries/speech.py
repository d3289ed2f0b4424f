"""CAM++ and D-TDNN for speakers: dense blocks in one dimension.

    CAMDenseTDNNBlock  (ModuleList) tdnnd{i}: nonlinear1 (batchnorm relu) linear1 (1x1) nonlinear2
                       (batchnorm relu) cam_layer, a gated convolution, which stays theirs
    DenseTDNNBlock     the same with linear2, a convolution, instead of cam_layer

A layer returns its new channels. Checkpointing inside a layer, which updates its norm twice, is
subsumed.
"""

from __future__ import annotations

from ..names import LayerNames, named_block

_RELUS = ("nonlinear1.relu", "nonlinear2.relu")
_CAM = LayerNames(
    "nonlinear1.batchnorm", "linear1", "nonlinear2.batchnorm", relus=_RELUS,
    tail="cam_layer", tail_convolution="cam_layer.linear_local",
)  # fmt: skip
_TDNN = LayerNames(
    "nonlinear1.batchnorm", "linear1", "nonlinear2.batchnorm", "linear2", relus=_RELUS
)
_HOMES = (
    "speakerlab.models.campplus.layers",
    "funasr.models.campplus.components",
    "wespeaker.models.campplus",
    "modelscope.models.audio.sv.DTDNN_layers",
)

cam_dense_tdnn_block = named_block(_CAM)
dense_tdnn_block = named_block(_TDNN)

ADAPTERS = {
    f"{home}.CAMDenseTDNNBlock": named_block(_CAM, f"{home}.CAMDenseTDNNLayer") for home in _HOMES
}
