"""Data-parallel training in several processes, DDP and FSDP2, on the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from densenet_efficient.nn import execution
from tests.support.converted_pair import converted_pair
from tests.support.processes import results_of

pytestmark = pytest.mark.slow  # the processes start

Results = dict[str, Tensor]


def sharded(model: nn.Module, stages: bool = False) -> nn.Module:
    """The model under FSDP2, as a whole or block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if stages:
        for name, stage in model.features.named_children():  # type: ignore[union-attr]
            if name.startswith(("denseblock", "transition")):
                fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, gradients in the buckets": lambda m: DistributedDataParallel(
        m, gradient_as_bucket_view=True
    ),
    "DDP, static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "FSDP2": sharded,
    "FSDP2, block by block": lambda m: sharded(m, stages=True),
}


def train(model: nn.Module, x: Tensor, kinds: set[str] | None = None) -> Results:
    """Parameters and buffers after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        with execution.recording() as entries:
            y = model(x)
        if kinds is not None:
            kinds |= {chosen.kind for _, _, chosen in entries}
        y.square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    return {
        name.removeprefix("module."): value.full_tensor()
        if hasattr(value, "full_tensor")
        else value
        for name, value in state.items()
    }


def images() -> Tensor:
    """Of all processes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)


def models() -> tuple[nn.Module, nn.Module]:
    """The plain network and the converted one, the same in every process."""
    torch.manual_seed(2)
    return converted_pair(growth_rate=4, num_init_features=8)


def run(rank: int) -> dict[str, Any]:
    """What a process has after two steps under each wrapper: the plain network, the converted one,
    the converted one with synchronised norms; and how the latter two ran."""
    x = images().chunk(2)[rank]
    found: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        kinds: set[str] = set()
        plain, ours = (wrap(model) for model in models())
        found[name] = (
            train(plain, x), train(ours, x, kinds), train(synchronised(name), x, kinds), kinds,
        )  # fmt: skip
    return found


def synchronised(name: str) -> nn.Module:
    """The converted network with synchronised norms. DDP refuses to be put around those on the CPU,
    but lets norms become synchronised afterwards; FSDP2 wants them before."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    wrap, model = WRAPPERS[name], models()[1]
    return wrap(convert(model)) if name.startswith("FSDP2") else convert(wrap(model))


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return results_of(run, 2)


@pytest.mark.parametrize("name", WRAPPERS)
def test_ordinary_norms_train_as_the_plain_network_does(
    name: str, found: list[dict[str, Any]]
) -> None:
    for results in found:
        plain, ours, _, kinds = results[name]
        assert kinds == {"kernels"}
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WRAPPERS)
def test_synchronised_norms_train_as_one_process_with_all_images_does(
    name: str, found: list[dict[str, Any]]
) -> None:
    expected = train(models()[0], images())
    for results in found:
        torch.testing.assert_close(results[name][2], expected, rtol=1e-9, atol=1e-9)
