"""Threads that share models and the arena give what one thread gives; `make sanitize` runs it."""

import copy
import threading
from collections.abc import Callable

import torch

from densenet_efficient.core import arena
from tests.support.converted_pair import (
    assert_close,
    converted_pair,
    images,
    training_step,
)

THREADS = 4
ROUNDS = 3


def run_together(*work: Callable[[], None]) -> None:
    """Every function in a thread of its own, started together; their errors are raised here."""
    start = threading.Barrier(len(work))
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_threads_that_call_one_model_while_another_empties_the_arena() -> None:
    plain, ours = converted_pair()
    plain.eval(), ours.eval()
    batches = [images(1 + index) for index in range(THREADS)]
    expected = [plain(x).detach() for x in batches]

    def call(index: int) -> None:
        for _ in range(ROUNDS):
            assert_close(expected[index], ours(batches[index]).detach())

    def empty() -> None:
        for _ in range(20 * ROUNDS):
            arena.release()
            assert arena.reserved_bytes() >= 0

    run_together(*(lambda index=index: call(index) for index in range(THREADS)), empty)


def test_threads_that_train_a_model_each() -> None:
    """Forward and backward, whose work goes through autograd's threads as well."""
    plain, ours = converted_pair()
    x = images()
    expected = training_step(copy.deepcopy(plain), x)
    models = [copy.deepcopy(ours) for _ in range(THREADS)]
    run_together(
        *(
            lambda model=model: assert_close(expected, training_step(model, x))  # type: ignore[misc]
            for model in models
        )
    )


def test_gradients_of_threads_that_share_a_model_in_eval_mode() -> None:
    """Of the input only: `backward` would add up in the parameters' gradients."""
    plain, ours = converted_pair()
    plain.eval(), ours.eval()
    x = images()

    def gradient(model: torch.nn.Module) -> torch.Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(model(z).square().sum(), z)[0]

    expected = gradient(plain)
    run_together(*[lambda: assert_close(expected, gradient(ours))] * THREADS)
