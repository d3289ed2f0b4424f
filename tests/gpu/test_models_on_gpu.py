"""Blocks and whole models on a GPU: exactness compared with PyTorch, repeatable bits, streams,
threads, CUDA graphs. Run by `make gpu-check`; every test skips where torch sees no CUDA device."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import densenet_efficient as de
from densenet_efficient import reference
from densenet_efficient.bench.accuracy import error_ratio, moved_norms, training_step
from densenet_efficient.models.densenet import EfficientDenseNet, densenet264, densenet_cifar
from tests.support.block_pair import gradients
from tests.support.cuda_graphs import captured
from tests.support.peer import torchvision

pytestmark = pytest.mark.gpu

MEMORY = pytest.mark.parametrize("memory", ["recompute", "store"])


def cuda_block(memory: str = "recompute", dtype: torch.dtype = torch.bfloat16, **options):
    """A block on the GPU and the reference with the same parameters."""
    torch.manual_seed(3)
    block = reference.DenseBlock(4, 48, 4, 32, 0.0, **options).cuda().to(dtype)
    ours = de.EfficientDenseBlock(4, 48, 4, 32, 0.0, memory=memory, **options).cuda().to(dtype)
    ours.load_state_dict(block.state_dict())
    return block, ours


def images(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(*shape, device="cuda", dtype=torch.float32)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@MEMORY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_block_error_is_the_frameworks(memory: str, dtype: torch.dtype) -> None:
    block, ours = cuda_block(memory, dtype)
    exact = copy.deepcopy(block).double()
    runs: tuple[list, list, list] = ([], [], [])
    for _ in range(5):
        x = images(4, 48, 27, 30, dtype=dtype)
        dy = images(4, 176, 27, 30, dtype=dtype)
        assert ours.path(x).kind == "kernels", ours.path(x).reason
        runs[0].append(gradients(ours, x, dy))
        runs[1].append(gradients(block, x, dy))
        runs[2].append(gradients(exact, x.double(), dy.double()))
    ratio = error_ratio(*runs)
    assert ratio.accepted, ratio


def assert_errs_no_more(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], autocast: torch.dtype | None = None
) -> None:
    """Ours compared with eager under autocast or, without, in the models' own dtype."""
    exact = copy.deepcopy(theirs).double()
    dtype = next(theirs.parameters()).dtype
    runs: tuple[list, list, list] = ([], [], [])
    for _ in range(3):
        x = images(*shape, dtype=dtype)
        target = torch.randint(10, shape[:1], device="cuda")
        runs[0].append(training_step(ours, x, target, autocast))
        runs[1].append(training_step(theirs, x, target, autocast))
        runs[2].append(training_step(exact, x.double(), target))
    ratio = error_ratio(*runs)
    assert ratio.accepted, ratio


@MEMORY
@pytest.mark.parametrize(
    "precision", ["bfloat16 autocast", "float16 autocast", "bfloat16", "float32"]
)
def test_densenet121_error_is_the_frameworks(precision: str, memory: str) -> None:
    """float32: both multiply in TF32, torch's default for convolutions."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    autocast = getattr(torch, precision.split()[0]) if "autocast" in precision else None
    theirs = torchvision.models.densenet121(weights=None, num_classes=10).cuda()
    theirs = moved_norms(theirs).to(dtype, memory_format=torch.channels_last)
    ours = de.convert(copy.deepcopy(theirs), memory=memory)
    assert_errs_no_more(ours, theirs, (8, 3, 96, 96), autocast)


def test_untrained_densenet121_error_is_the_frameworks() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121(weights=None, num_classes=10).cuda()
    theirs = theirs.to(memory_format=torch.channels_last)
    ours = de.convert(copy.deepcopy(theirs))
    assert_errs_no_more(ours, theirs, (4, 3, 224, 224), torch.bfloat16)


@MEMORY
def test_padded_rows_change_nothing(memory: str) -> None:
    """Growth rate 12: no block's channels are a multiple of 16."""
    torch.manual_seed(0)
    options = dict(small_inputs=True, num_classes=10)
    theirs = reference.DenseNet(12, (3, 3, 3), 24, **options).cuda()
    ours = EfficientDenseNet(12, (3, 3, 3), 24, memory=memory, **options).cuda()
    ours.load_state_dict(theirs.state_dict())
    for norm in (m for model in (theirs, ours) for m in model.modules()):
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.fill_(0.1)
    assert_errs_no_more(ours, theirs, (16, 3, 32, 32), torch.bfloat16)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_tf32_convolutions_take_the_general_path(dtype: torch.dtype) -> None:
    block, ours = cuda_block(dtype=dtype)
    x, dy = images(2, 48, 9, 7, dtype=dtype), images(2, 176, 9, 7, dtype=dtype)
    assert ours.path(x).kind == "fallback"
    expected = gradients(copy.deepcopy(block).double(), x.double(), dy.double())
    for name, value in gradients(ours, x, dy).items():
        error = (value.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-10 if dtype == torch.float64 else 1e-5), name


