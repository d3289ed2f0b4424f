"""`torch.compile`: whole networks in one graph, and the numbers of eager execution."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch import Tensor, nn

from densenet_efficient import (
    EfficientDenseBlock,
    EfficientDenseNet,
    EfficientFCDenseNet,
    convert,
    explain,
)
from densenet_efficient.core import graph_pooling
from densenet_efficient.core.encoding import decode, encode
from densenet_efficient.core.specs import NormSpec, PoolSpec
from tests.support.conversion_cases import CASES, Case
from tests.support.conversion_comparison import step
from tests.support.converted_pair import assert_close, converted_pair, images, training_step

pytestmark = pytest.mark.slow  # tracing takes seconds


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled remains of another test, nor for one; dropout draws as in eager."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def compiled(
    model: nn.Module, backend: str = "aot_eager"
) -> tuple[Any, torch._dynamo.testing.CompileCounterWithBackend]:
    """The model in one graph, and what counts how often it is compiled."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def assert_same_steps(eager: nn.Module, graph: Any, batches: list[Tensor]) -> None:
    """Steps of both, with the same random numbers, give the same."""
    for x in batches:
        found = []
        for model in (eager, graph):
            torch.manual_seed(5)
            found.append(training_step(model, x))
        expected, got = found
        assert_close(expected, {k.removeprefix("_orig_mod."): v for k, v in got.items()})


def small(**options: Any) -> nn.Module:
    return EfficientDenseNet(4, (2, 3), 8, num_classes=5, **options).double()


def with_dropout(memory: str) -> nn.Module:
    model = small(drop_rate=0.3, drop_everywhere=True, small_inputs=True)
    for module in model.modules():
        if isinstance(module, EfficientDenseBlock):
            module.memory = memory
    return model


def frozen() -> nn.Module:
    """A block in eval mode, another whose convolutions are fixed, norms without parameters."""
    model = small()
    model.features.denseblock1.eval().requires_grad_(False)
    for name, parameter in model.features.denseblock2.named_parameters():
        parameter.requires_grad_("conv1" not in name)
    for name in ("weight", "bias"):
        setattr(model.features.denseblock2.denselayer1.norm2, name, None)
    model.features.transition1.norm.momentum = None
    model.features.transition1.norm.eps = 1e-2
    return model


def without_running_statistics() -> nn.Module:
    model = small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.num_features != 8:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "dropout, recompute": lambda: with_dropout("recompute"),
    "dropout, store": lambda: with_dropout("store"),
    "eval": lambda: small().eval(),
    "frozen": frozen,
    "batch statistics": without_running_statistics,
    "dilated, plain layers": lambda: small(output_stride=4, bottleneck=False),
    "features": lambda: converted_pair()[1].features,
    "segmentation": lambda: EfficientFCDenseNet(
        4, (2, 2, 2), 8, drop_rate=0.0, num_classes=5
    ).double(),
    "block": lambda: EfficientDenseBlock(3, 3, 2, 4, 0.2, memory="store").double(),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_one_graph_gives_the_steps_of_eager(build: Callable[[], nn.Module]) -> None:
    """Output, gradients and running statistics, for two sizes of the batch."""
    eager = build()
    graph, counter = compiled(copy.deepcopy(eager))
    assert_same_steps(eager, graph, [images(3), images(5)])
    assert counter.frame_count == 2  # for one batch size, then for any


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_backends(backend: str) -> None:
    eager = with_dropout("recompute")
    graph, _ = compiled(copy.deepcopy(eager), backend)
    x = images(2).contiguous(memory_format=torch.channels_last)
    assert_same_steps(eager, graph, [x, images(2)])


