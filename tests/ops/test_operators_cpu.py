"""Every operator on the CPU against its twin in `reference`.

Activations are channel slices of larger buffers whose other channels hold NaN, so a read outside a
slice shows in the values and a write outside it in the buffer. In float64 the results agree to
rounding; in lower precision the error against float64 is compared with the framework's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from densenet_efficient import reference
from densenet_efficient.ops import compiled
from tests.conftest import relative_error
from tests.support.bad_calls import BAD_CALLS, assert_refused

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative error against the reference on the same rounded input: what is left is the order of the
# sums and one rounding of what is stored.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 1e-3,
}


class Buffers:
    """Makes tensors as slices of NaN-filled buffers, and checks that the NaN are still there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffers: list[tuple[Tensor, int, int]] = []

    def slice(self, *shape: int, before: int = 3, after: int = 5) -> Tensor:
        """An activation [..., C] filled with NaN, in a buffer with C + 8 channels."""
        channels = shape[-1]
        buffer = torch.full((*shape[:-1], before + channels + after), math.nan, dtype=self.dtype)
        self.buffers.append((buffer, before, before + channels))
        return buffer[..., before : before + channels]

    def random(self, *shape: int) -> Tensor:
        """A random activation, away from zero mean and unit variance."""
        x = self.slice(*shape)
        return x.copy_(torch.randn(shape, dtype=torch.float64) * 1.5 + 0.5)

    def table(self, rows: int, channels: int) -> Tensor:
        """A table of per-channel vectors as a slice of a wider one, filled with NaN."""
        wide = reference.stages.wide_dtype(self.dtype)
        return torch.full((rows, channels + 4), math.nan, dtype=wide)[:, 2 : 2 + channels]

    def check_outside(self) -> None:
        for buffer, first, last in self.buffers:
            assert buffer[..., :first].isnan().all(), "wrote in front of the slice"
            assert buffer[..., last:].isnan().all(), "wrote behind the slice"


def norm_of(x: Tensor) -> Tensor:
    """A norm [4, C] with the statistics of x and random gamma and beta of both signs."""
    channels = x.shape[-1]
    stats = reference.channel_stats(x.flatten(0, -2))
    gamma, beta = torch.randn(2, channels, dtype=stats.dtype)
    return reference.norm_fold(stats, gamma, beta, 1e-5)


def correction_of(y: Tensor) -> Tensor:
    """A correction [4, K] of plausible size."""
    norm = norm_of(y)
    dnorm = torch.randn(2, y.shape[-1], dtype=norm.dtype)
    return reference.norm_correction(dnorm, norm, max(1, y.flatten(0, -2).shape[0]))


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        error = relative_error(value, exact[name])
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.3g}"


# Every operator as a function of its shape: its results, and the reference's on the same input.
Stage = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]


def conv1x1_forward(b: Buffers, M: int, C: int, K: int) -> tuple:
    x, y, stats = b.random(M, C), b.slice(M, K), b.table(2, K)
    norm, weight = norm_of(x), torch.randn(K, C, dtype=b.dtype)
    compiled.norm_relu_conv1x1_forward(x, norm, weight, y, stats)
    exact = reference.norm_relu_conv1x1_forward(x, norm, weight)
    return dict(y=y, stats=stats), dict(y=exact[0], stats=reference.channel_stats(y))


def conv1x1_backward(b: Buffers, M: int, C: int, K: int) -> tuple:
    x, y, dz_y, dx = b.random(M, C), b.random(M, K), b.random(M, K), b.random(M, C)
    norm, correction, weight = norm_of(x), correction_of(y), torch.randn(K, C, dtype=b.dtype)
    dweight, dnorm = torch.full((K, C), math.nan, dtype=norm.dtype), b.table(2, C)
    before = dx.clone()
    compiled.norm_relu_conv1x1_backward(dz_y, y, correction, x, norm, weight, dx, dweight, dnorm)
    added, *exact = reference.norm_relu_conv1x1_backward(dz_y, y, correction, x, norm, weight)
    return (
        dict(dx=dx, dweight=dweight, dnorm=dnorm),
        dict(dx=before + added, dweight=exact[0], dnorm=exact[1]),
    )


def conv3x3_forward(b: Buffers, N: int, H: int, W: int, C: int, K: int) -> tuple:
    x, y, stats = b.random(N, H, W, C), b.slice(N, H, W, K), b.table(2, K)
    norm, weight = norm_of(x), torch.randn(K, C, 3, 3, dtype=b.dtype)
    compiled.norm_relu_conv3x3_forward(x, norm, weight, y, stats)
    exact = reference.norm_relu_conv3x3_forward(x, norm, weight)
    return dict(y=y, stats=stats), dict(y=exact[0], stats=reference.channel_stats(y.flatten(0, 2)))