@MEMORY
def test_two_runs_give_the_same_bits(memory: str) -> None:
    _, ours = cuda_block(memory)
    x, dy = images(8, 48, 28, 28), images(8, 176, 28, 28)
    first, second = gradients(ours, x, dy), gradients(ours, x, dy)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_side_streams_do_not_share_scratch() -> None:
    _, ours = cuda_block()
    x, dy = images(8, 48, 28, 28), images(8, 176, 28, 28)
    expected = gradients(ours, x, dy)
    blocks = [copy.deepcopy(ours) for _ in range(3)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in blocks]
    results = []
    for block, stream in zip(blocks, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(gradients(block, x, dy))
    torch.cuda.synchronize()
    for result in results:
        for name, value in expected.items():
            assert torch.equal(result[name], value), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_network_on_a_side_stream(dtype: torch.dtype | None) -> None:
    """Whatever PyTorch's own operators copy there waits for what was computed there."""
    torch.manual_seed(0)
    model = densenet_cifar(22, 12).cuda()
    x, target = images(8, 3, 32, 32, dtype=torch.float32), torch.randint(10, (8,), device="cuda")
    expected = training_step(model, x, target, dtype)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        found = training_step(model, x, target, dtype)
    torch.cuda.synchronize()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_threads() -> None:
    _, ours = cuda_block()
    x, dy = images(4, 48, 28, 28), images(4, 176, 28, 28)
    expected = gradients(ours, x, dy)["dx"]
    blocks = [copy.deepcopy(ours) for _ in range(4)]
    results: list[Tensor | None] = [None] * len(blocks)

    def work(i: int) -> None:
        results[i] = gradients(blocks[i], x, dy)["dx"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(blocks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None and torch.equal(result, expected)


@MEMORY
def test_a_step_can_be_captured_in_a_graph(memory: str) -> None:
    torch.manual_seed(0)
    model = densenet_cifar(40, 12, memory=memory).cuda()
    x = images(16, 3, 32, 32, dtype=torch.float32)
    target = torch.randint(10, (16,), device="cuda")

    def step() -> Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return loss

    expected = step().item()
    gradients = [p.grad.clone() for p in model.parameters()]
    graph, loss = captured(step)
    in_graph = [p.grad for p in model.parameters()]
    noise = torch.full((1 << 26,), 7.0, device="cuda")
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert noise.min() == 7
    assert loss.item() == expected
    for mine, theirs in zip(in_graph, gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_peak_memory_is_what_the_plan_says() -> None:
    model = de.convert(torchvision.models.densenet121(weights=None).cuda())
    x = images(32, 3, 224, 224, dtype=torch.float32)
    target = torch.randint(1000, (32,), device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    de.release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - before
    planned = de.plan(model, (32, 3, 224, 224), torch.bfloat16).peak_bytes
    # cuDNN's workspace for the stem's convolution and autocast's weight cache are not planned.
    assert planned == pytest.approx(measured, rel=0.10)


def test_densenet264_trains_a_step_at_batch_256() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    model = densenet264().cuda()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = images(256, 3, 224, 224, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), torch.randint(1000, (256,), device="cuda"))
    loss.backward()
    optimiser.step()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.manual_seed(0)
    ours = de.EfficientDenseBlock(2, 64, 4, 32, 0.0).cuda().bfloat16().eval()
    x = images(80, 64, 512, 512)  # 80 * 512 * 512 * 128 channels = 2.7e9 elements
    with torch.no_grad():
        y = ours(x)
        assert y.numel() > 2**31
        torch.testing.assert_close(y[-1:], ours(x[-1:]), rtol=0, atol=0)


@pytest.mark.sanitize
@MEMORY
def test_small_block_under_the_sanitizer(memory: str) -> None:
    _, ours = cuda_block(memory)
    result = gradients(ours, images(2, 48, 5, 7), images(2, 176, 5, 7))
    assert all(torch.isfinite(value).all() for value in result.values())


@pytest.mark.sanitize
def test_small_network_under_the_sanitizer() -> None:
    model = EfficientDenseNet(12, (2, 2), 24, num_classes=3).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(images(2, 3, 36, 44, dtype=torch.float32)).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
