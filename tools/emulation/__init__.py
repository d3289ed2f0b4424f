"""Runs the CUDA kernels' own sources on the host, checked and counted.

A thread block becomes a set of fibers, warp primitives and barriers become rendezvous, shared
memory an exactly sized heap block filled with NaN, all of it under the address sanitizer
(csrc/emulation). Needs a source checkout and g++; no GPU.

    python -m tools.emulation OPERATOR SIZES...    prints what a profiler would count
"""

from .build import EmulationError, Mutation, build
from .emulator import Device, Emulator
from .report import Launch, Site, TensorTraffic, Traffic, tensor_table, tensor_traffic

__all__ = [
    "Device",
    "EmulationError",
    "Emulator",
    "Launch",
    "Mutation",
    "Site",
    "TensorTraffic",
    "Traffic",
    "build",
    "tensor_table",
    "tensor_traffic",
]
