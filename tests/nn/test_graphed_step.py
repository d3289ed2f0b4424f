"""`GraphedStep` with a stand-in for the capture: which steps are replayed and which run eagerly,
and that both together train as eager steps alone do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import densenet_efficient as de
from densenet_efficient.ops.dispatch import Dispatch
from tests.support.graph_stand_in import Recorder, stand_in

Begin = Callable[[de.GraphedStep], type[Recorder]]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    return stand_in(monkeypatch)


class Training:
    """A model, its optimiser and their step."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model = model
        options = {"lr": 0.1, "momentum": 0.9, "fused": True, **options}
        self.optimizer = torch.optim.SGD(model.parameters(), **options)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def graphed(self, **options: Any) -> de.GraphedStep:
        return de.GraphedStep(self, self.model, self.optimizer, **options)


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return de.densenet_cifar(10, 4, num_classes=3, **options)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 3) for n in sizes
    ]  # fmt: skip


def after_three_steps(training: Training, begin: Begin) -> tuple[Any, Any, Any]:
    """The graphed step, its recorder and the batch."""
    step = training.graphed(warm_up=1)
    recorder = begin(step)
    (batch,) = batches(4)
    for _ in range(3):
        step(*batch)
    return step, recorder, batch


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_steps_train_as_eager_ones_do(begin: Begin) -> None:
    """Four batches, the capture, replays, a short batch and replays again, with a schedule."""
    eager = Training(network())
    graphed = Training(copy.deepcopy(eager.model))
    step = graphed.graphed(warm_up=2)
    recorder = begin(step)
    kinds = []
    for images, labels in batches(4, 4, 4, 4, 3, 4, 4):
        with eager_rates(eager):
            expected = eager(images, labels)
        eager.schedule.step()
        loss = step(images, labels)
        graphed.schedule.step()
        kinds.append(step.path.kind)
        assert torch.equal(loss, expected) and not loss.requires_grad
        assert isinstance(graphed.optimizer.param_groups[0]["lr"], float)
        gradients = zip(graphed.model.parameters(), eager.model.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in gradients)
    assert kinds == ["eager", "eager", "graph", "graph", "eager", "graph", "graph"]
    assert same(eager.model, graphed.model)
    assert (recorder.recorded, recorder.replayed, step.difference) == (1, 4, 0.0)


def eager_rates(training: Training) -> Any:
    """Learning rates as tensors, so that their bits are the graph's."""
    return training.graphed().state.rates_on(torch.device("cpu"))


def test_what_ran_is_told(begin: Begin) -> None:
    step = Training(network()).graphed(warm_up=1)
    begin(step)
    for images, labels in batches(4, 4):
        step(images, labels)
    assert "float32[4, 3, 8, 8]" in step.path.reason
    assert {chosen.kind for name, chosen in step.modules if "denseblock" in name} == {"kernels"}


def test_dropout_is_compared_with_the_same_masks(begin: Begin) -> None:
    step = Training(network(drop_rate=0.5, drop_everywhere=True)).graphed(warm_up=1)
    begin(step)
    losses = [float(step(*batches(4)[0])) for _ in range(3)]
    assert step.path.kind == "graph" and step.difference == 0.0 and len(set(losses)) == 3


def hooked(training: Training) -> Any:
    return training.model.register_forward_hook(lambda *_: None)


def hooked_parameter(training: Training) -> Any:
    return next(training.model.parameters()).register_hook(lambda g: None)


def hooked_optimizer(training: Training) -> Any:
    return training.optimizer.register_step_post_hook(lambda *_: None)


def hooked_optimizers(training: Training) -> Any:
    return register_optimizer_step_post_hook(lambda *_: None)


@pytest.mark.parametrize(
    "register", [hooked, hooked_parameter, hooked_optimizer, hooked_optimizers]
)
def test_hooks_run(begin: Begin, register: Callable[[Training], Any]) -> None:
    training = Training(network())
    step = training.graphed(warm_up=1)
    begin(step)
    (images, labels), *_ = batches(4)
    step(images, labels)
    handle = register(training)
    with pytest.warns(UserWarning, match="without a graph: a hook is registered"):
        step(images, labels)
    assert step.path.kind == "eager"
    handle.remove()
    step(images, labels)
    assert step.path.kind == "graph"


def anomaly() -> Any:
    return torch.autograd.set_detect_anomaly(True)


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "reason"), [(anomaly, "anomaly mode is on"), (Watching, "Watching is active")]
)
def test_modes_that_look_at_every_operator(
    begin: Begin, mode: Callable[[], Any], reason: str
) -> None:
    step = Training(network()).graphed(warm_up=1)
    begin(step)
    (batch,) = batches(4)
    for _ in range(2):
        step(*batch)
    with mode(), pytest.warns(UserWarning, match=reason):
        step(*batch)
    assert step.path.kind == "eager" and reason in step.path.reason
    step(*batch)
    assert step.path.kind == "graph"


def freeze(training: Training) -> None:
    training.model.features.denseblock1.eval()