def test_a_dynamic_batch_is_compiled_once() -> None:
    eager = small()
    graph, counter = compiled(copy.deepcopy(eager))
    batches = [images(n) for n in (3, 2, 7)]
    for x in batches:
        torch._dynamo.mark_dynamic(x, 0)
    for x in batches:
        assert_close(eager(x), graph(x))
    assert counter.frame_count == 1


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "eval": lambda m: m.eval(),
    "epsilon": lambda m: setattr(m.features.denseblock1.denselayer2.norm2, "eps", 0.1),
    "momentum": lambda m: setattr(m.features.transition1.norm, "momentum", 0.5),
    "memory": lambda m: setattr(m.features.denseblock2, "memory", "store"),
    "replaced": lambda m: setattr(m.features.denseblock1.denselayer1, "relu1", nn.ELU()),
}


def test_changes_after_compilation_compile_again() -> None:
    eager = small()
    graph, counter = compiled(copy.deepcopy(eager), "eager")
    x = images(2)
    with torch._dynamo.config.patch(recompile_limit=20):
        for change in (lambda m: m, *CHANGES.values()):
            before = counter.frame_count
            for model in (eager, graph._orig_mod):
                change(model)
            assert_same_steps(eager, graph, [x])
            assert counter.frame_count == before + 1


WITHOUT_ASSERTIONS = """
import torch
from densenet_efficient import EfficientDenseBlock

assert False, "assertions are left out"
try:  # a condition of nobody's: the Dynamo of torch 2.10 and 2.11 looks for assertions in each
    torch.compile(lambda x: -x if x.is_meta or x.is_cuda else x, backend="eager")(torch.ones(1))
except torch._dynamo.exc.InternalTorchDynamoError:
    raise SystemExit("Dynamo traces no condition under python -O")
block = EfficientDenseBlock(2, 3, 2, 4, 0.0).double()
graph = torch.compile(block, backend="eager", fullgraph=True)
x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
with torch.no_grad():
    graph(x)
    for change in (lambda: setattr(block.denselayer2.norm2, "eps", 0.1), block.eval):
        change()
        torch.testing.assert_close(graph(x), block(x))
"""


