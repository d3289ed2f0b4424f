"""What makes a run repeatable: the states of the random generators that it may draw from, saved and
put back, and deterministic algorithms."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

try:
    import numpy
except ImportError:  # then nothing can draw from its generator either
    numpy = None  # type: ignore[assignment]

__all__ = [
    "check_random_state",
    "deterministic_algorithms",
    "random_state",
    "restore_random_state",
    "seed_everything",
]


def seed_everything(seed: int) -> None:
    """Seed every generator of :func:`random_state`."""
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, or an error where an operator has none, for the length of
    the context."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is refused
    before = torch.are_deterministic_algorithms_enabled()
    search = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = search


def random_state() -> dict[str, Any]:
    """The states of PyTorch's, Python's and, where it is installed, NumPy's global generators."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }
    if numpy is not None:
        numpy_state: Any = numpy.random.get_state()
        kind, keys, position, has_gauss, cached = numpy_state
        keys = torch.from_numpy(keys.astype("int64"))
        state["numpy"] = [kind, keys, position, has_gauss, cached]
    return state


def check_random_state(state: Mapping[str, Any]) -> None:
    """Try the states on generators of no consequence.

    Raises:
        ValueError: a state that its generator does not accept; nothing has been changed.
    """
    trials = {
        "torch": lambda: torch.Generator().set_state(state["torch"]),
        "cuda": lambda: _try_cuda(state),
        "python": lambda: _try_python(state),
        "numpy": lambda: _set_numpy(state, None if numpy is None else numpy.random.RandomState()),
    }
    for name, attempt in trials.items():
        try:
            attempt()
        except Exception as error:  # whatever a generator says of bytes that are not its own
            raise ValueError(
                f"random generators: {name}: expected a state of this generator, got "
                f"{type(error).__name__}: {error}"
            ) from error


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to where :func:`random_state` found it. CUDA generators are set
    for as many devices as both the state and this machine have."""
    torch.set_rng_state(state["torch"])
    _each_cuda(state, lambda device, one: torch.cuda.set_rng_state(one, device))
    random.setstate(_python_state(state))
    _set_numpy(state, None if numpy is None else numpy.random)


def _try_python(state: Mapping[str, Any]) -> None:
    version, keys, gauss = _python_state(state)
    if not (gauss is None or isinstance(gauss, float)):  # which setstate would believe
        raise TypeError(f"{type(gauss).__name__} in place of None or a number")
    random.Random().setstate((version, keys, gauss))


def _try_cuda(state: Mapping[str, Any]) -> None:
    states = state["cuda"]  # none where the checkpoint's machine had no GPU
    if not isinstance(states, list) or not all(isinstance(one, torch.Tensor) for one in states):
        raise TypeError(f"{type(states).__name__} in place of a list of tensors")
    _each_cuda(state, lambda i, one: torch.Generator(f"cuda:{i}").set_state(one))


def _each_cuda(state: Mapping[str, Any], use: Callable[[int, torch.Tensor], object]) -> None:
    for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        use(device, one)


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, keys, gauss = state["python"]
    return version, tuple(keys), gauss


def _set_numpy(state: Mapping[str, Any], generator: Any) -> None:
    if generator is None or "numpy" not in state:
        return
    kind, keys, position, has_gauss, cached = state["numpy"]
    generator.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