def reload(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def decay(training: Training) -> None:
    training.optimizer.param_groups[0]["weight_decay"] = 0.5


def new_head(training: Training) -> None:
    head = copy.deepcopy(training.model.classifier)
    parameters = training.optimizer.param_groups[0]["params"]
    states = training.optimizer.state
    for old, new in zip(parameters[-2:], head.parameters(), strict=True):
        states[new] = {"momentum_buffer": states.pop(old)["momentum_buffer"].clone()}
    training.model.classifier, parameters[-2:] = head, head.parameters()


def moved(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data.clone()


def momentum(training: Training) -> None:
    training.model.features.norm5.momentum = 0.5


@pytest.mark.parametrize("change", [freeze, reload, decay, new_head, moved, momentum])
def test_changes_are_captured_anew(begin: Begin, change: Callable[[Training], None]) -> None:
    training = Training(network())
    step, recorder, batch = after_three_steps(training, begin)
    change(training)
    other = Training(copy.deepcopy(training.model), **options_of(training))
    other.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    kinds = []
    for _ in range(4):
        with eager_rates(other):
            expected = other(*batch)
        assert torch.equal(step(*batch), expected)
        kinds.append(step.path.kind)
    assert "graph" in kinds and kinds[0] == "eager" and recorder.recorded == 2
    assert same(training.model, other.model)


def options_of(training: Training) -> dict[str, Any]:
    return {"weight_decay": training.optimizer.param_groups[0]["weight_decay"]}


def test_gradients_are_there_after_a_replay(begin: Begin) -> None:
    training = Training(network())
    step, _, batch = after_three_steps(training, begin)
    training.optimizer.zero_grad()
    step(*batch)
    assert step.path.kind == "graph"
    assert all(p.grad is not None for p in training.model.parameters())


def test_evaluation_in_between_changes_nothing(begin: Begin) -> None:
    training = Training(network())
    step, recorder, batch = after_three_steps(training, begin)
    for _ in range(2):
        with torch.no_grad():
            training.model.eval()(batch[0])
        training.model.train()
        step(*batch)
    assert step.path.kind == "graph" and recorder.recorded == 1


def test_a_step_that_the_host_takes_part_in_is_refused(begin: Begin) -> None:
    training = Training(network())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return training(images + torch.randn(()), labels)

    def record(self: Recorder, run: Callable[[], Any]) -> Any:
        torch.randn(())  # the host's generator has moved on
        return original(self, run)

    graphed = de.GraphedStep(step, training.model, training.optimizer, warm_up=1)
    own = begin(graphed)
    original, own.record = own.record, record  # type: ignore[method-assign]
    (batch,) = batches(4)
    graphed(*batch)
    reference = copy.deepcopy(training.model)
    with pytest.raises(RuntimeError, match=r"cannot be replayed: it ended .* from the eager step"):
        graphed(*batch)
    assert not same(reference, training.model)  # the eager step was made
    assert graphed.path == Dispatch("eager", "the step that the graph is compared with")


def test_another_forward_is_captured_anew(begin: Begin) -> None:
    training = Training(network())
    step, recorder, batch = after_three_steps(training, begin)
    head = training.model.classifier
    head.forward = lambda x: nn.functional.linear(x, head.weight)
    for _ in range(2):
        step(*batch)
    assert step.path.kind == "graph" and recorder.recorded == 2


def test_autocast_around_the_step(begin: Begin) -> None:
    step, recorder, batch = after_three_steps(Training(network()), begin)
    torch.set_autocast_cache_enabled(False)
    torch.set_autocast_enabled("cuda", True)
    try:
        step(*batch)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)
    assert step.path.kind == "eager" and recorder.recorded == 1


def test_a_counter_on_the_host_is_refused(begin: Begin) -> None:
    """A tensor that a step changes while it is recorded is not changed by a replay."""
    training = Training(network())
    training.model.register_buffer("count", torch.zeros(()))
    step = training.graphed(warm_up=1)
    own = begin(step)

    def record(self: Recorder, run: Callable[[], Any]) -> Any:
        found = original(self, run)
        training.model.count += 1
        return found

    original, own.record = own.record, record  # type: ignore[method-assign]
    (batch,) = batches(4)
    step(*batch)
    with pytest.raises(RuntimeError, match="changed a tensor of its state on the host"):
        step(*batch)
    assert training.model.count == 0  # as after the eager step


def test_an_error_while_capturing_says_what_may_be_wrong(begin: Begin) -> None:
    step = Training(network()).graphed(warm_up=1)
    own = begin(step)

    def record(self: Recorder, run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    own.record = record  # type: ignore[method-assign]
    (batch,) = batches(4)
    step(*batch)
    with pytest.raises(RuntimeError, match=r"cannot be captured: .*reading a value.*not permitted"):
        step(*batch)


def test_a_schedule_inside_is_refused(begin: Begin) -> None:
    training = Training(network())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = training(images, labels)
        training.schedule.step()
        return loss

    graphed = de.GraphedStep(step, training.model, training.optimizer)
    begin(graphed)
    with pytest.raises(ValueError, match="step changed a learning rate: schedules"):
        graphed(*batches(4)[0])


def test_on_the_cpu_it_is_the_step() -> None:
    training = Training(network(), fused=None)
    step = training.graphed()
    for batch in batches(4, 4, 4, 4, 4):
        step(*batch)
    assert step.path.kind == "eager" and "needs one CUDA device, got cpu" in step.path.reason
