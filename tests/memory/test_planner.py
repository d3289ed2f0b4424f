"""The memory plan: its table, its errors, and what it predicts against what a step allocates."""

import pytest
import torch

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.models.densenet import EfficientDenseNet, densenet121, densenet_cifar
from densenet_efficient.models.fc_densenet import EfficientFCDenseNet
from densenet_efficient.nn.options import MEMORY_MODES
from tests.support.kept_memory import kept_bytes

GIB = 2**30


def test_table_names_every_buffer_with_shape_size_and_lifetime():
    plan = de.plan(densenet121(), (16, 3, 224, 224), torch.bfloat16)
    text = str(plan)
    for part in ("conv0 output", "denseblock1 features", "16x56x56x256", "scratch", "bfloat16"):
        assert part in text, part
    assert "predicted peak" in text and "per image" in text
    features = next(row for row in plan.rows if row.name == "denseblock1 features")
    assert features.bytes == 16 * 56 * 56 * 256 * 2 and features.lifetime == "output"


def test_peak_per_image_is_the_floor_of_the_design():
    """Features and stem kept, one gradient buffer, one layer's bottleneck and its gradient."""
    model = densenet121()
    one, two = (de.plan(model, (n, 3, 224, 224), torch.bfloat16).peak_bytes for n in (64, 128))
    per_image = (two - one) / 64
    features, stem = 56 * 56 * 256 * 2, 112 * 112 * 64 * 2
    bottleneck = 56 * 56 * 128 * 2
    assert per_image == pytest.approx(2 * features + stem + 2 * bottleneck, rel=0.02)


def test_store_costs_the_bottlenecks():
    shape = (4, 3, 64, 64)
    lean = de.plan(densenet121(memory="recompute"), shape).kept_bytes
    stored = de.plan(densenet121(memory="store"), shape).kept_bytes
    bottlenecks = 4 * 128 * 4 * sum(n * (16 // 2**i) ** 2 for i, n in enumerate((6, 12, 24, 16)))
    assert stored - lean == bottlenecks


def test_inference_needs_less_than_training():
    model = densenet121()
    shape = (8, 3, 96, 96)
    assert de.plan(model, shape, training=False).peak_bytes < de.plan(model, shape).peak_bytes / 2


def test_kept_memory_is_linear_in_depth():
    """BC, k = 12, 32 pixels: the quadratic term stays below 1 % of the linear one at depth 400."""
    depths = torch.tensor([100.0, 196.0, 298.0, 400.0], dtype=torch.float64)
    kept = [
        de.plan(densenet_cifar(int(d), 12, memory="recompute"), (64, 3, 32, 32)).kept_bytes
        for d in depths.tolist()
    ]
    powers = torch.stack((torch.ones(4), depths, depths**2), 1)
    fit = torch.linalg.lstsq(powers, torch.tensor(kept, dtype=torch.float64)[:, None]).solution
    assert abs(fit[2].item()) * 400 < 0.01 * fit[1].item()


def test_max_batch_inverts_the_plan():
    model = densenet_cifar(40, 12, bottleneck=False, compression=1.0)
    batch = de.max_batch(model, (3, 32, 32), torch.float32, budget=GIB)
    assert batch > 1
    assert de.plan(model, (batch, 3, 32, 32)).peak_bytes <= GIB
    assert de.plan(model, (batch + 1, 3, 32, 32)).peak_bytes > GIB
    assert de.max_batch(model, (3, 32, 32), torch.float32, budget=1000) == 0


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_plan_counts_what_autograd_keeps(memory):
    """Between forward and backward the live tensors are the plan's kept rows."""
    model = EfficientDenseNet(8, (4, 4), 16, 4, num_classes=10, memory=memory)
    x = torch.randn(4, 3, 64, 64)
    kept = {}

    def pack(tensor):
        # Not data_ptr(), which ends the sharing of copy-on-write memory.
        kept[torch._C._data_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = torch.nn.functional.cross_entropy(model(x), torch.zeros(4, dtype=torch.long))
    for p in (*model.parameters(), x):
        kept.pop(torch._C._data_address(p), None)
    del loss
    planned = de.plan(model, tuple(x.shape)).kept_bytes
    assert sum(kept.values()) == pytest.approx(planned, rel=0.03)


FCN = {"growth_rate": 8, "block_config": (3, 4, 5, 4, 3)}
KERAS = {"norm_first": True, "relu_up": True, "early_transition": True, "drop_transitions": False}


@pytest.mark.parametrize("upsampling", ["deconv", "upsampling", "subpixel"])
@pytest.mark.parametrize("options", [{}, KERAS], ids=["paper", "keras"])
def test_plan_counts_what_an_fc_densenet_keeps(options, upsampling):
    model = EfficientFCDenseNet(**FCN, upsampling=upsampling, **options)
    x = torch.randn(2, 3, 64, 64)
    row = de.plan(model, tuple(x.shape))
    loss = sum(r.bytes for r in row.rows if r.name.startswith("logits"))
    assert kept_bytes(model, x) == pytest.approx(row.kept_bytes - loss, rel=0.03)


def test_an_fc_densenets_plan_has_a_peak_and_inverts():
    model = EfficientFCDenseNet(**FCN)
    plan = de.plan(model, (4, 3, 64, 64))
    assert "denseblock5 features" in str(plan) and "transition1 places" in str(plan)
    features = 4 * 64 * 64 * (48 + 3 * 8 + 4 * 8 + 3 * 8) * 4
    assert plan.kept_bytes + features < plan.peak_bytes < plan.kept_bytes + 1.2 * features
    inference = de.plan(model.eval(), (4, 3, 64, 64), training=False)
    assert inference.peak_bytes < 0.8 * plan.peak_bytes
    assert de.max_batch(model.train(), (3, 64, 64), budget=plan.peak_bytes) == 4
    with pytest.raises(ValueError, match="at least 4 pixels"):
        de.plan(model, (4, 3, 64, 3))


def test_plan_of_a_chain_with_max_pooling_transitions():
    model = EfficientDenseNet(8, (4, 4), 16, 4, num_classes=10)
    average = de.plan(model, (4, 3, 64, 64))
    model.features.transition1 = de.EfficientTransition(48, 24, max_pool=True)
    maximum = de.plan(model, (4, 3, 64, 64))
    assert maximum.kept_bytes == average.kept_bytes + 4 * 24 * 8 * 8


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: de.plan(m, (1, 3, 64)), ValueError, "4 positive sizes"),
        (lambda m: de.plan(m, (0, 3, 64, 64)), ValueError, "positive"),
        (lambda m: de.plan(m, (1, 4, 64, 64)), ValueError, "3 channels"),
        (lambda m: de.plan(m, (1, 3, 64, 64), torch.int8), TypeError, "dtype"),
        (lambda m: de.plan(torch.nn.Linear(1, 1), (1, 1)), TypeError, "convert"),
        (lambda m: de.max_batch(m, (3, 64, 64), budget=float("nan")), ValueError, "budget"),
        (lambda m: de.max_batch(m, (3, 64, 64), budget=-1), ValueError, "budget"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(EfficientDenseNet(4, (2, 2), 8, num_classes=2))


def test_a_reference_model_has_no_plan():
    with pytest.raises(TypeError, match="convert"):
        de.plan(reference.DenseNet(4, (2,), 8), (1, 3, 64, 64))
