"""Is this ordinary eager execution?

The kernels, the shared scratch and the statistics that travel with a tensor are right for ordinary
eager tensors. Under a tracer, a transform of `torch.func`, a fake-tensor or another dispatch mode
the modules run their original forward, whose operators all of these know.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

_CALL = torch.nn.Module.__call__
_CALL_IMPL = torch.nn.Module._call_impl
_GETATTR = torch.nn.Module.__getattr__
_NOTHING = contextlib.nullcontext()


def unusual_mode() -> str | None:
    """What makes this call something else than ordinary eager execution, in words; None where
    nothing does. Costs about a microsecond."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if torch._C._len_torch_dispatch_stack():
        mode = torch.utils._python_dispatch._get_current_dispatch_mode_stack()[-1]
        return f"{type(mode).__name__} is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    for index in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(index)
        if type(mode) is not DeviceContext:  # of torch.set_default_device and torch.device
            return f"{type(mode).__name__} is active"
    module = torch.nn.Module
    if (
        module.__call__ is not _CALL
        or module._call_impl is not _CALL_IMPL
        or module.__getattr__ is not _GETATTR
    ):
        return "torch.nn.Module is patched, as torch.fx does while it traces"
    return unusual_for_modules()


def unusual_for_modules() -> str | None:
    """What of it holds as well for the code that torch.compile traces."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if nn_module._has_any_global_hook():
        return "a hook is registered for all modules"
    return None


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export is tracing. Dynamo runs this as ordinary Python: in what it traces the
    one of torch 2.10 and 2.11 takes `torch.compiler.is_exporting()` to be true for torch.compile as
    well."""
    return torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is active, or forward-mode differentiation: gradients
    may carry tangents, which operators would leave behind."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def is_ordinary(x: object) -> bool:
    """Whether x is an ordinary tensor: no subclass, with memory of its own, dense and strided."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.layout is torch.strided
        and torch._C._has_storage(x)  # a batch of tensors in a vectorised Jacobian has none
        and not x.is_meta
    )


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast casts nothing on a device."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING
