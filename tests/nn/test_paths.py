"""What `path` answers is what a call does."""

import torch

from densenet_efficient import EfficientDenseNet


def test_path_is_the_one_that_a_call_takes_under_autocast():
    """Dense block, transition and stem, whose path() once answered for the input's own dtype. A
    float32 input keeps a block and a transition in float32, as PyTorch keeps its norms."""
    model = EfficientDenseNet(4, (2, 2), 8, 2, num_classes=3)
    x = torch.randn(2, 8, 8, 8)
    features = model.features
    with torch.autocast("cpu", torch.bfloat16):
        for chosen in (
            features.denseblock1.path(x.bfloat16()),
            features.transition1.path(torch.randn(2, 16, 8, 8).bfloat16()),
            features.stem_path(torch.randn(2, 3, 32, 32)),
        ):
            assert chosen.kind == "kernels" and "bfloat16" in chosen.reason
        chosen = features.denseblock1.path(x)
        assert chosen.kind == "kernels" and "float32, in which autocast" in chosen.reason
    chosen = features.denseblock1.path(x)
    assert "float32" in chosen.reason and "autocast" not in chosen.reason
