"""GPUs by name, with the rates that their makers publish."""

from __future__ import annotations

from dataclasses import dataclass

from tools.emulation import Device


@dataclass(frozen=True)
class Gpu:
    """name: as the driver gives it. clock: cycles a second, at which the tensor cores reach their
    published rate. bandwidth: bytes a second of memory. products: FLOP/s of the tensor cores in 16
    bits, without sparsity. shared_bytes: the most that one block may ask for."""

    title: str
    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    products: float
    shared_bytes: int

    @property
    def device(self) -> Device:
        """What the launchers see of it."""
        return Device(self.multiprocessors, self.shared_bytes)


# Sources. Multiprocessors, boost clock: NVIDIA's architecture white papers, "NVIDIA A100 Tensor
# Core GPU Architecture" (2020), table 2, and "NVIDIA H100 Tensor Core GPU Architecture" (2022),
# table 3; the H200 is the same chip as the H100 SXM. Memory: the data sheets of A100 (80 GB SXM),
# H100 and H200. Shared memory: CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0.
GPUS = {
    "a100": Gpu(
        "A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 108, 1.41e9, 2.039e12, 312e12, 163 << 10
    ),
    "h100": Gpu("H100 SXM", "NVIDIA H100 80GB HBM3", 132, 1.83e9, 3.35e12, 989e12, 227 << 10),
    "h200": Gpu("H200", "NVIDIA H200", 132, 1.83e9, 4.8e12, 989e12, 227 << 10),
}

# For the shapes' idle waves only (waves.py), no time is predicted for it elsewhere. Memory and
# products: data sheet "NVIDIA Blackwell" (HGX B200, of each GPU). Multiprocessors and shared
# memory: what CUDA says of the device. Its clock is not in these: the H200's.
B200 = Gpu("B200", "NVIDIA B200", 148, GPUS["h200"].clock, 8e12, 2250e12, 227 << 10)


def gpu_named(name: str) -> Gpu:
    """By the name that the driver gives it; the whole of it, because cards that share a part differ
    in rates (H100 PCIe, A100 of 40 GB, GH200). ValueError where its rates are not listed."""
    for gpu in GPUS.values():
        if gpu.name == name:
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS.values())
    raise ValueError(f"GPU: expected one of {known}, got {name!r}; nothing to predict")