def test_changes_compile_again_under_python_without_assertions() -> None:
    """``python -O`` leaves assertions out."""
    done = subprocess.run(
        [sys.executable, "-O", "-c", WITHOUT_ASSERTIONS],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    if "Dynamo traces no condition" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr


def test_blocks_compiled_one_by_one_keep_their_own_plans() -> None:
    """Dynamo caches by the code, which all blocks share."""
    blocks = [
        EfficientDenseBlock(2, 3, 2, 4, 0.0, eps=eps, memory=memory).double()
        for eps, memory in ((1e-5, "store"), (0.1, "recompute"))
    ]
    for block in blocks:
        block.load_state_dict(blocks[0].state_dict())
        assert_same_steps(copy.deepcopy(block), compiled(block, "eager")[0], [images(2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model = small().float().features.denseblock1
    eager, x = copy.deepcopy(model), torch.randn(2, 8, 8, 8).to(dtype)
    graph, _ = compiled(model)
    found = []
    for module in (eager, graph):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
    assert_close(*found)


def test_an_output_may_be_written_to() -> None:
    """Though the block keeps it for backward, as long as nobody has written."""
    block = EfficientDenseBlock(2, 3, 2, 4, 0.0).double()

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.contiguous(memory_format=torch.channels_last)).mul_(2)

    x = images(2)
    expected = training_step(copy.deepcopy(block), x, call)
    got = training_step(compiled(block)[0], x, call)
    assert_close(list(expected.values()), list(got.values()))


def test_hooked_blocks_are_traced_as_they_are() -> None:
    eager = small()
    calls = []
    eager.features.denseblock1.denselayer1.conv1.register_forward_hook(
        lambda module, args, y: calls.append(y.shape) or 2 * y
    )
    graph, _ = compiled(copy.deepcopy(eager), "eager")
    assert_same_steps(eager, graph, [images(2)])
    assert len(calls) == 2


def test_a_forward_of_a_subclass_is_traced() -> None:
    eager = small()
    transition = eager.features.transition1
    kind = type(transition)
    own = {"forward": lambda self, x: torch.tanh(kind.forward(self, x))}
    transition.__class__ = type("Own", (kind,), own)
    graph, _ = compiled(copy.deepcopy(eager), "eager")
    assert_same_steps(eager, graph, [images(2)])


def test_end_points() -> None:
    eager = small()
    graph = torch.compile(eager.forward_end_points, backend="eager", fullgraph=True)
    x = images(2)
    assert_close(eager.eval().forward_end_points(x), graph(x))


@pytest.mark.quick
def test_a_call_is_a_string() -> None:
    """What a graph stores of a call is all of it, and nothing of this process."""
    block = frozen().features.denseblock1
    with torch.no_grad():
        _, _, layers = block._specification(torch.float32)
    text = encode(layers)
    assert encode(decode(text)) == text
    assert decode(text)[0].norm1.running is True


LIBRARIES = [
    case
    for case in CASES
    if case.name in (
        "timm: 4 timm, features_only", "pytorchcv: 10 pytorchcv",
        "zoo: 9 bfortuner, upsample", "zoo: 12 kuangliu, newest first",
    )
]  # fmt: skip


@pytest.mark.parametrize("case", LIBRARIES, ids=lambda case: case.name)
def test_networks_of_other_libraries(case: Case) -> None:
    """Those whose blocks are called, or give their outputs, differently."""
    eager = convert(case.make().double())
    graph, _ = compiled(copy.deepcopy(eager), "eager")
    x = torch.randn(case.shape, dtype=torch.float64)
    torch.manual_seed(1)
    expected = step(eager, x)
    torch.manual_seed(1)
    assert_close(expected, {k.replace("_orig_mod.", ""): v for k, v in step(graph, x).items()})


def test_what_no_graph_holds_says_why() -> None:
    speech = next(case for case in CASES if case.name == "zoo: 15 CAM++")
    graph, _ = compiled(convert(speech.make()), "eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a function of somebody else's"):
        graph(torch.randn(speech.shape))


def test_explain_runs_a_compiled_model_uncompiled() -> None:
    model = small()
    found = explain(compiled(model, "eager")[0], images(2))
    assert found.kinds == {"kernels"}
    assert len(found.entries) == len(explain(model, images(2)).entries)


@pytest.mark.parametrize("part", ["denseblock1", "transition1", ""])
def test_statistics_beyond_float32(part: str) -> None:
    """The numbers of float64, in which the operators compute then."""
    model = small().features.get_submodule(part)
    graph, _ = compiled(copy.deepcopy(model).float(), "eager")
    x = torch.randn(2, 3, 32, 32)
    if part:
        x = torch.randn(4, 8 if part == "denseblock1" else 16, 8, 8)
    x[0, 0, 0, 0] = 1e20
    expected, got = training_step(model, x.double()), training_step(graph, x)
    for name, wide in expected.items():
        narrow = got[name if name in got else f"_orig_mod.{name}"]
        torch.testing.assert_close(narrow, wide.to(narrow.dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("operator", "parameters"),
    [
        (
            graph_pooling.transition,
            [torch.ones(4), torch.zeros(4), torch.ones(3, 4, 1, 1), torch.zeros(3)],
        ),
        (graph_pooling.stem, [torch.ones(4), torch.zeros(4)]),
    ],
    ids=["transition", "stem"],
)
def test_statistics_handed_in_are_not_written(operator: Any, parameters: list[Tensor]) -> None:
    """Where they are beyond float32 the operator takes others, of its own."""
    call = encode(PoolSpec(NormSpec(1e-5), None, True))  # type: ignore[arg-type]
    known, given = torch.full((2, 4), torch.inf), "1" * len(parameters)
    x = torch.randn(2, 4, 8, 8)
    _, _, used = operator(call, given, x, known, [], parameters)
    assert known.isinf().all() and used.isfinite().all()
