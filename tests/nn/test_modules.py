"""The modules' behaviour: layouts, checkpointing, failures, hooks and ownership."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import densenet_efficient as de
from densenet_efficient.core import arena, gradients
from densenet_efficient.nn.architecture import DenseNetBase
from densenet_efficient.nn.fully_convolutional import FCDenseNetBase
from tests.support.block_pair import MEMORY, assert_same, pair, step


def test_memory_formats_slices_and_lists():
    block, ours = pair()
    wide = torch.randn(3, 20, 6, 5, dtype=torch.float64)
    plain = wide[:, 5:15]
    expected = block(plain)
    for x in (
        plain,
        plain.contiguous(memory_format=torch.channels_last),
        [plain[:, :4], plain[:, 4:]],
    ):
        ours.load_state_dict(pair()[0].state_dict())
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", MEMORY)
def test_frozen_parameters_and_inputs(memory):
    block, ours = pair(memory)
    for module in (block, ours):
        module.denselayer2.conv1.requires_grad_(False)
        module.denselayer1.norm1.requires_grad_(False)
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64)
    assert_same(step(block, x), step(ours, x))
    ours.zero_grad()
    ours(x).sum().backward()  # an input without gradient
    assert ours.denselayer1.conv1.weight.grad is not None
    ours.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()  # a gradient for the input alone
    assert leaf.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_running_statistics_are_updated_once_under_checkpointing(reentrant):
    block, ours = pair()
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64)
    expected = step(block, x)
    got = step(ours, x, call=lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert_same(expected, got)
    assert ours.denselayer1.norm1.num_batches_tracked == 1


def test_a_failed_call_leaves_running_statistics_alone(monkeypatch):
    _, ours = pair()
    before = copy.deepcopy(ours.state_dict())
    from densenet_efficient.core.dense_layer import DenseLayerCall

    def broken(self, *args):
        raise RuntimeError("planted")

    monkeypatch.setattr(DenseLayerCall, "conv2_forward", broken)
    with pytest.raises(RuntimeError, match="planted"):
        ours(torch.randn(2, 10, 4, 4, dtype=torch.float64))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(1, 15, 2, 2), ValueError, "16 channels"),
        (torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16), TypeError, "float32 like"),
    ],
)
def test_few_values_are_checked_before_pytorch_counts_them(x, error, text):
    block = de.EfficientDenseBlock(2, 16, 2, 4, 0.0)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(error, match=text):
        block(x)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_empty_batch():
    _, ours = pair()
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(0, 10, 4, 4, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert y.shape == (0, 28, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
    changed = [n for n, v in ours.state_dict().items() if not torch.equal(v, before[n])]
    assert all("num_batches_tracked" in name for name in changed)  # as in PyTorch


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(2, 9, 4, 4, dtype=torch.float64), ValueError, "10 channels"),
        (torch.zeros(2, 10, 4, dtype=torch.float64), ValueError, "4 dimensions"),
        (torch.zeros(2, 10, 4, 4), TypeError, "float64 like denselayer1.conv1.weight"),
        (torch.zeros(2, 10, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(1, 10, 1, 1, dtype=torch.float64), ValueError, "more than 1 value"),
        (torch.zeros(2, 10, 4, 4, dtype=torch.float64, device="meta"), ValueError, "on cpu"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(x, error, text):
    _, ours = pair()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(error, match=text):
        ours(x)
    assert all(torch.equal(v, before[n]) for n, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"growth_rate": 0}, "growth_rate"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"drop_rate": float("nan")}, "drop_rate"),
        ({"num_layers": 0}, "num_layers"),
        ({"memory": "least"}, "memory"),
        ({"dims": 4}, "dims"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": 0.0}, "eps"),
        ({"momentum": float("inf")}, "momentum"),
    ],
)
def test_bad_options(options, text):
    good = {
        "num_layers": 2, "num_input_features": 8, "bn_size": 4, "growth_rate": 4, "drop_rate": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        de.EfficientDenseBlock(**{**good, **options})


def test_hooks_and_replaced_children_run_the_original_forward():
    block, ours = pair()
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64)
    seen = []
    handle = ours.denselayer2.norm2.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="denselayer2.norm2 carries a hook"):
        got = step(ours, x)
    assert seen and ours.path(x).kind == "original"
    assert_same(step(block, x), got)
    handle.remove()
    assert ours.path(x).kind != "original"
    ours.denselayer1.relu1 = nn.ELU()
    assert "replaced by a ELU" in ours.path(x).reason
    assert "original" in str(de.explain(ours, x))


@pytest.mark.parametrize("memory", MEMORY)
def test_double_backward_and_forward_mode_give_the_original_results(memory):
    block, ours = pair(memory)
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64, requires_grad=True)

    def second_order(module):
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *module.parameters()])

    for expected, got in zip(second_order(block), second_order(ours), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    tangent = torch.randn_like(x)  # PyTorch refuses to update running statistics under jvp
    expected, got = (torch.func.jvp(m.eval(), (x.detach(),), (tangent,))[1] for m in (block, ours))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_two_forwards_before_a_backward_and_threads():
    block, ours = pair()
    xs = [torch.randn(2, 10, 5, 5, dtype=torch.float64) for _ in range(2)]
    expected = [step(copy.deepcopy(block), x)["dx"] for x in xs]
    leaves = [x.clone().requires_grad_() for x in xs]
    ys = [ours(x) for x in leaves]
    gradient = torch.linspace(-1, 1, ys[0].numel(), dtype=torch.float64).view(ys[0].shape)
    for y in reversed(ys):
        y.backward(gradient)
    for leaf, dx in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, dx, rtol=1e-10, atol=1e-12)
    blocks = [copy.deepcopy(ours) for _ in range(4)]
    results = [None] * 4

    def work(i):
        results[i] = step(blocks[i], xs[0])["dx"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for dx in results:
        torch.testing.assert_close(dx, expected[0], rtol=1e-10, atol=1e-12)


def test_scratch_is_shared_and_released():
    arena.release()
    _, ours = pair()
    x = torch.randn(2, 10, 8, 8, dtype=torch.float64)
    step(ours, x)
    reserved = arena.reserved_bytes("cpu")
    assert reserved >= 2 * 2 * 64 * 24 * 8
    step(copy.deepcopy(ours), x)
    assert arena.reserved_bytes() == reserved
    arena.release("cpu")
    assert arena.reserved_bytes() == 0


def _keep(stored, tensor):
    stored.append(tensor)
    return tensor


def test_recompute_keeps_the_feature_buffer_only():
    for memory in MEMORY:
        _, ours = pair(memory, layers=6)
        stored = []
        keep = functools.partial(_keep, stored)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = ours(torch.randn(2, 10, 8, 8, dtype=torch.float64))
        own = {id(p) for p in ours.parameters()}
        kept = {t.untyped_storage().data_ptr(): t.nbytes for t in stored if id(t) not in own}
        bottlenecks = 6 * 2 * 64 * 24 * 8 if memory == "store" else 0
        assert y.nbytes + bottlenecks <= sum(kept.values()) < (y.nbytes + bottlenecks) * 1.2


def test_the_gradient_is_written_in_place_only_when_nobody_else_sees_it(monkeypatch):
    answers = []
    ask = gradients.is_sole_owner
    monkeypatch.setattr(
        gradients, "is_sole_owner", lambda held: answers.append(ask(held)) or answers[-1]
    )
    _, ours = pair()
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = step(copy.deepcopy(ours), x, gradient=torch.full((2, 28, 4, 4), 2.0).double())["dx"]

    def run(act):
        leaf = x.clone().requires_grad_()
        answers.clear()
        module = copy.deepcopy(ours)
        watched = act(module(leaf))
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-10, atol=1e-12)
        for g in watched or []:
            assert bool((g == 2).all()), "a gradient somebody holds was overwritten"
        return answers

    def alone(y):
        (y * torch.full_like(y, 2.0)).sum().backward()

    def kept_by_a_hook(y):
        seen = []
        y.register_hook(seen.append)
        (y * torch.full_like(y, 2.0)).sum().backward()
        return seen

    def retained(y):
        y.retain_grad()
        (y * torch.full_like(y, 2.0)).sum().backward()
        return [y.grad]

    def shared_with_a_leaf(y):
        z = torch.zeros_like(y).requires_grad_()
        ((y + z) * torch.full_like(y, 2.0)).sum().backward()
        return [z.grad]

    def given_by_the_caller(y):
        g = torch.full_like(y, 2.0)
        y.backward(g)
        return [g]

    def a_view_of_what_the_caller_gave(y):
        g = torch.full((y.numel(),), 2.0, dtype=y.dtype)
        strided = g.view(2, 4, 4, 28).permute(0, 3, 1, 2)
        y.backward(strided)
        return [g]

    assert run(alone) == [True]
    assert run(kept_by_a_hook) == [False]
    for act in (retained, shared_with_a_leaf, given_by_the_caller, a_view_of_what_the_caller_gave):
        run(act)


def test_deepcopy_pickle_and_state_dict_keys():
    import io

    block, ours = pair()
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(ours), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 10, 4, 4, dtype=torch.float64)
    assert_same(step(block, x), step(loaded, x))
    assert list(loaded.state_dict()) == list(block.state_dict())


@pytest.mark.parametrize("base", [DenseNetBase, FCDenseNetBase])
def test_a_network_without_blocks_of_its_own_is_told_what_to_define(base):
    class Mine(base):
        pass

    with pytest.raises(NotImplementedError, match="Mine must define _make_block"):
        Mine(4, (2, 2, 2), 8)
