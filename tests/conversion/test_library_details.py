"""What is particular to a library: how it is recognised, what is refused and why, what its users do
to a network after it was converted."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from densenet_efficient import (
    ConversionError,
    block_adapter,
    convert,
    explain,
    inspect_conversion,
    plan,
    register_adapter,
)
from densenet_efficient.conversion.libraries import cifar, d2l
from densenet_efficient.conversion.names import LayerNames, named_block
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support import zoo, zoo_plain, zoo_speech
from tests.support.conversion_cases import CASES, DROPOUT_CASES, Case
from tests.support.conversion_comparison import (
    Replay,
    largest_error,
    pair,
    recorded_masks,
    step,
)
from tests.support.kept_memory import NETWORKS, kept_bytes
from tests.support.libraries import load

BY_NAME = {case.name: case for case in CASES}
WITH_DROPOUT = {case.name: case for case in DROPOUT_CASES}


def case_of(name: str) -> Case:
    return BY_NAME[name]


# Recognition


def test_derived_classes_without_a_forward_of_their_own_are_recognised() -> None:
    home = load("monai")

    class Layer(home._DenseLayer):  # type: ignore[name-defined,misc]
        pass

    class Block(home._DenseBlock):  # type: ignore[name-defined,misc]
        pass

    block = Block(2, 2, 6, 2, 4, 0.0)
    block.denselayer2.__class__ = Layer
    plain = nn.Sequential(block).double()
    ours = convert(copy.deepcopy(plain))
    assert isinstance(ours[0], DenseBlockExecution) and isinstance(ours[0], Block)
    x = torch.randn(2, 6, 5, 5).double()
    assert largest_error(step(plain, x), step(ours, x)) < 1e-12

    class Other(home._DenseLayer):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    plain[0].denselayer1.__class__ = Other
    with pytest.raises(ConversionError, match=r"Other; expected monai.*\._DenseLayer"):
        convert(plain)


def monai_with_another_activation() -> nn.Module:
    return load("monai").DenseNet(2, 2, 3, 8, block_config=(2, 2, 2), act="prelu")


def monai_with_another_norm() -> nn.Module:
    return load("monai").DenseNet(3, 2, 3, 8, 4, (2, 2), 2, norm="instance")


def timm_with_another_activation() -> nn.Module:
    return load("timm").models.densenet.DenseNet(4, (2, 2), bn_size=2, act_layer="silu")


def timm_with_another_norm() -> nn.Module:
    return load("timm").models.densenet.DenseNet(4, (2, 2), bn_size=2, norm_layer="groupnorm1")


def libauc_with_elu() -> nn.Module:
    return nn.Sequential(zoo.EluBlock(8, 4, nn.ELU))


def lazy_book() -> nn.Module:
    return nn.Sequential(zoo_plain.BookBlock(2, 4))


def reloaded() -> nn.Module:
    return load("timm").create_model("rdnet_tiny", pretrained=False)


def speaking_with_state() -> nn.Module:
    block = zoo_speech.CamBlock(6, 4)
    block.tdnnd2.cam_layer.linear2 = nn.Sequential(nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4))
    return nn.Sequential(block)


def speaking_with_dropout() -> nn.Module:
    block = zoo_speech.CamBlock(6, 4)
    block.tdnnd3.cam_layer.relu = nn.Dropout(0.1)
    return nn.Sequential(block)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (monai_with_another_activation, r"denselayer1: layers\.relu1 is PReLU; only ReLU"),
        (monai_with_another_norm, "denselayer1: norm1 is InstanceNorm3d; only batch norms"),
        (timm_with_another_activation, "denselayer1: norm1 is followed by a SiLU; only ReLU"),
        (timm_with_another_norm, "denselayer1: norm1 is GroupNorm1Act; only batch norms"),
        (libauc_with_elu, "denselayer1: elu1 is ELU; only ReLU"),
        (lazy_book, r"net\.0\.0 is lazy and not initialised; run one batch first"),
        (reloaded, "nothing to convert in RDNet: left.*layer norms and pointwise MLPs"),
        (speaking_with_state, r"tail must be without buffers and dropout, but linear2\.1 has"),
        (speaking_with_dropout, "tail must be without buffers and dropout, but relu has"),
    ],
)
def test_refused_with_the_reason_and_one_line_a_kind(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=f"(?s){reason}") as caught:
        convert(model)
    refused = [line for line in str(caught.value).splitlines() if line.startswith("refused")]
    assert len(refused) <= 1 and set(refused) <= set(str(inspect_conversion(model)).splitlines())
    assert [type(module) for module in model.modules()] == kinds


def test_an_unknown_class_is_told_which_adapter_would_do() -> None:
    class MyDenseBlock(zoo.VarargsBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(
        ConversionError, match=r"register_adapter\(MyDenseBlock, torchvision\.dense"
    ):
        convert(nn.Sequential(MyDenseBlock(8, 4)))


def test_the_order_of_channels_is_not_guessed() -> None:
    class UvaDenseBlock(zoo_plain.UvaBlock):
        pass

    block = nn.Sequential(UvaDenseBlock(8, 4))
    register_adapter(UvaDenseBlock, d2l.dense_block)
    with pytest.raises(ConversionError, match="its adapter does not fit: AttributeError"):
        convert(block)
    names = LayerNames("net.0", "net.2", "net.3", "net.5")
    register_adapter(UvaDenseBlock, named_block(names, layers=cifar.block_of))
    with pytest.raises(ConversionError, match=r"has children that are no part.*net\.1 is ReLU"):
        convert(block)
    register_adapter(UvaDenseBlock, block_adapter(names, layers=cifar.block_of))
    with pytest.raises(ConversionError, match="self-check failed: output: largest difference"):
        convert(block)
    register_adapter(UvaDenseBlock, cifar.uva_dense_block)
    assert isinstance(convert(block)[0], DenseBlockExecution)


# Afterwards


ON_KERNELS = ["torchvision: 1 torchvision", "timm: 4 timm", "monai: 2 two dimensions",
              "torchxrayvision: 3 torchxrayvision"]  # fmt: skip
NORMS = ["denseblock1.denselayer2.norm1", "transition1.norm", "norm0", "norm5"]


@pytest.mark.parametrize("name", ON_KERNELS)
def test_the_whole_network_runs_on_the_kernels(name: str) -> None:
    """The stem, too, whose norm includes its ReLU or does not."""
    case = case_of(name)
    _, ours, x = pair(case)
    explanation = explain(ours.float(), x.float())
    assert explanation.kinds == {"kernels"} and "features.stem" in str(explanation)
    assert plan(ours, case.shape).peak_bytes > 0


def test_one_and_three_dimensions_run_on_our_algorithm() -> None:
    for name in ("monai: 2 one dimension", "monai: 2 three dimensions"):
        _, ours, x = pair(case_of(name))
        assert "original" not in explain(ours, x).kinds
        assert plan(ours, case_of(name).shape).peak_bytes > 0


def with_silu(norm: Any) -> None:
    norm.act = nn.SiLU()


def with_drop(norm: Any) -> None:
    norm.drop = nn.Hardtanh(-0.5, 0.5)


def with_hook(norm: Any) -> None:
    norm.act.register_forward_hook(lambda module, args, y: y * 2)


@pytest.mark.parametrize("change", [with_silu, with_drop, with_hook])
@pytest.mark.parametrize("where", NORMS)
@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_changes_inside_timms_norms_are_seen(change: Callable[[Any], None], where: str) -> None:
    plain, ours, x = pair(case_of("timm: 4 timm"))
    before = step(ours, x)["output 0"]
    for model in (plain, ours):
        change(model.features.get_submodule(where))
    plain.load_state_dict(ours.state_dict())  # the step has moved the running statistics
    after = step(ours, x)
    assert largest_error(step(plain, x), after) < 1e-9
    assert not torch.equal(before, after["output 0"])


@pytest.mark.parametrize("name", ["monai: 2 three dimensions", "pytorchcv: 10 pytorchcv"])
def test_dropout_modules_decide_by_their_own_flag(name: str) -> None:
    """Monte Carlo dropout: the network evaluates, its dropouts train; and the reverse."""
    plain, ours, x = pair(WITH_DROPOUT[name])
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    for model in (plain, ours):
        model.eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.train()
    with torch.no_grad(), recorded_masks() as masks:
        got = ours(x)
        assert masks and not torch.equal(got, ours(x))
        with Replay(masks):
            torch.testing.assert_close(got, plain(x), rtol=1e-9, atol=1e-9)
    for model in (plain, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, kinds):
                module.eval()
    assert largest_error(step(plain, x), step(ours, x)) < 1e-9


@pytest.mark.filterwarnings("ignore:.*runs its original forward")
def test_a_stage_calls_what_is_in_front_of_its_layers() -> None:
    plain, ours, x = pair(case_of("pytorchcv: 10 pytorchcv"))
    seen: list[str] = []
    for name in ("trans2", "trans2.conv.activ", "unit1.conv2.conv"):
        module = ours.features.stage2.get_submodule(name)
        handle = module.register_forward_hook(lambda *args, name=name: seen.append(name))
        step(ours, x)
        assert seen == [name]
        assert (ours.features.stage2.path(x).kind == "original") == name.startswith("unit")
        handle.remove()
        seen.clear()
    for model in (plain, ours):
        model.features.stage2.trans2 = nn.Sequential(nn.Conv2d(16, 8, 2, 2), nn.ELU()).double()
    plain.load_state_dict(ours.state_dict())
    assert largest_error(step(plain, x), step(ours, x)) < 1e-9
    assert ours.features.stage2.path(x).kind != "original"


@pytest.mark.parametrize(
    "name", ["timm: 4 timm", "monai: 2 three dimensions", "zoo: 12 UvA, newest first"]
)
def test_optimisers_averages_and_wrappers_go_on(name: str) -> None:
    """Made before the conversion, and used after it."""
    plain, _, x = pair(case_of(name))
    results = []
    for model in (plain, copy.deepcopy(plain)):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        seen: list[int] = []
        first = next(model.parameters())
        first.register_hook(lambda grad, seen=seen: seen.append(1))
        step(model, x)
        optimiser.step()
        if results:
            convert(model)
            convert(average)
        step(model, x)
        optimiser.step()
        average.update_parameters(model)
        assert len(seen) == 2
        results.append(dict(model.state_dict()) | {"average": average(x)})
    assert largest_error(*results) < 1e-9


def test_data_parallel_training_over_processes() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, ours, x = pair(case_of("timm: 4 timm"))
        inside = convert(DistributedDataParallel(copy.deepcopy(plain)))
        expected = step(plain, x)
        for model in (DistributedDataParallel(ours), inside):
            got = {name.replace("module.", ""): value for name, value in step(model, x).items()}
            assert largest_error(expected, got) < 1e-9
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["zoo: 11 d2l", "zoo: 15 CAM++"])
def test_biases_and_tails_are_differentiated_twice(name: str) -> None:
    plain, ours, x = pair(case_of(name))
    found = []
    for model in (plain, ours):
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        second = sum(g.square().sum() for g in first)
        grads = torch.autograd.grad(second, parameters, allow_unused=True)  # type: ignore[arg-type]
        found.append({str(i): g for i, g in enumerate(grads) if g is not None})
    assert largest_error(*found) < 1e-9


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("torchvision densenet121", 0.15),
        ("timm densenet121", 0.15),
        ("timm, features_only", 0.2),
        ("MONAI DenseNet121, 1-D", 0.15),
        ("SMP densenet121 encoder", 0.25),  # its norms and ReLUs between the blocks are PyTorch's
        ("mmpretrain DenseNet 121", 0.2),
    ],
)
def test_a_converted_network_keeps_a_fraction(name: str, bound: float) -> None:
    make, (_, channels, *image) = NETWORKS[name]
    model, x = make(), torch.randn(2, channels, *(size // 2 for size in image))
    before = kept_bytes(model, x)
    assert kept_bytes(convert(model), x) < bound * before
