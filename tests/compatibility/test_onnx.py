"""ONNX by PyTorch's default exporter: the original's operators, any batch, the original's results
in onnxruntime; and training that goes on before and after as if nothing had been exported."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from densenet_efficient import EfficientDenseNet, convert, densenet121, unconvert
from densenet_efficient.core import arena
from tests.support.converted_pair import assert_close, assert_same_step, converted_pair, images
from tests.support.peer import torchvision

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.slow,  # exporting takes seconds
    pytest.mark.filterwarnings("ignore:.*runs its original forward"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def exported(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """The model in eval mode through the exporter and onnxruntime, with any batch. In float32:
    onnxruntime has no convolution in float64."""
    torch.onnx.export(
        model.eval(),
        (x,),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert not [node for node in session.get_modelmeta().custom_metadata_map if "efficient" in node]
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def slabs() -> list[int]:
    return sorted(slab.data_ptr() for stack in arena._free.values() for slab in stack)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_converted_network(tmp_path: Path, warm: bool) -> None:
    """Equal to the plain one's, whatever the batch; the arena is not touched."""
    plain, ours = converted_pair()
    x = images()
    arena.release()
    if warm:
        assert_same_step(plain, ours, x)
    before = slabs()
    run = exported(ours.float(), x.float(), tmp_path / "network.onnx")
    assert slabs() == before
    plain.float().eval()
    for count in (1, 3, 7):
        z = images(count).float()
        assert_close(plain(z).detach(), run(z), 1e-4)
    plain.double(), ours.double()
    for _ in range(2):
        assert_same_step(plain.train(), ours.train(), x)
    assert_close(plain.eval()(x), ours.eval()(x))


def test_a_network_built_here(tmp_path: Path) -> None:
    model = EfficientDenseNet(8, (2, 3), 16, num_classes=5).eval()
    plain = unconvert(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32)
    run = exported(model, x, tmp_path / "network.onnx")
    for count in (1, 4):
        z = torch.randn(count, 3, 32, 32)
        assert_close(plain(z).detach(), run(z), 1e-4)
    assert_same_step(plain.double().train(), model.double().train(), x.double())


@pytest.mark.parametrize("kind", ["torchvision", "ours"])
def test_densenet121(tmp_path: Path, kind: str) -> None:
    if kind == "ours":
        ours: nn.Module = densenet121(num_classes=10)
        plain = unconvert(copy.deepcopy(ours))
    else:
        plain = torchvision.models.densenet121(weights=None, num_classes=10)
        ours = convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, 64, 64)
    run = exported(ours, x, tmp_path / "network.onnx")
    for count in (1, 5):
        z = torch.randn(count, 3, 64, 64)
        assert_close(plain.eval()(z).detach(), run(z), 1e-4)
    assert_same_step(plain.double().train(), ours.double().train(), x.double())
