"""What the kernels do to memory, counted in the emulation and held to each operator's byte model,
at shapes of DenseNet-121 and BC-100-12 with fewer pixels.

Activations are counted as multiples of their own bytes: what warps ask for, and what must come from
memory at least once. Per-channel tables, weights and workspaces are small or come from the caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tests.support.emulators import emulator
from tools.emulation import tensor_traffic
from tools.emulation.report import SECTOR
from tools.op_cases import make

pytestmark = pytest.mark.slow

TOLERANCE = 0.02
SECTOR_EFFICIENCY = 0.99


@dataclass(frozen=True)
class Model:
    op: str
    sizes: tuple[int, ...]
    requested: dict[str, tuple[float, float]]  # times loaded and stored
    from_memory: dict[str, float] = field(
        default_factory=dict
    )  # times, where caches serve the rest
    before: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{'x'.join(map(str, self.sizes))}-{dtype}"


def stem_columns(width: int, windows: int) -> float:
    """Three inputs a window, one of them missing at the left edge, over the inputs there are."""
    return (3 * windows - 1) / width


MODELS = [
    Model("channel_stats", (3136, 64), {"x": (1, 0)}),
    Model("channel_stats", (1024, 216), {"x": (1, 0)}),
    Model("channel_stats", (1024, 12), {"x": (1, 0)}, before=36),
    Model("norm_correction_apply", (3136, 32), {"dx": (1, 1), "x": (1, 0)}, before=64),
    Model("norm_correction_apply", (1024, 24), {"dx": (1, 1), "x": (1, 0)}),
    # Each window reads three columns, of which a neighbour's comes from the cache.
    Model(
        "stem_forward",
        (4, 8, 112, 64),
        {"x": (stem_columns(112, 56), 0), "y": (0, 1)},
        {"x": 1},
    ),
    # Sums and gradient; the latter's four tiles of 14 windows compute one more each, but the last,
    # and every window but the last of a row reads its right neighbour's gradient again.
    Model(
        "stem_backward",
        (4, 8, 112, 64),
        {
            "x": (stem_columns(112, 56) + stem_columns(112, 56 + 3), 0),
            "dy": (1 + (56 + 3) / 56 + 55 / 56, 0),
            "dx": (0, 1),
        },
        {"x": 2, "dy": 2},
    ),
    # The window's rows of 21 values are padded to 24, and 21 eights to 22.
    Model(
        "stem_conv_forward",
        (2, 32, 224, 3, 64),
        {"y": (0, 1)},
        flops=2 * 2 * 16 * 112 * 64 * 22 * 8,
    ),
    Model(
        "stem_conv_backward_weight",
        (2, 32, 224, 3, 96),
        {"dy": (1, 0)},
        flops=2 * 2 * 16 * 112 * 96 * 21 * 8,
    ),
    # Two products: with the pooled operand, and with what its rounding left.
    Model(
        "transition_forward",
        (1, 32, 32, 256, 128),
        {"x": (1, 0), "y": (0, 1)},
        flops=2 * 2 * 256 * 256 * 128,
    ),
    Model(
        "transition_forward",
        (1, 16, 32, 512, 256),
        {"x": (1, 0), "y": (0, 1)},
        flops=2 * 2 * 128 * 512 * 256,
    ),
    Model(
        "transition_forward",
        (1, 32, 32, 256, 128),
        {"x": (1, 0), "y": (0, 1)},
        flops=2 * 2 * 256 * 256 * 128,
        dtype=torch.float32,
    ),
    Model("transition_forward", (1, 32, 32, 216, 108), {"x": (1, 0), "y": (0, 1)}),
    # x for the sums and for dx. dpooled and the pooled activations are a quarter of dx each, stored
    # once; read for the sums and for dx, and for dweight. dy once per 128 channels, and as often
    # again by dweight.
    Model(
        "transition_backward",
        (1, 32, 32, 256, 128),
        {"x": (2, 0), "dy": (4, 0), "dx": (0.75, 1.5)},
        {"dy": 2},
        flops=4 * 256 * 256 * 128,
    ),
    # In float32 the pooled activations of dweight are two operands as well.
    Model(
        "transition_backward",
        (1, 32, 32, 256, 128),
        {"x": (2, 0), "dy": (4, 0), "dx": (0.75, 1.5)},
        {"dy": 2},
        flops=6 * 256 * 256 * 128,
        dtype=torch.float32,
    ),
    Model(
        "transition_backward",
        (1, 32, 32, 216, 108),
        {"x": (2, 0), "dy": (4, 0), "dx": (0.75, 1.5)},
    ),
    # 300 channels are no whole 16-byte vectors; three blocks of 128 channels for dweight's pass and
    # for dpooled's.
    Model(
        "transition_backward",
        (1, 16, 16, 300, 150),
        {"x": (2, 0), "dy": (6, 0), "dx": (1, 1.5)},
    ),
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_traffic_follows_the_byte_model(model: Model) -> None:
    case = make(model.op, model.sizes, model.dtype, before=model.before)
    launches = emulator().call(case.op, *case.arguments.values())
    traffic = tensor_traffic(launches)
    for name, (loaded, stored) in model.requested.items():
        load, store, size = traffic[name].load, traffic[name].store, case.sizes[name]
        assert load.bytes / size == pytest.approx(loaded, rel=TOLERANCE), f"{name} loaded"
        assert store.bytes / size == pytest.approx(stored, rel=TOLERANCE), f"{name} stored"
        assert load.efficiency >= SECTOR_EFFICIENCY, f"{name}: sectors loaded"
        assert store.efficiency >= SECTOR_EFFICIENCY, f"{name}: sectors stored"
    for name, times in model.from_memory.items():
        memory = traffic[name].load.distinct * SECTOR / case.sizes[name]
        assert memory == pytest.approx(times, rel=TOLERANCE), f"{name} from memory"
    for launch in launches:
        conflicts = [site for site in launch.sites if "shared" in site.access and site.factor > 1]
        assert not conflicts, f"bank conflicts in {launch.kernel}: {conflicts}"
    if model.flops:
        assert sum(launch.mma_flops for launch in launches) == model.flops


def test_counters_of_a_small_call() -> None:
    """By hand: 64 rows of 64 channels in bfloat16 are one block; every thread loads two vectors."""
    case = make("channel_stats", (64, 64), torch.bfloat16)
    stats, finish = emulator().call(case.op, *case.arguments.values())
    assert (stats.grid, stats.block, stats.op) == ((1, 1), 256, "channel_stats")
    assert stats.kernel == "channel_stats_kernel<BFloat16, 8>"
    x = stats.tensors["x"].load
    assert (x.bytes, x.sectors, x.distinct, x.efficiency) == (64 * 128, 256, 256, 1.0)
    (site,) = (s for s in stats.sites if s.file == "channel_stats.cu")
    assert (site.access, site.requests) == ("global load", 16)
    assert finish.tensors["stats"].store.bytes == 2 * 64 * 4
    assert stats.mma == stats.ldmatrix == stats.shuffles == 0
    assert stats.barriers == 2 * 5 + 1  # 32 lanes merge in five rounds