def conv3x3_backward(
    b: Buffers, N: int, H: int, W: int, C: int, K: int, corrected: bool, accumulate: bool
) -> tuple:
    x, dy, dx = b.random(N, H, W, C), b.random(N, H, W, K), b.random(N, H, W, C)
    y = b.random(N, H, W, K) if corrected else None
    norm = norm_of(x)
    correction = None if y is None else correction_of(y)
    # Any dense layout of the weight is accepted.
    weight = torch.randn(K, 3, 3, C, dtype=b.dtype).permute(0, 3, 1, 2)
    dweight, dnorm = torch.full((K, C, 3, 3), math.nan, dtype=norm.dtype), b.table(2, C)
    before = dx.clone()
    compiled.norm_relu_conv3x3_backward(
        dy, y, correction, x, norm, weight, accumulate, dx, dweight, dnorm
    )
    dx_exact, *exact = reference.norm_relu_conv3x3_backward(
        dy, y, correction, x, norm, weight, accumulate
    )
    if accumulate:
        dx_exact = before + dx_exact
    return (
        dict(dx=dx, dweight=dweight, dnorm=dnorm),
        dict(dx=dx_exact, dweight=exact[0], dnorm=exact[1]),
    )


def transition_forward(b: Buffers, N: int, H: int, W: int, C: int, K: int) -> tuple:
    x, y, stats = b.random(N, H, W, C), b.slice(N, H // 2, W // 2, K), b.table(2, K)
    norm, weight = norm_of(x), torch.randn(K, C, dtype=b.dtype)
    compiled.transition_forward(x, norm, weight, y, stats)
    exact = reference.transition_forward(x, norm, weight)
    return dict(y=y, stats=stats), dict(y=exact[0], stats=reference.channel_stats(y.flatten(0, 2)))


def transition_backward(
    b: Buffers, N: int, H: int, W: int, C: int, K: int, batch_statistics: bool
) -> tuple:
    x, dy, dx = b.random(N, H, W, C), b.random(N, H // 2, W // 2, K), b.slice(N, H, W, C)
    norm, weight = norm_of(x), torch.randn(K, C, dtype=b.dtype)
    dweight, dnorm = torch.full((K, C), math.nan, dtype=norm.dtype), b.table(2, C)
    count = N * H * W if batch_statistics else 0
    compiled.transition_backward(dy, x, norm, weight, count, dx, dweight, dnorm)
    exact = reference.transition_backward(dy, x, norm, weight, count)
    return (
        dict(dx=dx, dweight=dweight, dnorm=dnorm),
        dict(zip(["dx", "dweight", "dnorm"], exact, strict=True)),
    )


def stem_forward(b: Buffers, N: int, H: int, W: int, C: int) -> tuple:
    x, y, stats = b.random(N, H, W, C), b.slice(N, (H + 1) // 2, (W + 1) // 2, C), b.table(2, C)
    norm = norm_of(x)
    compiled.stem_forward(x, norm, y, stats)
    exact = reference.stem_forward(x, norm)
    return dict(y=y, stats=stats), dict(y=exact[0], stats=reference.channel_stats(y.flatten(0, 2)))


def stem_backward(b: Buffers, N: int, H: int, W: int, C: int, batch_statistics: bool) -> tuple:
    x, dx = b.random(N, H, W, C), b.slice(N, H, W, C)
    dy, dnorm = b.random(N, (H + 1) // 2, (W + 1) // 2, C), b.table(2, C)
    norm, count = norm_of(x), N * H * W if batch_statistics else 0
    compiled.stem_backward(dy, x, norm, count, dx, dnorm)
    exact = reference.stem_backward(dy, x, norm, count)
    return dict(dx=dx, dnorm=dnorm), dict(dx=exact[0], dnorm=exact[1])


def channel_stats(b: Buffers, M: int, C: int) -> tuple:
    x, stats = b.random(M, C), b.table(2, C)
    compiled.channel_stats(x, stats)
    return dict(stats=stats), dict(stats=reference.channel_stats(x))


def norm_correction_apply(b: Buffers, M: int, C: int) -> tuple:
    x, dx = b.random(M, C), b.random(M, C)
    correction, before = correction_of(x), dx.clone()
    compiled.norm_correction_apply(dx, x, correction)
    return dict(dx=dx), dict(dx=reference.norm_correction_apply(before, x, correction))


# (stage, shape): each shape is there for what is written beside it.
CASES: list[tuple[Stage, tuple]] = [
    (channel_stats, (1000, 37)),  # several tiles, channels that fill no vector
    (channel_stats, (1, 5)),  # one row: variance zero
    (norm_correction_apply, (131, 37)),  # a tail of rows
    (conv1x1_forward, (997, 64, 128)),  # several tiles of unequal height
    (conv1x1_forward, (61, 37, 19)),  # no dimension fills a unit, a vector or a panel
    (conv1x1_forward, (1, 1, 1)),  # one pixel, one channel
    (conv1x1_forward, (50, 600, 48)),  # long reduction, a panel and a half
    (conv1x1_backward, (997, 64, 128)),
    (conv1x1_backward, (61, 37, 19)),
    (conv1x1_backward, (1, 1, 1)),
    (conv1x1_backward, (75, 600, 48)),  # columns in three blocks
    (conv3x3_forward, (2, 14, 14, 128, 32)),  # DenseNet's bottleneck
    (conv3x3_forward, (1, 37, 29, 20, 12)),  # growth rate 12, bands of unequal height
    (conv3x3_forward, (3, 1, 1, 5, 3)),  # only the middle tap meets the image
    (conv3x3_forward, (1, 1, 9, 7, 1)),  # one image row, odd channels
    (conv3x3_backward, (2, 14, 14, 128, 32, True, False)),
    (conv3x3_backward, (1, 37, 29, 20, 12, True, True)),  # a plain layer: accumulates
    (conv3x3_backward, (3, 1, 1, 5, 3, False, False)),
    (conv3x3_backward, (1, 9, 1, 7, 1, False, True)),  # one image column
    (conv3x3_backward, (1, 5, 6, 300, 16, True, True)),  # columns in two blocks
    (transition_forward, (2, 14, 14, 64, 32)),
    (transition_forward, (3, 7, 5, 19, 9)),  # the odd edges are dropped
    (transition_forward, (2, 1, 1, 8, 4)),  # nothing is left behind the pooling
    (transition_backward, (2, 14, 14, 64, 32, True)),
    (transition_backward, (3, 7, 5, 19, 9, True)),  # the odd edges get the correction alone
    (transition_backward, (3, 7, 5, 19, 9, False)),  # constant statistics
    (transition_backward, (2, 1, 1, 8, 4, True)),
    (stem_forward, (2, 16, 16, 64)),
    (stem_forward, (3, 7, 5, 19)),  # windows over every edge
    (stem_forward, (1, 1, 1, 3)),
    (stem_backward, (2, 16, 16, 64, True)),
    (stem_backward, (3, 7, 5, 19, True)),
    (stem_backward, (3, 7, 6, 19, False)),
    (stem_backward, (1, 1, 1, 3, False)),
]
IDS = [f"{stage.__name__}-{'x'.join(str(int(s)) for s in shape)}" for stage, shape in CASES]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("stage, shape", CASES, ids=IDS)
def test_agrees_with_the_reference(stage: Stage, shape: tuple, dtype: torch.dtype) -> None:
    buffers = Buffers(dtype)
    ours, exact = stage(buffers, *shape)
    assert_close(ours, exact, dtype)
    buffers.check_outside()


@pytest.fixture
def thread_counts() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# One shape per stage with several groups of tiles; the sums of each dtype take the same path.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "stage, shape",
    [
        (channel_stats, (3000, 64)),
        (conv1x1_forward, (1500, 96, 64)),
        (conv1x1_backward, (1500, 300, 64)),
        (conv3x3_forward, (3, 14, 14, 64, 32)),
        (conv3x3_backward, (3, 14, 14, 64, 32, True, False)),
        (transition_forward, (3, 30, 30, 64, 32)),
        (transition_backward, (3, 30, 30, 64, 32, True)),
        (stem_forward, (3, 30, 30, 32)),
        (stem_backward, (3, 30, 30, 32, True)),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.usefixtures("thread_counts")
def test_independent_of_the_number_of_threads(
    stage: Stage, shape: tuple, dtype: torch.dtype
) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(stage(Buffers(dtype), *shape)[0])
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), f"{name} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def test_empty_input(dtype: torch.dtype) -> None:
    """No rows: statistics and sums are zero, not left as they were."""
    b = Buffers(dtype)
    wide = reference.stages.wide_dtype(dtype)
    x, y, norm = b.slice(0, 6), b.slice(0, 4), torch.ones(4, 6, dtype=wide)
    weight, correction = torch.ones(4, 6, dtype=dtype), torch.ones(4, 4, dtype=wide)
    image, image_y = b.slice(0, 8, 8, 6), b.slice(0, 8, 8, 4)
    pooled, pooled_y = b.slice(0, 4, 4, 6), b.slice(0, 4, 4, 4)
    weight3x3 = torch.ones(4, 6, 3, 3, dtype=dtype)
    written: list[Tensor] = []

    def out(*shape: int) -> Tensor:
        written.append(torch.full(shape, math.nan, dtype=wide))
        return written[-1]

    compiled.channel_stats(x, out(2, 6))
    compiled.norm_correction_apply(x, x, torch.ones(4, 6, dtype=wide))
    compiled.norm_relu_conv1x1_forward(x, norm, weight, y, out(2, 4))
    compiled.norm_relu_conv1x1_backward(y, y, correction, x, norm, weight, x, out(4, 6), out(2, 6))
    compiled.norm_relu_conv3x3_forward(image, norm, weight3x3, image_y, out(2, 4))
    compiled.norm_relu_conv3x3_backward(
        image_y, image_y, correction, image, norm, weight3x3, False, image, out(4, 6, 3, 3),
        out(2, 6),
    )  # fmt: skip
    compiled.transition_forward(image, norm, weight, pooled_y, out(2, 4))
    compiled.transition_backward(pooled_y, image, norm, weight, 0, image, out(4, 6), out(2, 6))
    compiled.stem_forward(image, norm, pooled, out(2, 6))
    compiled.stem_backward(pooled, image, norm, 0, image, out(2, 6))
    for tensor in written:
        assert (tensor == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_fold_and_correction(dtype: torch.dtype) -> None:
    """The per-channel vectors: with and without affine parameters, constant statistics, and the
    shared correction, whose other columns and rows stay."""
    b = Buffers(dtype)
    x = b.random(40, 9)
    stats, gamma, beta = reference.channel_stats(x), torch.randn(9, dtype=dtype), None
    for use_gamma, use_beta in ((None, None), (gamma, beta), (gamma, torch.randn(9, dtype=dtype))):
        norm = b.table(4, 9)
        compiled.norm_fold(stats, use_gamma, use_beta, 1e-3, norm)
        exact = reference.norm_fold(stats.double(), use_gamma, use_beta, 1e-3)
        assert relative_error(norm, exact) < TOLERANCE[dtype]
    dnorm = torch.randn(2, 9, dtype=dtype)
    for count in (0, 40):
        correction = b.table(4, 9)
        compiled.norm_correction(dnorm, norm, count, False, correction)
        exact = reference.norm_correction(dnorm, norm, count)
        assert relative_error(correction, exact) < TOLERANCE[dtype]
    shared = torch.randn(4, 12, dtype=dtype)
    exact = shared.clone()
    exact[:, :9] += reference.norm_correction(dnorm, norm, 40, accumulate=True)
    compiled.norm_correction(dnorm, norm, 40, True, shared)
    assert relative_error(shared, exact) < TOLERANCE[dtype]


def test_relu_mask_is_the_forwards_and_nan_passes() -> None:
    """Exact zeros are cut in both directions, as in the framework; a NaN is not hidden."""
    x = torch.tensor([[0.0, -1.0, 2.0, math.nan]], dtype=torch.float64)
    norm = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4, [1.0] * 4], dtype=torch.float64)
    y = torch.empty(1, 4, dtype=torch.float64)
    compiled.norm_relu_conv1x1_forward(x[:, :3], norm[:, :3], torch.eye(4, 3).double(), y, None)
    assert y.tolist() == [[0.0, 0.0, 2.0, 0.0]]
    compiled.norm_relu_conv1x1_forward(x, norm, torch.eye(4).double(), y, None)
    assert y[0, 3].isnan()
    dx, dnorm = torch.zeros(1, 4, dtype=torch.float64), torch.empty(2, 4, dtype=torch.float64)
    plain = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4], dtype=torch.float64)
    ones = torch.ones(1, 4, dtype=torch.float64)
    compiled.norm_relu_conv1x1_backward(
        ones, ones, plain, x, norm, torch.eye(4).double(), dx, None, dnorm
    )
    assert dx.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert dnorm[1].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_optional_results() -> None:
    """Without stats and without a weight gradient the other results are the same."""
    x, y = torch.randn(50, 20), torch.empty(50, 8)
    norm, weight = norm_of(x), torch.randn(8, 20)
    compiled.norm_relu_conv1x1_forward(x, norm, weight, y, None)
    assert relative_error(y, reference.norm_relu_conv1x1_forward(x, norm, weight)[0]) < 1e-6
    results = []
    for dweight in (torch.empty(8, 20), None):
        dx, dnorm = torch.zeros(50, 20), torch.empty(2, 20)
        compiled.norm_relu_conv1x1_backward(
            y, y, correction_of(y).fill_(0.5), x, norm, weight, dx, dweight, dnorm
        )
        results.append((dx, dnorm))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name, arguments, message", BAD_CALLS)
def test_bad_input_is_named_and_nothing_is_written(
    name: str, arguments: tuple, message: str
) -> None:
    assert_refused(lambda op, *a: getattr(compiled, op)(*a), name, arguments, message)
