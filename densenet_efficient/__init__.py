"""DenseNets in nearly the least memory that exact back-propagation allows.

The public interface is what this file names. The folders are the layers, lowest first: `ops`,
`core`, `nn`, `reference`; `models`, `conversion`, `memory`; `report`, `bench`, `train`; `cli`.
"""

from . import _moved, reference
from .conversion import (
    ConversionError,
    block_adapter,
    convert,
    inspect_conversion,
    register_adapter,
    unconvert,
)
from .conversion.registry import register_models
from .core.arena import release
from .memory.budget import fit_memory
from .memory.planner import Plan, max_batch, plan
from .models.densenet import (
    EfficientDenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet264_k48,
    densenet_cifar,
)
from .models.fc_densenet import (
    EfficientFCDenseNet,
    fc_densenet56,
    fc_densenet67,
    fc_densenet103,
)
from .models.pretrained import load_weights
from .nn.dense_block import EfficientDenseBlock
from .nn.features import EfficientFeatures
from .nn.graphed_step import GraphedStep
from .nn.layers import LayerParts
from .nn.residual_dense_block import EfficientResidualDenseBlock
from .nn.transition import EfficientTransition
from .ops.build_info import MissingLibraryError
from .ops.info import info
from .report.explanation import explain
from .version import __version__

_moved.install()

__all__ = [
    "ConversionError",
    "EfficientDenseBlock",
    "EfficientDenseNet",
    "EfficientFCDenseNet",
    "EfficientFeatures",
    "EfficientResidualDenseBlock",
    "EfficientTransition",
    "GraphedStep",
    "LayerParts",
    "MissingLibraryError",
    "Plan",
    "__version__",
    "block_adapter",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet264_k48",
    "densenet_cifar",
    "explain",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "fit_memory",
    "info",
    "inspect_conversion",
    "load_weights",
    "max_batch",
    "plan",
    "reference",
    "register_adapter",
    "register_models",
    "release",
    "unconvert",
]
